"""Ray is started and reached in bounded time, with one line where that fails; nothing here starts a cluster."""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from runner.errors import SweepError
from runner.gang import ray_start
from runner.gang.ray_start import LOCK_NAME, PREFIX, RayDown, answer_of, check_address, end_child, python_for


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let sessions live below the test's own folder."""
    monkeypatch.setattr(ray_start, "session_base", lambda: tmp_path)
    return tmp_path


def child(code: str, cwd: Path | None = None) -> subprocess.Popen[bytes]:
    """Start Python with pipes, as a child that speaks for Ray has them."""
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=cwd)


def test_a_port_where_nobody_listens_is_refused_at_once() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: nobody else can take it meanwhile
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        begun = time.monotonic()
        with pytest.raises(SweepError, match=f"--address {address}: no Ray cluster answers there .*refused"):
            check_address(address)
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("address", ["", "a b:1", "127.0.0.1:6379,127.0.0.1:6380"])
def test_what_is_no_address_is_refused_without_a_try(address: str) -> None:
    with pytest.raises(SweepError, match="is no address; write host:port"):
        check_address(address)


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_start, "TRY_S", 0.5)
    monkeypatch.setattr(ray_start, "GIVE_UP_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(SweepError, match="no answer within 0 s"):
            check_address(address)


def test_an_abort_of_ray_ends_the_child_and_is_one_line() -> None:
    process = child("import os; os.abort()")
    with pytest.raises(RayDown, match="Ray ended the process, exit code -6"):
        answer_of(process, 30.0)
    end_child(process)


def test_a_child_that_will_not_end_is_killed_with_what_it_started() -> None:
    sleeper = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '600']); "
    process = child(sleeper + "print(p.pid, flush=True); time.sleep(600)")
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    end_child(process, 0.1)
    assert process.returncode == -9
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{pid}") and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline, "what the child started is left"
        time.sleep(0.05)


def test_ray_is_tried_twice_and_its_logs_are_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []

    def start_child(arguments: list[str], folder: Path) -> subprocess.Popen[bytes]:
        starts.append(folder)
        return child("""print('{"error": "the agent is slow"}', flush=True)""")

    monkeypatch.setattr(ray_start, "start_child", start_child)
    monkeypatch.setattr(ray_start, "prepare_environment", lambda: None)
    with pytest.raises(SweepError) as caught:
        ray_start.start_cluster(1)
    assert len(starts) == 2
    assert "did not start on this machine in 2 tries (the agent is slow)" in str(caught.value)
    assert str(starts[-1]) in str(caught.value)
    assert "--local" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ctrl_c_while_ray_starts_leaves_no_child(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes: list[subprocess.Popen[bytes]] = []

    def start_child(*_: Any) -> subprocess.Popen[bytes]:
        processes.append(child("import time; time.sleep(600)"))
        return processes[-1]

    def interrupt(*_: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(ray_start, "start_child", start_child)
    monkeypatch.setattr(ray_start, "answer_of", interrupt)
    monkeypatch.setattr(ray_start, "GIVE_UP_S", 0.1)
    with pytest.raises(KeyboardInterrupt):
        ray_start.Cluster(1)
    assert processes[0].poll() is not None


@pytest.mark.parametrize("name", ["my env", "env(1)", "a&b", "it's", "$HOME", "a;b"])
def test_ray_is_given_an_interpreter_that_a_shell_can_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    prefix, folder = tmp_path / name, tmp_path / "session"
    (prefix / "bin").mkdir(parents=True)
    folder.mkdir()
    (prefix / "bin" / "python").write_text("#!/bin/sh\necho here\n")
    (prefix / "bin" / "python").chmod(0o755)
    monkeypatch.setattr(sys, "prefix", str(prefix))
    monkeypatch.setattr(sys, "executable", str(prefix / "bin" / "python"))
    done = subprocess.run(f"exec {python_for(folder)}", shell=True, capture_output=True, text=True, check=True)
    assert done.stdout == "here\n"


def test_an_interpreter_with_a_plain_path_is_taken_as_it_is(tmp_path: Path) -> None:
    assert python_for(tmp_path) == sys.executable
    assert list(tmp_path.iterdir()) == []


def test_a_long_temporary_folder_gives_way_and_a_long_named_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(long))
    assert ray_start.session_base() == Path("/tmp")
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with pytest.raises(SweepError, match=r"has \d+ characters, sockets leave room for \d+\); name .* in RAY_TMPDIR"):
        ray_start.session_base()


def test_only_dead_sessions_of_ours_are_removed(base: Path) -> None:
    names = {name: base / f"{PREFIX}{name}" for name in ("deaddead", "heldheld", "newnewne", "nolockno", "linklink")}
    for name, folder in names.items():
        if name == "linklink":
            folder.symlink_to(base / "elsewhere")
            continue
        folder.mkdir()
        if name != "nolockno":
            (folder / LOCK_NAME).touch()
    (base / "elsewhere").mkdir()
    (base / "elsewhere" / LOCK_NAME).touch()
    old = time.time() - 2 * ray_start.LEFTOVER_S
    for name in ("deaddead", "heldheld", "nolockno"):
        os.utime(names[name], (old, old))
    with (names["heldheld"] / LOCK_NAME).open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        ray_start.remove_leftovers()
    assert {path.name for path in base.iterdir()} == {
        "elsewhere", *(path.name for name, path in names.items() if name != "deaddead"),
    }  # fmt: skip


def test_a_user_without_a_home_or_token_gets_one_for_this_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        *ray_start.TOKEN_VARIABLES,
        ray_start.MODE_VARIABLE,
        ray_start.LOOPBACK_VARIABLE,
        ray_start.PRIORITY_VARIABLE,
    ):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(ray_start.sys, "modules", {})
    monkeypatch.setattr(ray_start, "home_token", lambda: None)
    ray_start.prepare_environment()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ[ray_start.PRIORITY_VARIABLE] == "0"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / "token").write_text("t")
    monkeypatch.setattr(ray_start, "home_token", lambda: tmp_path / "token")
    ray_start.prepare_environment()
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_the_holder_notices_its_drivers_end() -> None:
    code = (
        "import threading, time; from runner.gang import ray_head; ray_head.ORPHAN_S = 0.1; "
        "threading.Thread(target=ray_head.wait_for_driver_end, args=(threading.Event(),)).start(); "
        "print('waits', flush=True); time.sleep(600)"
    )
    process = child(code, cwd=Path(__file__).parent.parent)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"waits\n"
    process.stdin.close()
    assert process.wait(60) == 1
    process.stdout.close()


def test_a_session_whose_driver_is_killed_while_ray_starts_is_removed(tmp_path: Path) -> None:
    code = f"""
import os, select, sys, types
from pathlib import Path
from runner.gang import ray_head
sys.modules["ray"] = types.SimpleNamespace(shutdown=lambda: None)
def start_slowly(**_options):
    is_unread = select.poll()
    is_unread.register(1, 0)  # the driver's end closes
    is_unread.poll()
    return {{"address": "127.0.0.1:1"}}
ray_head.connected = start_slowly
ray_head.hold(Path({str(tmp_path / "session")!r}), 1, os.fdopen(1, "w"))
"""
    (tmp_path / "session").mkdir()
    process = child(code, cwd=Path(__file__).parent.parent)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.close()
    process.stdin.close()
    process.wait(60)
    assert list(tmp_path.iterdir()) == []
