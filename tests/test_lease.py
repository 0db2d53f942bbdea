"""The lease of a sweep's folder: drivers that are suspended, woken, killed, or whose clocks are wrong."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.files.atomic import remove_file, replace_file
from runner.errors import DirectoryInUse, Superseded
from runner.folder import fence
from runner.folder import lease as lease_module
from runner.folder.directory import SweepDirectory
from runner.folder.fence import fenced, take_place
from runner.folder.lease import LEASE, LEASE_TTL_S, Lease, Owner, process_start
from runner.folder.storage import LocalStorage

ROOT = Path(__file__).parents[1]
EXIT_SUPERSEDED = 3  # of a rank, in runner/gang/ray_rank.py, which needs Ray


@dataclass
class World:
    """Drivers on hosts of their own, one folder in memory, one true clock. Any access may let another driver act."""

    plan: list[tuple[int, str]]
    skews: list[float]
    now: float = 1_000_000.0
    files: dict[str, bytes] = field(default_factory=dict)
    drivers: list[Driver] = field(default_factory=list)
    shown: str = "memory"
    is_exclusive: bool = True
    depth: int = 0

    def let_others_act(self) -> None:
        """Whoever is at work is suspended here while the next of the plan acts."""
        if self.plan and self.depth < 4:
            self.depth += 1
            number, action = self.plan.pop()
            self.now += {"wait": 5.0, "sleep": LEASE_TTL_S + 5.0}.get(action, 0.1)
            driver = self.drivers[number % len(self.drivers)]
            if not driver.is_busy:
                driver.act(action)
            self.depth -= 1

    def read(self, path: str) -> bytes:
        self.let_others_act()
        if path not in self.files:
            raise FileNotFoundError(path)
        return self.files[path]

    def write(self, path: str, content: bytes) -> None:
        self.let_others_act()
        self.files[path] = content

    def create(self, path: str, content: bytes) -> bool:
        self.let_others_act()
        return self.files.setdefault(path, content) is content

    def append(self, path: str, content: bytes) -> None:
        self.write(path, self.files.get(path, b"") + content)

    def names(self, folder: str) -> list[str]:
        self.let_others_act()
        return sorted(name.removeprefix(f"{folder}/") for name in self.files if name.startswith(f"{folder}/"))

    def remove(self, path: str) -> None:
        self.let_others_act()
        self.files.pop(path, None)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.let_others_act()


class Driver:
    """One driver of the world; it notes when it found that the folder is its own."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.is_busy, self.is_dead, self.tokens = world, False, False, 0
        self.number = number
        self.lease = self.make_lease()

    def make_lease(self) -> Lease:
        world, skew = self.world, self.world.skews[self.number % len(self.world.skews)]
        return Lease(
            world, me=self.me, wall=lambda: world.now + skew, clock=lambda: world.now, sleep=world.sleep,
            lives=lambda _owner: None,
        )  # fmt: skip

    def me(self) -> Owner:
        self.tokens += 1
        return Owner(
            host=f"host{self.number}", boot="b", pid=1, started=1, token=f"{self.number}.{self.tokens}", beat=0.0
        )

    def act(self, action: str) -> None:
        """Do one thing, during which others may act."""
        self.is_busy = True
        try:
            if action == "kill":
                self.lease = self.make_lease()  # a new process on the same host knows nothing of the old one
            elif action == "release":
                self.leave()
            elif self.lease.owner is None:
                self.lease.acquire()
            else:
                self.lease.beat(force=True)
        except Superseded:
            self.leave()  # as a driver ends that finds itself ousted
        except DirectoryInUse:
            pass
        finally:
            self.is_busy = False

    def leave(self) -> None:
        """Release, and check that no other driver's claim was touched."""
        mine = self.lease.owner
        self.lease.release()
        assert mine is None or self.lease.owner is None


ACTIONS = st.sampled_from(["step", "step", "wait", "sleep", "kill", "release"])


@settings(max_examples=500, deadline=None)
@given(
    plan=st.lists(st.tuples(st.integers(0, 2), ACTIONS), max_size=60),
    skews=st.lists(st.floats(-300, 300), min_size=1, max_size=3),
    num_drivers=st.integers(2, 3),
)
def test_at_most_one_driver_acts_after_a_renewal_and_a_release_takes_nobody_elses_lease(
    plan: list[tuple[int, str]], skews: list[float], num_drivers: int
) -> None:
    world = World(plan, skews)
    world.drivers = [Driver(world, number) for number in range(num_drivers)]
    while world.plan:
        world.let_others_act()
    owners = [driver for driver in world.drivers if driver.lease.owner is not None]
    epochs = [driver.lease.owner.epoch for driver in owners if driver.lease.owner is not None]
    assert len(set(epochs)) == len(epochs)  # the fencing numbers tell them apart
    newest = max(owners, key=lambda driver: epochs[owners.index(driver)], default=None)
    for driver in owners:
        if driver is not newest:
            with pytest.raises(Superseded):
                driver.lease.beat(force=True)
            driver.lease.release()
    if newest is not None and max(newest.lease.epochs()) == max(epochs):
        newest.lease.beat(force=True)  # whoever left before it, it goes on
        assert LEASE in world.files


