"""One rank of a gang that runs somebody else's program, without torch: it prepares, starts, watches, and reads the end.

Rank 0 prepares for all and reads the results once every process has ended with 0. A gang whose program has its own
launcher has one process, rank 0's; the other ranks hold their GPUs and wait.
"""

from __future__ import annotations

import glob
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any, NamedTuple, TypeVar

from model.files.plain import read_json
from model.report import Interrupted
from runner.errors import Kind, NoRoomError, PreflightError, ProgramError
from runner.folder.program_end import read_end
from runner.folder.program_inputs import combine_inputs
from runner.folder.storage import LocalStorage
from runner.gang.attempt import GPU_SAMPLES, Room, name_shortage, note_attempt, save_samples, wait_for_room
from runner.gang.inquest import CRASHES, End, signal_name
from runner.gang.program_place import (
    TORCHRUN,
    Place,
    attempt_folder,
    check_inputs,
    find_command,
    find_python,
    gpus_of,
    hold_port,
    kept_environment,
    make_command,
    make_environment_of,
    make_folders,
    placeholders,
)
from runner.gang.rank import Rank
from runner.life.causes import last_words
from runner.life.job import Job
from runner.machine.environments import versions_in
from runner.machine.gpus import GpuWatch, query_gpus
from runner.machine.kept import Keeper, Output, size_of
from runner.provenance import PACKAGES, different_versions, machine, package_versions, settings
from runner.spec.program import Program, fill_pattern

LOOK_S = 0.2
READ_EVERY_S = 1.0
FULL_GRACE_S = 1.0  # from SIGTERM to SIGKILL, of a program that fills its disk
START_S = 60.0  # for a process to be started
MAX_USED_BYTES = 2 << 30  # of a GPU that counts as idle: an earlier gang's memory may take a moment to be given back
IDLE_WAIT_S = 30.0
MAX_NAME = 80  # of a command in a message
ROOT_CAUSE = re.compile(r"Root Cause.*?^\s*rank\s*:\s*(\d+).*?^\s*exitcode\s*:\s*(-?\d+)", re.DOTALL | re.MULTILINE)
FROM_TORCHRUN = re.compile(r"^[WE]\d{4} .*torch/distributed/elastic", re.MULTILINE)

T = TypeVar("T")


def run_program(rank: Rank) -> None:
    """Run this rank's part of a program. Raises ProgramError if it fails, PreflightError if the node is not fit."""
    job, program = rank.job, rank.job.program
    assert program is not None, job.key
    rank.report("start", 0, None, {})
    folder = attempt_folder(job)
    if rank.rank:
        await_file(rank, folder / ready_name(job))
        place = Place.read(folder / ready_name(job))
        if program.launcher == "none" and not is_finished(rank):
            run_process(rank, program, place)
        return
    if rank.mirror is not None:  # what counts is what the store has, whatever lies on this node
        in_background(rank, rank.mirror.fetch_all)
    if is_finished(rank):  # an earlier driver's gang ended, and was not committed any more
        announce(rank, Place(work=folder, out=folder, python="", port=0))
        return
    holder, port = hold_port()
    with holder:
        place, files, data_hash = prepare(rank, program, port)
        announce(rank, place)
        begun = time.monotonic()
        with watched_gpus(rank):
            run_process(rank, program, place)
            for other in range(1, job.world_size if program.launcher == "none" else 1):
                await_file(rank, folder / done_name(job, other))
        seconds = time.monotonic() - begun
    values = placeholders(job, place)
    end = in_background(rank, lambda: read_end(job, program, place.work, place.out, files, values))
    leave_record(rank, {**end.record, "data_hash": data_hash, "seconds": seconds}, end.steps)


def is_finished(rank: Rank) -> bool:
    """Return whether this very program has ended well in this run directory already."""
    path = Path(rank.job.workdir) / "stages" / "program.json"
    if not path.exists():
        return False
    try:
        record = read_json(path)
    except ValueError:
        return False
    names = ("config_hash", "code_hash", "data_hash")
    return all(record.get(name) == rank.job.record.get(name) for name in names if rank.job.record.get(name))


