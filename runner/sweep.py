"""Running a sweep from its spec: the run directory is checked and taken, what is done is skipped, the rest driven.

`run_sweep` is what `seedsweep run` calls, with Ray or without.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.fields import plain_settings
from model.pipeline.differences import code_words, data_words, settings_words
from results.schema import BASE
from runner.errors import Infeasible, OutNotShared, Refused, SweepError
from runner.folder.directory import FORMAT, SweepDirectory, utc
from runner.folder.fence import yield_s
from runner.folder.program_files import (
    find_files,
    find_folder,
    folder_hash,
    hash_files,
    kept_folder,
    list_names,
    read_hashes,
)
from runner.folder.program_inputs import combine_inputs, hash_inputs, input_problems
from runner.folder.storage import check_writable, open_storage
from runner.folder.takeover import take_over
from runner.life.capacity import count_slots, why_infeasible
from runner.life.claims import Board
from runner.life.states import Run
from runner.machine.node import this_machine
from runner.machine.packages import keep_arrow_small, missing_packages, missing_trackers
from runner.machine.signals import raise_interrupt, signals_end
from runner.provenance import code_hash, data_files, data_hash, data_problems, git_state, machine, package_versions
from runner.scheduler import EXIT_INFEASIBLE, Backend, Scheduler, View, exit_code
from runner.spec.gang import Gang
from runner.spec.places import absolute_path
from runner.spec.sweep import RunKey, SweepSpec
from runner.view.progress import Views, open_view
from runner.view.trackers import open_tracking
from runner.work import Options, SweepWork, read_secrets

logger = logging.getLogger(__name__)

JOB_GRACE_S = 2.0  # `ray job stop` kills three seconds after it has asked
GRACE_S = 30.0
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray in the entrypoint of a job


def run_sweep(spec: SweepSpec, options: Options) -> int:
    """Run every seed of spec that is not done, and return the exit code.

    Raises SweepError (a ValueError) when the directory is in use or belongs to another config, data or code.
    """
    if options.is_local:
        check_local_labels(spec)
        spec = replace(spec, gang=Gang(gpus=min(spec.gang.gpus, 1), cpus=spec.gang.cpus))
    if missing := missing_trackers(spec.track):
        raise SweepError(missing)
    if not (options.address or is_ray_job()):
        check_this_machine(spec, needs_gang=not options.is_local)
    read_secrets(spec)  # refused before anything starts
    directory = SweepDirectory(open_storage(spec.out))
    with signals_end(raise_interrupt), ExitStack() as at_end:
        check_writable(directory.storage)
        make_record(spec, directory, options)  # a run that is refused must not cost a living driver its lease
        try:
            if directory.acquire():
                time.sleep(yield_s(directory.storage))  # for the earlier driver's ranks to see that they are superseded
            with directory.writing_fenced():
                record = open_record(spec, directory, options)
                directory.clear_cancel_requests()
                runs = take_over(spec, directory, options.only)
                directory.write_state(spec.name, runs, time.time() - time.monotonic())
                return drive(spec, runs, directory, record, options, at_end)
        finally:
            directory.release()


def check_local_labels(spec: SweepSpec) -> None:
    """Raise SweepError if this machine, which has no label but that of its GPUs, is not what gang.require asks for."""
    here = this_machine()
    if not spec.gang.matches(here.labels):
        raise SweepError(f"--local runs on this machine: {why_infeasible([here], spec.gang)}")


def check_this_machine(spec: SweepSpec, *, needs_gang: bool = True) -> None:
    """Raise SweepError if this machine lacks packages, Infeasible, with missing data named too, if it holds no gang."""
    for variant in spec.variants if spec.program is None else ():
        if missing := missing_packages(variant.config, uses_gpus=spec.gang.gpus > 0):
            raise SweepError(missing)
    problem = why_infeasible([this_machine()], spec.gang) if needs_gang else ""
    if problem and not spec.limits.wait_s:
        raise Infeasible("; ".join([problem, *list_lacking(spec)]))


def list_lacking(spec: SweepSpec) -> list[str]:
    """Return one line for each thing that the sweep reads and this machine lacks."""
    return data_problems(spec.config.data) if spec.program is None else input_problems(spec.program.inputs)


def hash_what_is_read(spec: SweepSpec) -> str | None:
    """Return the hash of the sweep's data, or of the inputs of its program, None where that names none.

    Raises ValueError or FileNotFoundError if something is damaged, or missing.
    """
    if spec.program is None:
        return data_hash(spec.config.data, vocab_size=spec.config.model.vocab_size)
    return combine_inputs(hash_inputs(spec.program.inputs)) if spec.program.inputs else None


def hash_files_read(spec: SweepSpec) -> dict[str, Any]:
    """Return what the data hash is taken over, by file."""
    if spec.program is None:
        return data_files(spec.config.data, vocab_size=spec.config.model.vocab_size)
    return dict(hash_inputs(spec.program.inputs)) if not list_lacking(spec) else {}


def hash_code(spec: SweepSpec) -> str:
    """Return the hash of the sources that compute a score: ours, or those in the folder of a program."""
    return code_hash() if spec.program is None else folder_hash(program_files(spec))


def program_files(spec: SweepSpec) -> dict[str, str]:
    """Return the sha256 of each file in the folder of a sweep's program, {} where it has none."""
    if spec.program is None:
        return {}
    kept = kept_folder(open_storage(spec.out), spec.program.folder)
    return read_hashes(kept) if kept is not None else hash_files(find_files(Path(spec.program.folder)))