def acquired(root: Path) -> SweepDirectory:
    """Return a folder taken by a driver of this process, as by one on another host."""
    directory = SweepDirectory(LocalStorage(root))
    directory.acquire()
    return directory


def look_elsewhere(directory: SweepDirectory, *, silent_s: float) -> None:
    """Let the owner look as if it were on another host and silent for so long."""
    assert directory.owner is not None
    beat = directory.owner.beat - silent_s
    directory.lease.owner = replace(directory.owner, host="elsewhere", beat=beat)
    directory.write_json(LEASE, dataclasses.asdict(directory.lease.owner))
    directory.write_json("heartbeat.json", {"token": directory.owner.token, "beat": beat})


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watch a silent driver for a moment only."""
    monkeypatch.setattr(lease_module, "WATCH_S", 0.5)


@pytest.mark.usefixtures("quick")
def test_a_woken_driver_leaves_its_successors_lease_alone(tmp_path: Path) -> None:
    first = acquired(tmp_path)
    look_elsewhere(first, silent_s=100)
    second = SweepDirectory(LocalStorage(tmp_path))
    assert second.acquire()  # nobody saw the first one dead: its gangs may be at work
    with pytest.raises(Superseded, match="taken over"):
        first.beat(force=True)
    first.release()
    second.beat(force=True)
    assert second.driver_is_alive()
    second.release()
    assert not (tmp_path / LEASE).exists()


@pytest.mark.usefixtures("quick")
def test_a_lease_taken_along_by_a_leaving_driver_is_put_back(tmp_path: Path) -> None:
    directory = acquired(tmp_path)
    (tmp_path / LEASE).unlink()
    with pytest.raises(DirectoryInUse):
        SweepDirectory(LocalStorage(tmp_path)).acquire()
    directory.beat(force=True)
    assert (tmp_path / LEASE).exists()


def write_slowly(path: Path, meanwhile: Callable[[], object]) -> None:
    """Write a file, with something happening before the last of it is on the disk."""
    with replace_file(path) as file:
        file.write(b"late")
        meanwhile()


@pytest.mark.usefixtures("quick")
def test_nothing_of_an_ousted_driver_reaches_the_folder(tmp_path: Path) -> None:
    first, second = acquired(tmp_path), SweepDirectory(LocalStorage(tmp_path))
    look_elsewhere(first, silent_s=100)
    with first.writing_fenced():
        first.write_json("state.json", 1)
        with pytest.raises(OSError, match="another driver"):
            write_slowly(tmp_path / "late", second.acquire)
        with pytest.raises(OSError, match="another driver"):
            first.write_json("state.json", 2)
    assert second.read_json("state.json") == 1
    assert not (tmp_path / "late").exists()


def test_a_living_driver_on_a_host_with_another_clock_is_seen_by_its_moving_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = acquired(tmp_path)
    look_elsewhere(first, silent_s=100)
    assert first.owner is not None
    token, beats = first.owner.token, iter(range(100))

    def beat_meanwhile(_seconds: float) -> None:
        first.write_json("heartbeat.json", {"token": token, "beat": next(beats)})

    second = SweepDirectory(LocalStorage(tmp_path))
    second.lease = Lease(second.storage, sleep=beat_meanwhile)
    with pytest.raises(DirectoryInUse, match="elsewhere"):
        second.acquire()


def test_a_fresh_heartbeat_counts_whatever_the_pid_says() -> None:
    me = Owner.me()
    gone = replace(me, pid=2**22 + 1, is_heard=True)
    assert gone.process_lives() is False
    assert gone.is_alive(me.beat + LEASE_TTL_S / 2)
    assert not gone.is_alive(me.beat + LEASE_TTL_S + 1)
    other_container = replace(me, namespace="pid:[1]", is_heard=True)
    assert other_container.process_lives() is None
    assert replace(me, is_heard=True).is_alive(me.beat + 10 * LEASE_TTL_S)  # stopped, but there
    assert process_start(os.getpid()) == me.started


@pytest.mark.usefixtures("quick")
def test_a_killed_drivers_folder_is_taken_once_its_heartbeat_stands_still(tmp_path: Path) -> None:
    directory = acquired(tmp_path)
    assert directory.owner is not None
    directory.write_json(LEASE, dataclasses.asdict(replace(directory.owner, pid=2**22 + 1)))
    assert not SweepDirectory(LocalStorage(tmp_path)).acquire()  # a killed driver's gangs end with it


@pytest.mark.usefixtures("quick")
def test_a_driver_that_is_suspended_here_is_replaced_once_its_lease_is_over(tmp_path: Path) -> None:
    directory, process = acquired(tmp_path), subprocess.Popen(["sleep", "600"])
    assert directory.owner is not None
    owner = replace(directory.owner, pid=process.pid, started=process_start(process.pid) or 0)

    def acquire(*, silent_s: float) -> bool:
        directory.write_json(LEASE, dataclasses.asdict(owner))
        directory.write_json("heartbeat.json", {"token": owner.token, "beat": time.time() - silent_s})
        return SweepDirectory(LocalStorage(tmp_path)).acquire()

    try:
        with pytest.raises(DirectoryInUse):
            acquire(silent_s=LEASE_TTL_S + 9)  # it is awake, and may be unable to write
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        with pytest.raises(DirectoryInUse):
            acquire(silent_s=LEASE_TTL_S - 9)
        assert acquire(silent_s=LEASE_TTL_S + 9)  # its ranks may be at work
    finally:
        process.kill()
        process.wait()


def test_a_late_rank_cannot_replace_or_remove_what_the_next_gang_writes(tmp_path: Path) -> None:
    workdir = tmp_path / "seeds" / "seed=1-repeat=0"
    output = workdir / "stages" / "train.json"
    with fenced(str(tmp_path), workdir, epoch=1, attempt=1, is_writer=True, on_superseded=lambda: None):
        with replace_file(output) as file:
            file.write(b"first")
        with pytest.raises(OSError, match="another driver or attempt"):
            write_slowly(output, lambda: take_place(workdir, 1, 2))  # the next gang begins
        for late in (lambda: remove_file(output), lambda: write_slowly(output, list)):
            with pytest.raises(OSError, match="another driver or attempt"):
                late()
    assert output.read_bytes() == b"first"


def start_fenced(root: Path, told: threading.Event, seconds: float, has_begun: Callable[[], object] = list) -> None:
    """Be a rank of the driver with epoch 1 for a while, or until it is told of a newer one."""
    with fenced(str(root), root / "seed", epoch=1, attempt=1, is_writer=False, on_superseded=told.set):
        has_begun()
        told.wait(seconds)


def test_a_rank_ends_by_itself_once_another_driver_has_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fence, "LOOK_EVERY_S", 0.02)
    storage, told, is_at_work = LocalStorage(tmp_path), threading.Event(), threading.Event()
    storage.write("drivers/1.json", b"{}")
    start_fenced(tmp_path, told, 0.1)
    assert not told.is_set()
    rank = threading.Thread(target=start_fenced, args=(tmp_path, told, 30.0, is_at_work.set))
    rank.start()
    assert is_at_work.wait(30.0)
    storage.write("drivers/2.json", b"{}")
    rank.join()
    assert told.is_set()
    with pytest.raises(Superseded):
        start_fenced(tmp_path, told, 0.0)


WAITING_RANK = """
import sys, time
from pathlib import Path
from model.presets import tiny
from runner.gang.ray_rank import RankActor
from runner.life.job import Job
from runner.spec.sweep import RunKey

