"""What surrounds a command (folder, environment, terminal, limits) does not decide what comes out."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from model.config import RunConfig
from model.data.cpus import usable_cpus
from runner.errors import Kind
from runner.gang.rank import Rank
from runner.machine import packages
from runner.provenance import OWN_FILE, git_state, settings
from runner.spec.read import load_spec
from runner.sweep import run_sweep
from runner.view.progress import can_redraw
from runner.work import Options
from tests.sweep_tools import make_spec, no_data

ROOT = Path(__file__).parent.parent
__all__ = ["no_data"]


def run(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder with more variables."""
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture
def experiments(tmp_path: Path) -> Path:
    """A folder of somebody's experiments, with our packages' names in it."""
    for name in ("model", "results", "runner"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the user\\'s own')\n")
    return tmp_path


def test_a_folder_with_our_names_in_it_changes_nothing(experiments: Path) -> None:
    code = "import seedsweep, sys; seedsweep.hold_packages(); import model.config, results.schema, runner.spec.read; "
    done = run("-c", code + "print(model.config.__file__)", cwd=experiments, PYTHONPATH=f"{experiments}:{ROOT}")
    assert done.stdout.strip() == str(ROOT / "model" / "config.py"), done.stderr


def test_commands_hold_our_names(experiments: Path) -> None:
    done = run("-m", "jobs.cli", "plan", "nothing.yaml", cwd=experiments, PYTHONPATH=f"{experiments}:{ROOT}")
    assert (done.returncode, done.stderr.strip()) == (2, "seedsweep: error: spec nothing.yaml not found")


def test_the_version_is_printed() -> None:
    done = run("-m", "seedsweep", "--version", cwd=ROOT)
    assert (done.returncode, done.stdout.split()[0]) == (0, "seedsweep")


def test_a_notebooks_backend_does_not_stop_the_figures() -> None:
    code = "import results.report.figures, os; print(os.environ['MPLBACKEND'])"
    named = "no such backend"  # as `inline` is where a kernel's variables reach an environment without Jupyter
    assert run("-c", code, cwd=ROOT, MPLBACKEND=named).stdout.strip() == named


def test_figures_have_our_style_whatever_is_set() -> None:
    from results.report.figures import matplotlib, own_style

    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 40}):
        with own_style():
            assert matplotlib.rcParams["axes.facecolor"] == "white"
        assert matplotlib.rcParams["axes.facecolor"] == "red"


def make_repository(folder: Path) -> Path:
    """Make a repository with one commit."""
    folder.mkdir()
    (folder / "a").write_text("a")
    plain = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    for words in (["init", "-q"], ["add", "a"], ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "c"]):
        subprocess.run(["git", "-C", str(folder), *words], check=True, env=plain, capture_output=True)
    return folder


def test_variables_of_a_git_hook_do_not_name_another_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = git_state()
    other = make_repository(tmp_path / "other")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(other))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
    assert git_state() == ours


def test_a_repository_that_does_not_track_our_sources_says_nothing_about_them(tmp_path: Path) -> None:
    other = make_repository(tmp_path / "other")
    inside = other / "venv" / "site-packages"
    (inside / OWN_FILE).parent.mkdir(parents=True)
    (inside / OWN_FILE).write_text("")
    assert git_state(inside) == ("unknown", None)


