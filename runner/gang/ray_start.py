"""Starting Ray here and reaching it elsewhere, in bounded time and with one line where it fails.

The first word with Ray is a child's (ray_head). Only an address at which that child got an answer is given to Ray in
the driver itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
from filelock import FileLock

from runner.errors import SweepError
from runner.gang.ray_head import LOCK_NAME
from runner.provenance import SOURCE_ROOT

START_S = 120.0  # for Ray on this machine to come up, on a busy machine too
TRY_S = 20.0  # for a cluster elsewhere to answer
PORT_S = 5.0  # for its port to accept a connection
END_S = 20.0  # for a cluster to shut down
GIVE_UP_S = 1.0  # for a child that gave no answer
STARTS = 2
PREFIX = "ssw-"  # of a session's folder; short, because the path of a socket may have about a hundred characters
SOCKET_CHARACTERS = 103
SESSION_CHARACTERS = len("/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store") + len(f"/{PREFIX}12345678")
LEFTOVER_S = 600.0  # a session's folder without a holder is removed when it is older
TMP_VARIABLE = "RAY_TMPDIR"
LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # 0: a cluster of one machine binds loopback
PRIORITY_VARIABLE = "RAY_worker_niceness"  # 15 by Ray's own choice
MODE_VARIABLE = "RAY_AUTH_MODE"
TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
LOG_NAME = "start.log"


class RayDown(Exception):
    """A child could not start or reach Ray; the message says why, in one line."""


class Cluster:
    """A Ray cluster of this machine that lives as long as this driver."""

    def __init__(self, num_cpus: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=session_base()))
        self.process = start_child(["start", str(self.folder), str(num_cpus)], self.folder)
        try:
            self.address = answer_of(self.process, START_S)
        except BaseException:
            end_child(self.process, GIVE_UP_S)
            raise

    def close(self) -> None:
        """End the cluster and everything in it; its folder goes too."""
        end_child(self.process)


def start_cluster(num_cpus: int) -> Cluster:
    """Start Ray on loopback of this machine, with a second try.

    Raises SweepError, naming Ray's logs, if it does not come up.
    """
    remove_leftovers()
    prepare_environment()
    for start in range(1, STARTS + 1):
        before = set(session_base().glob(f"{PREFIX}*"))
        try:
            return Cluster(num_cpus)
        except RayDown as error:
            if start == STARTS:
                made = sorted(set(session_base().glob(f"{PREFIX}*")) - before)
                logs = made[-1] if made else session_base()
                raise SweepError(
                    f"Ray did not start on this machine in {STARTS} tries ({error}); its logs are in {logs}; "
                    f"`--local` runs the same seeds one after the other without Ray"
                ) from None
    raise AssertionError("unreachable")


def check_address(address: str) -> None:
    """Let a child connect to the cluster at address. Raises SweepError within half a minute if it cannot."""
    if "," in address or any(character.isspace() for character in address) or not address:
        raise SweepError(f"--address {address!r} is no address; write host:port, as `ray start --head` prints it")
    check_port(address)
    with tempfile.TemporaryDirectory(prefix=PREFIX) as name:
        process = start_child(["try", address], Path(name))
        try:
            answer_of(process, TRY_S)
        except RayDown as error:
            raise SweepError(f"--address {address}: no Ray cluster answers there ({error})") from None
        finally:
            end_child(process, GIVE_UP_S)


def check_port(address: str) -> None:
    """Raise SweepError if address names a port that accepts no connection; other forms are Ray's to understand."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PORT_S).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise SweepError(f"--address {address}: no Ray cluster answers there ({error})") from None


def session_base() -> Path:
    """Return the folder for sessions: RAY_TMPDIR or the temporary folder, /tmp where that one's path does not suit.

    Raises SweepError if none suits.
    """
    named = os.environ.get(TMP_VARIABLE)
    for base in [named] if named else [tempfile.gettempdir(), "/tmp"]:
        if not why_unsuitable(base):
            return Path(base)
    base = named or tempfile.gettempdir()
    raise SweepError(
        f"Ray cannot keep its session in {base} ({why_unsuitable(base)}); "
        f"name a folder with a short path in {TMP_VARIABLE}"
    )


def why_unsuitable(base: str) -> str:
    """Return why Ray cannot keep its session in a folder, or an empty string."""
    if not os.path.isabs(base) or not os.path.isdir(base) or not os.access(base, os.W_OK | os.X_OK):
        return "it is no writable folder"
    if not is_plain(base):
        return "its path has characters that a shell reads as something else"
    limit = SOCKET_CHARACTERS - SESSION_CHARACTERS
    return f"its path has {len(base)} characters, sockets leave room for {limit}" if len(base) > limit else ""