def make_record(spec: SweepSpec, directory: SweepDirectory, options: Options) -> dict[str, Any]:
    """Return what every run of the sweep records, checked against sweep.json; nothing is written.

    Raises Refused if the directory was made by another config, data set or code.
    """
    git = options.git or git_state()
    record: dict[str, Any] = {
        "format": FORMAT,
        "sweep": spec.name,
        "config_hash": spec.config_hash,
        **({"variants": spec.variant_hashes} if spec.ablation else {}),
        "data_hash": known_data_hash(spec, options),
        "code_hash": hash_code(spec),
        "git_commit": git.commit,
        "git_dirty": git.is_dirty,
        "versions": package_versions(),
        "world_size": spec.gang.world_size,
    }
    earlier = directory.read_json("sweep.json") or {}
    check_same(earlier, record, spec, directory.storage.shown, options)
    record["first_code_hash"] = earlier.get("first_code_hash", record["code_hash"])
    return record


def open_record(spec: SweepSpec, directory: SweepDirectory, options: Options) -> dict[str, Any]:
    """Check sweep.json against this sweep, or write it; return what every run of the sweep records.

    Raises Refused if the directory was made by another config, data set or code.
    """
    record, earlier = make_record(spec, directory, options), directory.read_json("sweep.json") or {}
    announced: dict[str, Any] = {"time": utc(time.time()), "seeds": list(spec.seeds), "repeats": spec.repeats}
    if spec.ablation:
        announced["variants"] = [variant.name for variant in spec.ablation]
    announcements = list(earlier.get("announcements", []))
    if not announcements or {**announcements[-1], "time": ""} != {**announced, "time": ""}:
        announcements.append(announced)
    files = hash_files_read(spec) if record["data_hash"] else {}
    is_ablation = bool(spec.ablation) or "variants" in earlier
    known = {**spec.variant_hashes, **recorded_variants(earlier)} if is_ablation else {}  # the baseline first
    whole = {
        **record,
        **({"variants": known} if known else {}),
        "machine": machine(),
        "spec": spec.to_json(),
        "data": files or earlier.get("data", {}),
        **({"program_files": program_files(spec)} if spec.program is not None else {}),
        "announcements": announcements,
    }
    directory.write_json("sweep.json", {**whole, "created": earlier.get("created", utc(time.time()))})
    return record


