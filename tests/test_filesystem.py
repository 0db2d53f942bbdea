"""Filesystems that lack parts of POSIX, or room: files are whole all the same, and errors name path and way out."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from model.corpus.writer import LOCK_NAME, hold_folder
from model.files import atomic as files
from model.files.atomic import replace_file
from results.store import location as location_module
from results.store.location import open_location, write_whole
from runner.errors import DirectoryInUse
from runner.folder.directory import SweepDirectory
from runner.folder.storage import LocalStorage, create_filled

ROOT = Path(__file__).parent.parent
POOR = """
#include <errno.h>
#include <sys/stat.h>
int link(const char *a, const char *b) { errno = EPERM; return -1; }
int linkat(int a, const char *b, int c, const char *d, int e) { errno = ENOTSUP; return -1; }
int symlink(const char *a, const char *b) { errno = EPERM; return -1; }
int fsync(int file) { errno = EINVAL; return -1; }
int fchmod(int file, mode_t mode) { errno = EPERM; return -1; }
int flock(int file, int how) { errno = ENOTSUP; return -1; }
int utimensat(int a, const char *b, const struct timespec c[2], int d) { errno = EPERM; return -1; }
"""
USE = """
import sys
from pathlib import Path
import pytest
from model.files.atomic import replace_file
from model.corpus.writer import hold_folder
from results.store.location import open_location, write_whole
from runner.folder.directory import SweepDirectory
from runner.errors import DirectoryInUse
from runner.folder.storage import LocalStorage
root = Path(sys.argv[1])
first, second = (SweepDirectory(LocalStorage(root)) for _ in range(2))
first.acquire()
with pytest.raises(DirectoryInUse):
    second.acquire()
first.log_events([{"a": 1}])
with first.writing_fenced():
    first.write_json("state.json", {})
write_whole(open_location(root), str(root / "results/runs/a.parquet"), b"1")
with hold_folder(root / "data"), pytest.raises(ValueError, match="if none runs, remove .*held"):
    with hold_folder(root / "data"):
        raise AssertionError("held twice")
with hold_folder(root / "data"):
    pass
first.release()
second.acquire()
print("used")
"""


@pytest.mark.skipif(shutil.which("cc") is None or sys.platform != "linux", reason="takes calls away with LD_PRELOAD")
def test_a_filesystem_without_links_locks_modes_and_fsync_will_do(tmp_path: Path) -> None:
    (tmp_path / "poor.c").write_text(POOR)
    library = tmp_path / "poor.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "poor.c"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "LD_PRELOAD": str(library)}, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "used\n"), done.stderr
    assert not list((tmp_path / "out" / "data").iterdir())


def test_a_file_made_under_its_name_is_made_once(tmp_path: Path) -> None:
    assert create_filled(tmp_path / "claim", b"first")
    assert not create_filled(tmp_path / "claim", b"second")
    assert (tmp_path / "claim").read_bytes() == b"first"


def test_a_filesystem_without_rename_is_named_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_source: object, _target: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(OSError, match=r"no rename; choose a folder on another one.*a\.json"):
        LocalStorage(tmp_path).write("a.json", b"1")
    assert list(tmp_path.iterdir()) == []


def write_to_a_full_disk(path: Path) -> None:
    """Write a file whose second half finds no room."""
    with replace_file(path) as file:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")  # as write() raises it, without a name


def test_an_error_of_a_full_disk_names_the_file_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OSError, match=r"No space left on device: .*weights"):
        write_to_a_full_disk(tmp_path / "weights")

    def refuse(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    location = open_location(tmp_path)
    with pytest.raises(OSError, match=r"No space left on device: .*a\.parquet"):
        write_whole(location, str(tmp_path / "a.parquet"), b"1")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    for _ in range(2):
        with hold_folder(tmp_path):
            with pytest.raises(ValueError, match="is being written by another"), hold_folder(tmp_path):
                raise AssertionError("held twice")
            assert (tmp_path / LOCK_NAME).exists()
        assert not (tmp_path / LOCK_NAME).exists()


HOLD = """
import sys
from pathlib import Path
from model.corpus.writer import hold_folder
root = Path(sys.argv[1])
for _ in range(200):
    with hold_folder(root, on_wait=lambda: None):
        count = int((root / "count").read_text())
        (root / "count").write_text(str(count + 1))
"""


def test_who_waited_at_a_removed_lock_file_does_not_hold_the_folder(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    code = "import model.corpus.writer as writer; writer.WAIT_S = 0.0005\n" + HOLD
    several = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT) for _ in range(3)]
    assert [one.wait(120) for one in several] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "600"


def test_a_claim_that_is_half_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = SweepDirectory(LocalStorage(tmp_path))
    monkeypatch.setattr(directory.lease, "sleep", lambda _seconds: None)
    (tmp_path / "drivers").mkdir()
    (tmp_path / "drivers" / "4.json").write_text('{"host": ')
    with pytest.raises(ValueError, match=r"drivers/4\.json is damaged; remove it"):
        directory.acquire()
    (tmp_path / "drivers" / "4.json").unlink()
    directory.acquire()
    with pytest.raises(DirectoryInUse):
        SweepDirectory(LocalStorage(tmp_path)).acquire()


def test_a_store_that_never_answers_is_given_up_in_one_line_with_the_way_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        place = f"s3://b/x?endpoint_override=127.0.0.1:{server.getsockname()[1]}&scheme=http&region=us-east-1"
        code = (
            "import sys; from results.store import location; from jobs.cli import main; location.PATIENCE_S = 0.5; "
            f"sys.argv = ['seedsweep', 'table', {place!r}]; sys.exit(main())"
        )
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_EC2_METADATA_DISABLED": "true"}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=30,
            env={**os.environ, **keys}, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cannot be opened: no answer within" in done.stderr
    assert "AWS_ACCESS_KEY_ID" in done.stderr


@pytest.mark.parametrize("scheme", ["gs", "abfss"])
def test_a_refused_store_names_how_to_get_in(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_uri: str) -> None:
        raise OSError("could not\nauthenticate")

    monkeypatch.setattr(location_module, "_open_store", refuse)
    with pytest.raises(ConnectionError, match="could not authenticate; run ") as told:
        open_location(f"{scheme}://b/x")
    assert "\n" not in str(told.value)
