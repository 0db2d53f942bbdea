"""What a sweep would do, found out without starting anything: gangs, slots, data, what is left, how long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from model.config import TIME_LIMIT_S
from model.report import STAGES
from runner.folder.directory import SweepDirectory, run_from_json
from runner.folder.storage import Storage, open_storage
from runner.folder.takeover import finished_attempts
from runner.life.capacity import HERE, Node, count_slots, gangs_on, labels_on, why_infeasible
from runner.life.decisions import most_groups
from runner.life.placing import gang_now
from runner.life.states import Run
from runner.machine.packages import missing_packages, missing_trackers
from runner.spec.sweep import RunKey, SweepSpec
from runner.sweep import hash_code, hash_what_is_read, list_lacking
from runner.work import identities


class Left(StrEnum):
    """How much of a run is there already."""

    DONE = "done"
    RESUMABLE = "resumable"
    NEW = "new"


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """One stage of an ablation: how often it is needed, how often computed, by which variants it is shared."""

    stage: str
    num_wanted: int  # runs that are left
    num_computed: int  # of them with the rest taken from others, finished runs included
    shared_by: tuple[tuple[str, ...], ...]  # groups of two and more variants
    seconds: float | None  # of one computation


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A checked sweep and what it meets."""

    spec: SweepSpec
    nodes: tuple[Node, ...]
    slots: int  # gangs that fit on the nodes
    runs: dict[RunKey, Left]
    hashes: dict[str, str]  # without data_hash where data is missing
    problems: tuple[str, ...]  # the gang's first, then the data's
    seed_s: float | None  # estimated time of one run
    seed_source: str  # where that comes from
    stages: tuple[StagePlan, ...] = ()  # of an ablation
    no_place: str = ""  # why the nodes of a cluster cannot hold a gang, where one that can may still come

    @property
    def at_once(self) -> int:
        """How many gangs are at work at once on these nodes."""
        return min(self.slots, self.spec.limits.max_gangs or self.slots)

    @property
    def sweep_s(self) -> float | None:
        """Estimated time until all runs are done."""
        if self.stages:
            seconds = self.stage_s(is_shared=True)
            return None if seconds is None or not self.at_once else seconds / self.at_once
        left = sum(state is not Left.DONE for state in self.runs.values())
        return None if self.seed_s is None or not self.at_once else -(-left // self.at_once) * self.seed_s

    @property
    def gpu_hours(self) -> float | None:
        """Estimated GPU-hours of the runs that are left."""
        if self.stages:
            return self.hours(is_shared=True)
        left = sum(state is not Left.DONE for state in self.runs.values())
        return None if self.seed_s is None else left * self.seed_s * self.spec.gang.gpus / 3600

    def hours(self, *, is_shared: bool) -> float | None:
        """Return the GPU-hours of an ablation's runs that are left, with or without sharing their stages."""
        seconds = self.stage_s(is_shared=is_shared)
        return None if seconds is None else seconds * self.spec.gang.gpus / 3600

    def stage_s(self, *, is_shared: bool) -> float | None:
        """Return the seconds of all stages that are left, one after the other; None where one is unknown."""
        total = 0.0
        for stage in self.stages:
            if stage.seconds is None:
                return None
            total += stage.seconds * (stage.num_computed if is_shared else stage.num_wanted)
        return total


def make_plan(spec: SweepSpec, nodes: Sequence[Node]) -> Plan:
    """Return the plan of spec on nodes, reading the run directory and the data but changing nothing."""
    spec = replace(spec, gang=gang_now(spec.gang, earlier_runs(spec), nodes))
    is_here = [node.node_id for node in nodes] == [HERE]
    uses_gpus = spec.gang.gpus > 0
    recipes = spec.variants if is_here and spec.program is None else ()
    packages = [missing_packages(variant.config, uses_gpus=uses_gpus) for variant in recipes]
    problem = why_infeasible(nodes, spec.gang)
    no_place = problem if spec.limits.wait_s and not is_here else ""
    problems = ["" if no_place else problem, *dict.fromkeys(packages), missing_trackers(spec.track)]
    problems = [line for line in problems if line]
    missing = list_lacking(spec)
    hashes = {"config_hash": spec.config_hash, "code_hash": hash_code(spec)}
    if not missing and (found := hash_what_is_read(spec)):
        hashes["data_hash"] = found
    runs = find_left(spec)
    seed_s, source = estimate_s(spec)
    stages: tuple[StagePlan, ...] = ()
    if spec.ablation:
        seconds, source = estimate_stages_s(spec)
        stages = plan_stages(spec, runs, hashes, seconds)
    return Plan(
        spec=spec, nodes=tuple(nodes), slots=count_slots(nodes, spec.gang), runs=runs, hashes=hashes,
        problems=(*problems, *missing), seed_s=seed_s, seed_source=source, stages=stages, no_place=no_place,
    )  # fmt: skip


def earlier_runs(spec: SweepSpec) -> list[Run]:
    """Return the runs of the directory as its last driver left them, where they say on which GPUs the sweep is."""
    state = SweepDirectory(open_storage(spec.out)).read_state() if spec.gang.same_gpu else {}
    return [run_from_json(plain) for plain in state.get("runs", [])]


def find_left(spec: SweepSpec) -> dict[RunKey, Left]:
    """Return for every run whether it is done, can go on from what it left, or is new."""
    finished = finished_attempts(spec)
    storage = open_storage(spec.out)
    return {key: Left.DONE if key in finished else judge_left(storage, key) for key in spec.keys}


def judge_left(storage: Storage, key: RunKey) -> Left:
    """Return RESUMABLE if the run left a finished stage or a checkpoint."""
    has_work = any(storage.names(f"seeds/{key.name}/{folder}") for folder in ("stages", "checkpoints"))
    return Left.RESUMABLE if has_work else Left.NEW


def estimate_s(spec: SweepSpec) -> tuple[float | None, str]:
    """Return the estimated seconds of one run and where that is from: earlier runs, or the budget."""
    from results.store.reader import read_runs

    try:
        frame = read_runs(spec.out, columns=["started_at", "ended_at"]).frame
    except FileNotFoundError:
        frame = None
    if frame is not None:
        done = frame[frame["state"] == "DONE"]
        took = (done["ended_at"] - done["started_at"]).dt.total_seconds().dropna()
        if len(took):
            return float(took.mean()), f"mean of {len(took)} finished runs here"
    if spec.program is not None:
        return None, "unknown: no finished run here, and a program does not say how long it takes"
    budget_s = spec.config.train.budget_s
    if budget_s is None:
        return None, "unknown: no finished run here, and training counts steps, not seconds"
    return budget_s + TIME_LIMIT_S, f"train.budget_s={budget_s:g} and as much as {TIME_LIMIT_S:g} s of evaluation"


def plan_stages(
    spec: SweepSpec, runs: Mapping[RunKey, Left], hashes: Mapping[str, str], seconds: Mapping[str, float]
) -> tuple[StagePlan, ...]:
    """Return how often each stage is computed for the runs that are left; finished runs give theirs."""
    named = identities(spec, hashes.get("data_hash"), hashes["code_hash"])
    left = [key for key, state in runs.items() if state is not Left.DONE]
    found = []
    for stage in STAGES:
        there = {named[key][stage] for key in runs if runs[key] is Left.DONE}
        groups: dict[str, list[str]] = {}
        for key in spec.keys:
            if (key.seed, key.repeat) == (spec.seeds[0], 0):  # every seed is shared alike
                groups.setdefault(named[key][stage], []).append(key.variant)
        found.append(
            StagePlan(
                stage=stage, num_wanted=len(left), num_computed=len({named[key][stage] for key in left} - there),
                shared_by=tuple(tuple(names) for names in groups.values() if len(names) > 1),
                seconds=seconds.get(stage),
            )
        )  # fmt: skip
    return tuple(found)


def estimate_stages_s(spec: SweepSpec) -> tuple[dict[str, float], str]:
    """Return the estimated seconds of each stage and where they are from: stages computed here, or the budgets."""
    from results.store.reader import load_table

    try:
        frame = load_table(spec.out, "stages", columns=["stage", "seconds", "reused_from"])
    except FileNotFoundError:
        frame = None
    if frame is not None:
        computed = frame[frame["reused_from"].isna()]
        means = {str(stage): float(value) for stage, value in computed.groupby("stage")["seconds"].mean().items()}
        if set(means) >= set(STAGES):
            return means, f"mean of {len(computed)} stages computed here"
    train = spec.config.train
    if train.budget_s is None:
        return {}, "unknown: no finished run here, and training counts steps, not seconds"
    budgets = (train.budget_s - train.reserve_s, train.reserve_s, 0.0, TIME_LIMIT_S)
    return dict(zip(STAGES, budgets, strict=True)), (
        f"train.budget_s={train.budget_s:g} with train.reserve_s={train.reserve_s:g} of it for the artifact, and "
        f"{TIME_LIMIT_S:g} s of ttt with evaluation in them"
    )


def slots_lines(plan: Plan) -> list[str]:
    """Return how many gangs there may be at once: on these nodes, and on those that may come."""
    limits = plan.spec.limits
    most = "" if limits.max_gangs is None else f" (max_gangs: {limits.max_gangs})"
    lines = [f"slots: {plan.slots} gang(s) at once{most}"]
    if limits.wait_s:
        asked = min(most_groups(plan.slots, limits), sum(left is not Left.DONE for left in plan.runs.values()))
        lines.append(f"asked for: {asked} gang(s) at once, placed ones included; nodes that come are used")
    if plan.no_place:
        lines.append(f"no place yet: {plan.no_place}; waits {limits.wait_s:g} s for a node (wait_s)")
    return lines


def slots_per_node(plan: Plan) -> list[str]:
    """Return one line for each node: what it has, and how many gangs, or shares of them, it holds."""
    gang = plan.spec.gang
    what = "gang(s)" if gang.hosts == 1 else f"share(s) of a gang over {gang.hosts} hosts"

    def count(node: Node) -> str:
        has = f" ({labels_on(node, gang)})" if gang.require else ""
        if not gang.matches(node.labels):
            return f"not for this gang{has}"
        return f"{gangs_on(node, gang)} {what}{has}"

    return [f"{node.describe()}: {count(node)}" for node in plan.nodes]