class Prepared(NamedTuple):
    """What rank 0 has laid out: where, the sha256 of the program's files, and of its inputs (None: it names none)."""

    place: Place
    files: dict[str, str]
    data_hash: str | None


def prepare(rank: Rank, program: Program, port: int) -> Prepared:
    """Check this node, lay out the attempt's folders, and note what it runs on."""
    job, host = rank.job, rank.node
    Path(job.workdir).mkdir(parents=True, exist_ok=True)
    versions = package_versions()
    differing = different_versions(job.record.get("versions", versions), versions)
    if differing and not program.requirements:
        raise PreflightError(f"node {host} has other package versions: {differing}")
    free = wait_for_room(rank)
    hardware = {**machine(), **gpu_facts(rank), "free_disk_bytes": free}
    rank.report("check", 0, None, {})  # what comes now depends on disk and network, and not on limits.start_s
    inputs = check_inputs(rank, program)
    work, hashes = make_folders(job, program)
    python = find_python(rank, program, work)
    if program.requirements:
        versions = {**versions_in(Path(python), PACKAGES), "seedsweep": versions["seedsweep"]}
    facts = {
        "versions": versions, "inputs": inputs, "files": hashes,
        "hardware": {**hardware, "settings": settings(kept_environment(os.environ))},
    }  # fmt: skip
    note_attempt(job, facts)
    if rank.mirror is not None:
        rank.mirror.put(Path(job.workdir) / "attempt.json")
    place = Place(work=work, out=work.with_name("out"), python=python, port=port)
    return Prepared(place, hashes, combine_inputs(inputs) if inputs else None)


def gpu_facts(rank: Rank) -> dict[str, Any]:
    """Return model and driver of the gang's GPUs, {} on CPU.

    Raises PreflightError if they are of different kinds, or if somebody else works on one of them for IDLE_WAIT_S.
    """
    if not rank.job.uses_gpus:
        return {}
    begun = time.monotonic()
    while True:
        gpus = query_gpus(gpus_of(rank))
        busy = next((gpu for gpu in gpus if gpu.used_bytes > MAX_USED_BYTES), None)
        if busy is None:
            break
        if time.monotonic() - begun > IDLE_WAIT_S:
            used = f"{busy.used_bytes / 1e9:.1f} GB are in use"
            raise PreflightError(f"GPU {busy.number} of node {rank.node} is not idle: {used}")
        time.sleep(1.0)
    models = sorted({gpu.model for gpu in gpus})
    if len(models) > 1:
        raise PreflightError(f"node {rank.node} has GPUs of different kinds: {', '.join(models)}")
    if not gpus:
        return {}
    return {"gpu_model": models[0], "num_gpus": len(gpus), "driver_version": gpus[0].driver}


@contextmanager
def watched_gpus(rank: Rank) -> Iterator[None]:
    """Sample clocks, power and throttle reasons of the gang's GPUs while the program trains."""
    path = Path(rank.job.workdir) / GPU_SAMPLES
    path.unlink(missing_ok=True)  # of an attempt that is no more
    if not rank.job.uses_gpus:
        yield
        return
    watch = GpuWatch(gpus_of(rank), lambda: rank.newest.step if rank.newest.phase == "train" else None)
    watch.thread.start()
    try:
        yield
    finally:
        if save_samples(watch, path) and rank.mirror is not None:
            rank.mirror.put(path)


def ready_name(job: Job) -> str:
    """Return the name of the file that says that rank 0 has prepared for this gang."""
    return f"ready-{job.token}.json"


def done_name(job: Job, rank: int) -> str:
    """Return the name of the file that says that the process of a rank of this gang has ended well."""
    return f"done-{job.token}-{rank}"


