"""What can be learned of a rank from outside, when it hangs or has died: stacks, how it ended, the end of its log.

Runs as a task of its own on the gang's node, so that neither a stuck interpreter nor a lost process is in its way.
Stacks are asked for only when the gang is to be killed anyway: who walks the stacks of running threads may fall.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from runner.folder.mirror import open_mirror
from runner.gang.rank import Rank
from runner.life.job import Job
from runner.machine.keeper import descendants
from runner.machine.kept import size_of

STACKS_SIGNAL = signal.SIGUSR2
STACKS_NAME = "seedsweep-stacks"
ANSWER_S = 2.0  # for a process to write its stacks
QUIET_S = 0.2  # without a further line they are complete
NOTE_S = 2.0  # for the note of a death to be written
ABORT_S = 2.0  # for the processes of a program to write their stacks
MAX_STACKS = 1 << 20  # bytes, of a program that goes on printing
CRASHES = frozenset({"SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGTRAP", "SIGSYS"})


@dataclass(frozen=True, kw_only=True, slots=True)
class End:
    """How a rank's process ended, as far as its node can tell."""

    status: int | None = None  # as wait gives it
    num_oom_kills: int = 0  # on that node, while the rank lived
    at: float = 0.0  # seconds since 1970
    log_tail: str = ""

    @property
    def words(self) -> str:
        """Return the end in words, "" where nothing is known."""
        if self.status is None:
            return ""
        code = os.waitstatus_to_exitcode(self.status)
        return f"killed by {signal_name(-code)}" if code < 0 else f"exited with code {code}"

    @property
    def advice(self) -> str:
        """Return what to do about it."""
        if self.status is None:
            return "see the end of the log, and the system's log of that node"
        name = signal_name(self.status & 0x7F) if os.WIFSIGNALED(self.status) else ""
        if name == "SIGKILL" and self.num_oom_kills:
            return "the node ran out of memory: ask for more of it, or lower train.micro_batch_tokens"
        if name == "SIGKILL":
            return "somebody or a memory limit killed it: see the system's log of that node (dmesg)"
        if name in CRASHES:
            return "compiled code crashed: the log ends with its stacks"
        return "it was told to end from outside" if name else "something in it called exit: see the end of the log"


def signal_name(number: int) -> str:
    """Return a signal's name, its number where it has none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def listen_for_stacks() -> tuple[int, IO[bytes]] | None:
    """Let STACKS_SIGNAL write this process's stacks into memory that `write_stacks` reads; None off Linux.

    The handler is C and needs no interpreter: a process that is stuck in compiled code answers too.
    """
    if not hasattr(os, "memfd_create"):
        return None
    file = os.fdopen(os.memfd_create(STACKS_NAME), "wb", buffering=0)
    faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True)
    return file.fileno(), file


def start_watch(path: Path) -> subprocess.Popen[bytes]:
    """Start the process that notes in path how this one ends; a line to its input calls it off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # of an attempt of the same number, in a sweep whose folder was emptied
    script = Path(__file__).with_name("watch.py")
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(script), str(os.getpid()), str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def call_off(watch: subprocess.Popen[bytes]) -> None:
    """Tell a watch that the work is over, without waiting for it: on a busy machine its end takes seconds."""
    if watch.stdin is not None:
        with contextlib.suppress(BrokenPipeError), watch.stdin:
            watch.stdin.write(b"over")


