"""What a sweep would do, found out without starting anything: gangs, slots, data, what is left, how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from model.config import TIME_LIMIT_S
from runner.folder.storage import Storage, open_storage
from runner.life.capacity import HERE, Node, count_slots, gangs_on, why_infeasible
from runner.machine.packages import missing_packages
from runner.provenance import code_hash, data_hash, data_problems
from runner.spec import RunKey, SweepSpec
from runner.sweep import finished_attempts


class Left(StrEnum):
    """How much of a run is there already."""

    DONE = "done"
    RESUMABLE = "resumable"
    NEW = "new"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A checked sweep and what it meets."""

    spec: SweepSpec
    nodes: tuple[Node, ...]
    slots: int
    runs: dict[RunKey, Left]
    hashes: dict[str, str]  # without data_hash where data is missing
    problems: tuple[str, ...]  # the gang's first, then the data's
    seed_s: float | None  # estimated time of one run
    seed_source: str  # where that comes from

    @property
    def sweep_s(self) -> float | None:
        """Estimated time until all runs are done."""
        left = sum(state is not Left.DONE for state in self.runs.values())
        return None if self.seed_s is None or not self.slots else -(-left // self.slots) * self.seed_s

    @property
    def gpu_hours(self) -> float | None:
        """Estimated GPU-hours of the runs that are left."""
        left = sum(state is not Left.DONE for state in self.runs.values())
        return None if self.seed_s is None else left * self.seed_s * self.spec.gang.gpus / 3600


def make_plan(spec: SweepSpec, nodes: Sequence[Node]) -> Plan:
    """Return the plan of spec on nodes, reading the run directory and the data but changing nothing."""
    is_here = [node.node_id for node in nodes] == [HERE]
    packages = missing_packages(spec.config, uses_gpus=spec.gang.gpus > 0) if is_here else ""
    problems = [line for line in (why_infeasible(nodes, spec.gang), packages) if line]
    missing = data_problems(spec.config.data)
    hashes = {"config_hash": spec.config_hash, "code_hash": code_hash()}
    if not missing:
        hashes["data_hash"] = data_hash(spec.config.data, vocab_size=spec.config.model.vocab_size)
    seed_s, source = estimate_s(spec)
    return Plan(
        spec=spec, nodes=tuple(nodes), slots=count_slots(nodes, spec.gang), runs=what_is_left(spec), hashes=hashes,
        problems=(*problems, *missing), seed_s=seed_s, seed_source=source,
    )  # fmt: skip


def what_is_left(spec: SweepSpec) -> dict[RunKey, Left]:
    """Return for every run whether it is done, can go on from what it left, or is new."""
    finished = finished_attempts(spec.out)
    storage = open_storage(spec.out)
    return {key: Left.DONE if key in finished else resumable(storage, key) for key in spec.keys}


def resumable(storage: Storage, key: RunKey) -> Left:
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
    budget_s = spec.config.train.budget_s
    if budget_s is None:
        return None, "unknown: no finished run here, and training counts steps, not seconds"
    return budget_s + TIME_LIMIT_S, f"train.budget_s={budget_s:g} and as much as {TIME_LIMIT_S:g} s of evaluation"


def slots_per_node(plan: Plan) -> list[str]:
    """Return one line for each node: what it has, and how many gangs it holds."""
    return [f"{node.describe()}: {gangs_on(node, plan.spec.gang)} gang(s)" for node in plan.nodes]