def announce(rank: Rank, place: Place) -> None:
    """Let the other ranks begin."""
    place.write(LocalStorage(attempt_folder(rank.job)), ready_name(rank.job))


def await_file(rank: Rank, path: Path) -> None:
    """Wait for another rank of this host. Raises Interrupted if the gang is to stop."""
    rank.wait(True)
    try:
        while not path.exists():
            if rank.should_stop():
                raise Interrupted(f"stopped while waiting for {path.name}")
            time.sleep(LOOK_S)
    finally:
        rank.wait(False)


def run_process(rank: Rank, program: Program, place: Place) -> None:
    """Run this rank's process to its end and leave nothing of it behind. Raises ProgramError unless it ends with 0."""
    job = rank.job
    env = make_environment_of(rank, program, place)
    command = find_command(make_command(job, program, place), env, place.work, rank.node)
    own = job.log_path(rank.rank)
    own.parent.mkdir(parents=True, exist_ok=True)
    output = Output(own, [job.log_path(other) for other in range(job.world_size) if other != rank.rank])
    output.skip(find_named(program.log, placeholders(job, place), place.work))
    keeper = rank.keeper = rank.keeper or Keeper(job.workdir)
    rank.report("train", 0, None, {})
    try:
        keeper.start(command, env, place.work, own)
        watch(rank, program, place, keeper, output)
        follow(rank, program, place, output)  # its last words
        judge(rank, command, keeper)
        check_length(job, output)
    finally:
        keeper.close()
    LocalStorage(attempt_folder(job)).write(done_name(job, rank.rank), b"")


def watch(rank: Rank, program: Program, place: Place, keeper: Keeper, output: Output) -> None:
    """Follow a process until it and all that it started are gone.

    Raises Interrupted if it was asked to stop; ProgramError if it prints too much and NoRoomError if its disk has too
    little room for too long, having ended it.
    """
    read_at, room = 0.0, Room(rank)
    while not keeper.is_over.wait(LOOK_S):
        if rank.should_stop():
            end_process(rank.job, keeper, output, rank.job.grace_s)
            raise Interrupted("the program was stopped")
        if keeper.has_ended.is_set():
            continue
        try:
            check_length(rank.job, output)
            if time.monotonic() - read_at >= READ_EVERY_S:
                read_at = time.monotonic()
                follow(rank, program, place, output)
                with suppress(OSError):  # a filesystem that does not answer now is none that is full
                    room.is_short()
        except (ProgramError, NoRoomError):
            end_process(rank.job, keeper, output, FULL_GRACE_S)
            raise


def end_process(job: Job, keeper: Keeper, output: Output, grace_s: float) -> None:
    """End a process and all that it started; one that prints too much meanwhile is left no more time."""
    keeper.stop(grace_s)
    while not keeper.is_over.wait(LOOK_S):
        if output.longer_than(job.log_bytes) is not None:
            keeper.close()


def check_length(job: Job, output: Output) -> None:
    """Raise ProgramError, which no further attempt mends, if what is printed or logged is longer than it may be."""
    path = output.longer_than(job.log_bytes)
    if path is not None:
        name, size = os.path.relpath(path, job.workdir), size_of(path)
        words = f"{name} has {size} bytes, more than limits.log_bytes={job.log_bytes}"
        raise ProgramError(f"{words}; let the program print less, or raise limits.log_bytes", kind=Kind.USER)


def follow(rank: Rank, program: Program, place: Place, output: Output) -> None:
    """Note how far the program is: by its newest lines, else by its output growing.

    What any rank prints counts for all: most programs let rank 0 speak alone.
    """
    from results.findings.program import read_progress

    if not output.has_grown(find_named(program.log, placeholders(rank.job, place), place.work)):
        return
    newest, seen = read_progress(output.new_lines()), rank.newest
    if newest is None:
        rank.report(seen.phase, seen.step, seen.total, {**seen.metrics, "output_bytes": sum(output.sizes.values())})
        return
    step = rank.newest.step if newest.step is None else newest.step
    total = rank.newest.total if newest.step is None else newest.total
    phase = "evaluate" if newest.is_score else "train"
    rank.report(phase, step, total, newest.metrics)