def test_settings_that_may_decide_a_figure_are_recorded() -> None:
    given = {"NVIDIA_TF32_OVERRIDE": "1", "OMP_NUM_THREADS": "2", "HOME": "/x", "PYTHONHASHSEED": "3", "AWS_KEY": "k"}
    assert settings(given) == {"NVIDIA_TF32_OVERRIDE": "1", "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "3"}


@pytest.mark.parametrize(("term", "expected"), [("xterm", True), ("dumb", False), ("", False), (None, False)])
def test_only_a_terminal_that_can_redraw_is_redrawn(
    monkeypatch: pytest.MonkeyPatch, term: str | None, expected: bool
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("TERM", raising=False)
    if term is not None:
        monkeypatch.setenv("TERM", term)
    assert can_redraw(stream) is expected


GROUPS = [
    ("0::/a/b\n", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1),
    ("0::/not/here\n", {"cpu.max": "100000 100000"}, 1),
    ("4:cpu,x:/a\n", {"cpu,x/a/cpu.cfs_quota_us": "100000", "cpu,x/a/cpu.cfs_period_us": "100000"}, 1),
    ("4:cpu:/a\n", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 1),
    ("4:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, 64),
    ("0::/\n", {"cpu.max": "max 100000"}, 64),
    ("0::/\n", {"cpu.max": "350000 100000"}, 3),
    ("0::/\n", {}, 64),
]  # fmt: skip


@pytest.mark.parametrize(("own", "files", "expected"), GROUPS)
def test_cpus_are_counted_by_affinity_and_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(64)), raising=False)
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert usable_cpus(tmp_path / "groups", tmp_path / "own") == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to a CPU")
def test_a_plan_on_one_cpu_has_room_for_one_gang() -> None:
    code = "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); "
    code += "from runner.machine.node import this_machine; print(this_machine().resources['CPU'])"
    assert run("-c", code, cwd=ROOT).stdout.strip() == "1.0"


def test_a_missing_package_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_data: None
) -> None:
    monkeypatch.setitem(sys.modules, "brotli", None)
    for is_local in (False, True):
        with pytest.raises(ValueError, match=r"lacks what the run needs: brotli \(.*pip install brotli"):
            run_sweep(make_spec(tmp_path / "out"), Options(is_local=is_local))
    assert not (tmp_path / "out").exists()


def test_a_package_whose_library_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brotli.py").write_text("raise OSError('libbrotli.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "brotli", raising=False)
    missing = packages.missing_packages(RunConfig(), uses_gpus=False)
    assert "brotli (libbrotli.so.1: cannot open shared object file)" in missing


def test_packages_are_asked_for_by_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    config = RunConfig()
    config = replace(config, runtime=replace(config.runtime, attention="fa2"))
    found = packages.is_found
    monkeypatch.setattr(packages, "is_found", lambda name: name != "flash_attn" and found(name))
    assert "flash-attn (not found; runtime.attention='fa2'" in packages.missing_packages(config, uses_gpus=True)
    assert packages.missing_packages(config, uses_gpus=False) == ""


def test_a_package_that_only_a_rank_misses_is_the_nodes_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rank, "log_tail", lambda _self: "")
    job = SimpleNamespace(redact=str)
    failure = Rank(job, 0).failure_of(ModuleNotFoundError("No module named 'brotli'"))  # type: ignore[arg-type]
    assert failure.kind is Kind.PREFLIGHT
    assert "lacks a package: No module named 'brotli'" in failure.message


FORMS = [
    ("042", "042 would be read as 34; write a whole number in plain decimal digits, without a leading 0"),
    ("1:30", "1:30 would be read as 90"),
    ("1_000", "1_000 would be read as 1000"),
    ("0x2A", "0x2A would be read as 42"),
    ("0b11", "0b11 would be read as 3"),
    ("yes", "yes would be read as True; write true or false"),
    ("08", "'08' is not a whole number; write 8"),
    ("0o42", "'0o42' is not a whole number"),
]


@pytest.mark.parametrize(("written", "said"), FORMS)
def test_a_seed_is_read_as_it_is_written_or_refused(tmp_path: Path, written: str, said: str) -> None:
    (tmp_path / "s.yaml").write_text(f"name: a\npreset: tiny\nseeds: [{written}]\n"
                                     "data: {train: a, val: b, tokenizer: c}\nout: o\n")  # fmt: skip
    with pytest.raises(ValueError) as caught:
        load_spec(tmp_path / "s.yaml")
    assert said in str(caught.value)


@pytest.mark.parametrize("written", ["1:30.5", "1_0.5", "on"])
def test_a_number_elsewhere_is_held_to_the_same(tmp_path: Path, written: str) -> None:
    (tmp_path / "s.yaml").write_text(f"name: a\npreset: tiny\nseeds: [1]\noverrides: {{ttt: {{lr: {written}}}}}\n"
                                     "data: {train: a, val: b, tokenizer: c}\nout: o\n")  # fmt: skip
    with pytest.raises(ValueError, match=f"{written} would be read as"):
        load_spec(tmp_path / "s.yaml")