out, call = sys.argv[1:]
job = Job(
    key=RunKey(seed=1), attempt=1, config=tiny(), world_size=1, threads=1, uses_gpus=False, workdir=f"{out}/{call}",
    out=out, target="builtins:repr", epoch=1,
)
rank = RankActor(out, 1)
rank.hello = lambda: {}  # there is no Ray here
if call != "made":
    rank.begin(job, 0, "127.0.0.1")
if call == "worked":
    rank.run()
Path(out, f"{call}-waits").touch()
time.sleep(60)
"""


def test_a_rank_without_work_ends_too_once_another_driver_has_come(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.write("drivers/1.json", b"{}")
    calls = ("made", "greeted", "worked")  # by a driver that was suspended before the job, the work, or its end
    ranks = [subprocess.Popen([sys.executable, "-c", WAITING_RANK, str(tmp_path), call], cwd=ROOT) for call in calls]
    try:
        deadline = time.monotonic() + 60
        while not all((tmp_path / f"{call}-waits").exists() for call in calls):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert [rank.poll() for rank in ranks] == [None] * 3
        storage.write("drivers/2.json", b"{}")
        assert [rank.wait(timeout=30) for rank in ranks] == [EXIT_SUPERSEDED] * 3
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def test_a_newer_claim_alone_stops_the_earlier_driver(tmp_path: Path) -> None:
    directory = acquired(tmp_path)
    (tmp_path / LEASE).unlink()
    directory.storage.write("drivers/2.json", b"{}")
    with pytest.raises(Superseded):
        directory.beat(force=True)