def is_plain(path: str) -> bool:
    """Return whether a shell takes the path as it is; Ray pastes paths into command lines unquoted."""
    return shlex.quote(path) == path


def python_for(folder: Path) -> str:
    """Return this interpreter by a path that a shell takes as it is: through a link in folder where its own is not.

    Ray starts everything by the interpreter's path and by its own files' path, which lie below the same prefix.
    """
    prefix, executable = sys.prefix, sys.executable
    if is_plain(executable) and is_plain(prefix):
        return executable
    if not Path(executable).is_relative_to(prefix):
        raise SweepError(f"Ray cannot start {executable}: a shell reads its path as something else; use `--local`")
    link = folder / "python"
    link.symlink_to(prefix, target_is_directory=True)
    return str(link / Path(executable).relative_to(prefix))


def start_child(arguments: Sequence[str], folder: Path) -> subprocess.Popen[bytes]:
    """Start ray_head with our own packages, out of reach of the terminal's Ctrl-C; its words go to a log."""
    code = f"import sys; sys.path.insert(0, {str(SOURCE_ROOT)!r}); from runner.gang.ray_head import main; main()"
    with (folder / LOG_NAME).open("wb") as log:
        return subprocess.Popen(
            [python_for(folder), "-P", "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=log, cwd=folder, start_new_session=True,
        )  # fmt: skip


def answer_of(process: subprocess.Popen[bytes], within_s: float) -> str:
    """Return the address that a child answers with. Raises RayDown if it says otherwise, dies, or takes too long."""
    assert process.stdout is not None
    deadline, line = time.monotonic() + within_s, b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while not line.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not selector.select(left):
                raise RayDown(f"no answer within {within_s:.0f} s")
            piece = os.read(process.stdout.fileno(), 1 << 16)
            if not piece:
                raise RayDown(f"Ray ended the process, exit code {process.wait(END_S)}")
            line += piece
    answer = json.loads(line)
    if "error" in answer:
        raise RayDown(answer["error"])
    return str(answer["address"])


def end_child(process: subprocess.Popen[bytes], within_s: float = END_S) -> None:
    """Let a child shut Ray down and end; kill it with all it started where it does not within some seconds."""
    assert process.stdin is not None
    assert process.stdout is not None
    family = family_of(process.pid)
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(within_s)
    except subprocess.TimeoutExpired:
        family += family_of(process.pid)
        process.kill()
        process.wait()
    process.stdout.close()
    for member in family:
        with contextlib.suppress(psutil.Error):
            member.kill()  # a Process of psutil remembers its start, so this is never somebody else's


def family_of(pid: int) -> list[psutil.Process]:
    """Return the processes below one, none where it is gone."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def prepare_environment() -> None:
    """Set what a cluster of this machine alone needs, best before Ray is imported: loopback, priority, and a token.

    All of Ray's workers get the priority of ranks, or what a busy node is asked would have to wait for these to pause.
    Ray would write a token into the home folder; where the user has none there, this cluster gets one of its own.
    """
    os.environ[LOOPBACK_VARIABLE] = "0"
    os.environ.setdefault(PRIORITY_VARIABLE, "0")
    os.environ.setdefault(MODE_VARIABLE, "token")
    home = home_token()
    if not any(os.environ.get(name) for name in TOKEN_VARIABLES) and not (home and is_readable(home)):
        os.environ[TOKEN_VARIABLES[0]] = secrets.token_hex(32)
    if "ray" in sys.modules:
        from ray._raylet import Config  # type: ignore[attr-defined]

        Config.initialize("")  # Ray has read its environment already


def is_readable(path: Path) -> bool:
    """Return whether path is a file that this user can read."""
    return os.path.isfile(path) and os.access(path, os.R_OK)


def home_token() -> Path | None:
    """Return where Ray keeps a user's token, None for a user without a home."""
    try:
        return Path.home() / ".ray" / "auth_token"
    except RuntimeError:
        return None


def remove_leftovers(now: float | None = None) -> None:
    """Remove the folders of sessions that are certainly ours and over: made by this user, and nobody holds the lock."""
    now = time.time() if now is None else now
    for folder in session_base().glob(f"{PREFIX}????????"):
        with contextlib.suppress(OSError):
            info = folder.lstat()
            if folder.is_symlink() or info.st_uid != os.getuid() or now - info.st_mtime < LEFTOVER_S:
                continue
            if (folder / LOCK_NAME).exists():
                with FileLock(folder / LOCK_NAME, blocking=False):  # Timeout is an OSError
                    shutil.rmtree(folder)