def known_data_hash(spec: SweepSpec, options: Options) -> str | None:
    """Return the hash of the sweep's data as this machine has it; None where only the cluster's nodes have it.

    Raises ValueError or FileNotFoundError if data is damaged, or missing where the work is done on this machine.
    """
    has_other_nodes = options.address is not None or is_ray_job() or spec.fetch is not None
    if has_other_nodes and list_lacking(spec):
        return None  # each gang's node is checked before the gang works
    return hash_what_is_read(spec)


def check_same(earlier: dict[str, Any], record: dict[str, Any], spec: SweepSpec, shown: str, options: Options) -> None:
    """Raise Refused, naming what differs, unless the directory is new or was made by this config, data and code."""
    recorded = recorded_variants(earlier)
    for variant, now in spec.variant_hashes.items():
        if recorded.get(variant, now) != now:
            words = f"configuration of variant {variant}" if spec.ablation else "configuration"
            why = variant_differences(variant, earlier, spec) or f"{recorded[variant][:12]}, now {now[:12]}"
            fix = "choose another --out" + ", or another name for it" * bool(spec.ablation)
            raise Refused(f"{shown} was made by another {words} ({why}); {fix}")
    before, now = earlier.get("data_hash"), record["data_hash"]
    if before and now and before != now:
        why = data_words(earlier.get("data") or {}, hash_files_read(spec)) or f"{before[:12]}, now {now[:12]}"
        raise Refused(f"{shown} was made by another data set ({why}); choose another --out")
    before, now = earlier.get("code_hash"), record["code_hash"]
    if before and before != now and not options.allow_code_change:
        made = f"was made by other code ({code_words(earlier, record)})"
        if spec.program is not None:
            old, new = earlier.get("program_files") or {}, program_files(spec)
            differing = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
            made = f"was made by other files in program.folder ({list_names(differing)})"
        raise Refused(f"{shown} {made}; choose another --out, or continue and mark the rows with --allow-code-change")


def recorded_variants(earlier: dict[str, Any]) -> dict[str, str]:
    """Return the hash of every variant that a run directory was ever driven with, by its name."""
    plain = {BASE: earlier["config_hash"]} if earlier.get("config_hash") else {}
    return dict(earlier.get("variants") or plain)


def variant_differences(variant: str, earlier: dict[str, Any], spec: SweepSpec) -> str:
    """Return in words how a variant differs from the one of that name in sweep.json, "" where that is not recorded."""
    recorded = earlier.get("spec") or {}
    configs = {item["name"]: item["config"] for item in recorded.get("ablation") or ()} or {
        BASE: recorded.get("config", {})
    }
    if spec.program is not None or recorded.get("program"):
        ours = {"program": spec.program.to_json() if spec.program is not None else None}
        return settings_words({"program": recorded.get("program")}, ours)
    if variant not in configs:
        return ""
    (now,) = (item.config for item in spec.variants if item.name == variant)
    return settings_words(
        {**configs[variant], "world_size": earlier.get("world_size")},
        {**plain_settings(now), "world_size": spec.gang.world_size},
    )


def announced_spec(out: str) -> SweepSpec:
    """Return the spec that a run directory was last driven with; a program that has moved is taken from its copy there.

    Raises FileNotFoundError if it is none, ValueError if the program is nowhere.
    """
    storage = open_storage(out)
    record = SweepDirectory(storage).read_json("sweep.json")
    if not record:
        raise FileNotFoundError(f"{storage.shown}: no sweep.json here; give the run directory of a sweep")
    spec = replace(SweepSpec.from_json(record["spec"]), out=absolute_path(out))
    if spec.program is None:
        return spec
    folder = find_folder(storage, spec.program.folder, str(record["code_hash"]))
    return replace(spec, program=replace(spec.program, folder=folder))