def write_stacks(job: Job, ranks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write the stacks of every rank into files of their own and return the files; ranks as `hello` described them."""
    if job.program is not None:
        return write_program_stacks(job, ranks)
    asked = [(facts, ask_for_stacks(facts)) for facts in ranks]
    paths = []
    for facts, file in asked:
        path = job.stacks_path(int(facts["rank"]))
        path.parent.mkdir(parents=True, exist_ok=True)
        head = f"rank {facts['rank']} pid {facts['pid']} at {time.strftime('%FT%TZ', time.gmtime())}\n"
        stacks = read_answer(file) if file is not None else b""
        path.write_bytes(head.encode() + (stacks or what_the_system_says(int(facts["pid"])).encode()))
        paths.append(str(path))
    put_logs(job)
    return paths


def write_program_stacks(job: Job, ranks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Abort the processes of a program, so that Python's write their stacks into its log, and keep what they wrote.

    They are to be killed anyway. A process that is no Python shows its threads as the system sees them.
    """
    begun = time.monotonic()
    before = {int(facts["rank"]): size_of(job.log_path(int(facts["rank"]))) for facts in ranks}
    seen = {}
    for facts in ranks:
        pids = descendants(int(facts["keeper"])) if facts.get("keeper") else []
        seen[int(facts["rank"])] = "".join(f"pid {pid}: {threads_of(pid)}" for pid in pids)
        for pid in pids:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGABRT)
                os.kill(pid, signal.SIGCONT)
    time.sleep(max(0.0, ABORT_S - (time.monotonic() - begun)))
    paths = []
    for rank, size in before.items():
        with contextlib.suppress(OSError), job.log_path(rank).open("rb") as file:
            file.seek(size)
            path = job.stacks_path(rank)
            path.write_text(f"{seen[rank]}{job.redact(file.read(MAX_STACKS).decode(errors='replace'))}")
            paths.append(str(path))
    put_logs(job)
    return paths


def ask_for_stacks(facts: Mapping[str, Any]) -> IO[bytes] | None:
    """Ask a process for its stacks and return where they will be; None where it cannot be asked."""
    pid, descriptor = int(facts["pid"]), facts.get("stacks_fd")
    place = f"/proc/{pid}/fd/{descriptor}"
    try:
        if descriptor is None or STACKS_NAME not in os.readlink(place):
            return None
        file = open(place, "rb")  # noqa: SIM115  it outlives this call, and the process
        os.kill(pid, STACKS_SIGNAL)
        os.kill(pid, signal.SIGCONT)  # one that was stopped answers as soon as it goes on
    except OSError:
        return None
    return file


def read_answer(file: IO[bytes]) -> bytes:
    """Return what a process wrote, once it writes no more; b"" if it wrote nothing within ANSWER_S."""
    begun = quiet_since = time.monotonic()
    size = 0
    with file:
        while time.monotonic() - begun < ANSWER_S and (not size or time.monotonic() - quiet_since < QUIET_S):
            time.sleep(0.02)
            if (now := os.fstat(file.fileno()).st_size) != size:
                size, quiet_since = now, time.monotonic()
        return file.read()


def what_the_system_says(pid: int) -> str:
    """Return where the system sees each thread of a process that does not answer."""
    return "it did not answer; " + threads_of(pid)


def threads_of(pid: int) -> str:
    """Return the threads of a process with where the system sees each of them, a line each."""
    lines = ["its threads as the system sees them:"]
    for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
        words = []
        for name in ("comm", "wchan"):
            with contextlib.suppress(OSError):
                words.append((task / name).read_text().strip())
        with contextlib.suppress(OSError, IndexError):
            words.append((task / "stat").read_text().rpartition(")")[2].split()[0])
        lines.append(f"  {task.name} {' '.join(words)}")
    return "\n".join(lines if len(lines) > 1 else ["its process is gone"]) + "\n"


def learn_ends(job: Job, ranks: Sequence[Mapping[str, Any]]) -> dict[int, End]:
    """Return by its number how each of these ranks ended, and put their node's logs into the store.

    ranks: as `hello` described them; one that is_dead says still lives is left out.
    """
    ends = {}
    for rank in (int(facts["rank"]) for facts in ranks if facts.get("is_dead", True)):
        path, begun = job.end_path(rank), time.monotonic()
        while not path.exists() and time.monotonic() - begun < NOTE_S:
            time.sleep(0.05)
        try:
            note = json.loads(path.read_text())
        except (OSError, ValueError):
            note = {}
        ends[rank] = End(
            status=note.get("status"),
            num_oom_kills=note.get("num_oom_kills", 0),
            at=note.get("at", 0.0),
            log_tail=Rank(job, rank).log_tail(),
        )
    put_logs(job)
    return ends


def put_logs(job: Job) -> None:
    """Copy the logs to where the sweep lies; an object store that refuses them must not hide what was learned."""
    with contextlib.suppress(OSError):
        mirror = open_mirror(job.out, job.key.name, Path(job.workdir))
        if mirror is not None:
            mirror.put_logs()