def find_named(patterns: Sequence[str], values: Mapping[str, str], work: Path) -> list[Path]:
    """Return the files that patterns name from the working folder on, or as whole paths once they are filled in."""
    filled = [fill_pattern(pattern, values) for pattern in patterns]
    return [work / name for pattern in filled for name in glob.glob(pattern, root_dir=work, recursive=True)]


def judge(rank: Rank, command: Sequence[str], keeper: Keeper) -> None:
    """Raise ProgramError unless a process has ended with 0."""
    refused, status = keeper.answer("error"), keeper.answer("ended")
    if refused:
        raise ProgramError(f"the program could not be started: {refused}")
    if keeper.answer("stuck"):
        raise ProgramError(f"processes of the program could not be ended: {keeper.answer('stuck')}")
    left = keeper.answer("left")
    if left:
        note = LocalStorage(attempt_folder(rank.job))
        note.write(f"left-{rank.rank}", str(left).encode())
    if status == 0:
        return
    is_signal = status is None or os.WIFSIGNALED(status)
    raise ProgramError(
        describe_end(command, status, rank.log_tail()), at=keeper.answer("at"),
        kind=Kind.DIED if is_signal else Kind.RAISED, advice=advise(status) or name_shortage(rank),
    )  # fmt: skip


def describe_end(command: Sequence[str], status: int | None, tail: str) -> str:
    """Return in one line how a process ended that did not end well; of torchrun's ranks the one that failed first."""
    name = " ".join([PurePath(command[0]).name, *command[1:2]])[:MAX_NAME]
    words = End(status=status).words or "was ended, because the process that keeps it was killed"
    root = ROOT_CAUSE.search(tail)
    if TORCHRUN in command and root is not None:
        code = int(root[2])
        name, words = (
            "torchrun",
            f"saw rank {root[1]} " + (f"killed by {signal_name(-code)}" if code < 0 else f"exit with code {code}"),
        )
        tail = FROM_TORCHRUN.split(tail)[0]
    last = last_words(tail)
    return f"{name} {words}" + f", last in its log: {last!r}" * bool(last)


def advise(status: int | None) -> str:
    """Return what to do about a program that was ended by a signal; its log says what another end means."""
    name = signal_name(status & 0x7F) if status is not None and os.WIFSIGNALED(status) else ""
    if name in CRASHES:
        return "compiled code crashed, or it was aborted: see the end of the log"
    return (
        "somebody or a memory limit killed it: see the system's log of that node (dmesg)" if name == "SIGKILL" else ""
    )


def in_background(rank: Rank, work: Callable[[], T]) -> T:
    """Return what work returns, done beside this thread, which says meanwhile that it goes on: logs may be long."""
    found: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="read-program", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(LOOK_S)
        rank.tick()
    if failed:
        raise failed[0]
    return found[0]


def leave_record(rank: Rank, record: dict[str, Any], steps: dict[str, Any]) -> None:
    """Leave what the driver commits: the curve, then the record, which says that the run is finished."""
    import io

    import numpy as np

    storage = LocalStorage(Path(rank.job.workdir))
    paths = []
    (Path(rank.job.workdir) / "steps.npz").unlink(missing_ok=True)
    if steps:
        buffer = io.BytesIO()
        np.savez(buffer, **steps)
        storage.write("steps.npz", buffer.getvalue())
        paths.append("steps.npz")
    paths += [name for name in record["outputs"] if (Path(rank.job.workdir) / name).is_file()]
    storage.write("stages/program.json", json.dumps(record, indent=1, default=str).encode() + b"\n")
    if rank.mirror is not None:
        for name in (*paths, "stages/program.json"):
            rank.mirror.put(Path(rank.job.workdir) / name)