def drive(
    spec: SweepSpec, runs: list[Run], directory: SweepDirectory, record: dict[str, Any], options: Options,
    at_end: ExitStack,
) -> int:  # fmt: skip
    """Run the scheduler over a backend until every run is final.

    at_end: closes what may take long once the directory is given up.
    """
    if all(run.is_final for run in runs):
        directory.write_state(spec.name, runs, time.time() - time.monotonic())
        return exit_code({run.key: run for run in runs}, is_interrupted=False)
    if not options.is_local:
        keep_arrow_small()
    with open_backend(spec, options) as (backend, grace_s):
        is_endless = options.is_local and spec.program is None
        limits = replace(spec.limits, **LOCAL_LIMITS) if is_endless else spec.limits
        sweep = SweepWork(spec, record, options, directory)
        logger.info("sweep=%s runs=%d slots=%d", spec.name, len(runs), count_slots(backend.nodes(), spec.gang))
        tracking = at_end.enter_context(closing(open_tracking(spec, record)))
        view = open_view(options.progress, f"{spec.name} -> {spec.out}")
        views = Views([view, tracking, *open_metrics(spec, options)])
        board = open_board(options)
        scheduler = Scheduler(
            spec, runs, backend, directory, views, make_job=sweep.make_job, commit=sweep.commit, limits=limits,
            sharing=sweep.share_stages(runs), recorded_stages=sweep.recorded_stages, board=board,
            grace_s=spec.limits.stop_grace_s if spec.limits.stop_grace_s is not None else grace_s,
        )  # fmt: skip
        sweep.keep_program()
        sweep.leave_probe()
        try:
            with signals_end(scheduler.interrupt):
                final = scheduler.run()
        finally:
            sweep.remove_probe()
            view.close()
            if board is not None:
                board.close()
        refuse_split_storage(final)
        code = exit_code(final, is_interrupted=scheduler.is_interrupted)
        if code == EXIT_INFEASIBLE:
            raise Infeasible(scheduler.infeasible or "no node could hold a gang when these seeds were last run")
        return code


def open_board(options: Options) -> Board | None:
    """Return where the sweeps of a cluster tell each other who goes first; None where no other sweep can come."""
    if options.is_local or not (options.address or is_ray_job()):
        return None
    from runner.gang.ray_facts import RayStore

    return Board(RayStore())


def open_metrics(spec: SweepSpec, options: Options) -> list[View]:
    """Return the view that Prometheus reads through Ray, where there is Ray."""
    if options.is_local:
        return []
    from runner.gang.ray_metrics import RayMetrics

    return [RayMetrics(spec.name, gpus=spec.gang.gpus)]


def refuse_split_storage(runs: dict[RunKey, Run]) -> None:
    """Raise SweepError if a node did not see the driver's folder."""
    for run in runs.values():
        if run.failure is not None and run.failure.error_type == OutNotShared.__name__:
            raise SweepError(run.failure.message)


# A thread cannot be killed, so that limits which end in a kill do not apply to --local, where it runs our pipeline.
LOCAL_LIMITS: dict[str, Any] = {
    "start_s": float("inf"),
    "stall_s": float("inf"),
    "heartbeat_s": float("inf"),
    "seed_s": None,
}


@contextmanager
def open_backend(spec: SweepSpec, options: Options) -> Iterator[tuple[Backend, float]]:
    """Yield the backend, and the grace that stopping ranks get on it; whatever was started ends with the block."""
    if options.is_local:
        from runner.gang.local_backend import LocalBackend

        local = LocalBackend(spec.gang)
        try:
            yield local, GRACE_S
        finally:
            local.close()
        return
    address = options.address or ("auto" if is_ray_job() else None)
    if address is None:
        from runner.gang.ray_start import prepare_environment

        prepare_environment()  # before Ray is imported
    from runner.gang.ray_backend import RayBackend, connect, disconnect

    connect(address)
    try:
        backend = RayBackend(spec.gang)
        try:
            yield backend, JOB_GRACE_S if is_ray_job() else GRACE_S
        finally:
            backend.close()
    finally:
        disconnect()


def is_ray_job() -> bool:
    """Return whether this process is the entrypoint of a submitted job; only its environment says so."""
    return JOB_VARIABLE in os.environ
