"""What a submitted job is made of."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.cli import main
from jobs.sweeps import ray_job
from jobs.sweeps.ray_job import EXCLUDES, MAX_UPLOAD_BYTES, as_pattern, follow, make_submission, pack
from runner.provenance import Git
from runner.spec.read import load_spec

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "jobs" / "specs" / "demo.yaml"


def submission(**changes: Any) -> Any:
    """Return the demo as a job."""
    given: dict[str, Any] = {"working_dir": ROOT, "git": Git("abc123", True), **changes}
    return make_submission(load_spec(DEMO), DEMO, **given)


def test_a_job_records_commit_and_dirty_flag() -> None:
    job = submission()
    assert job.entrypoint == "python -m jobs.cli run jobs/specs/demo.yaml --git-commit abc123 --git-dirty yes"
    assert (job.metadata["git_commit"], job.metadata["git_dirty"], job.metadata["sweep"]) == ("abc123", "True", "demo")


def test_every_word_of_the_command_is_quoted() -> None:
    words = shlex.split(submission(run_arguments=["--out", "/tmp/a; rm -rf b"]).entrypoint)
    assert words[-2:] == ["--out", "/tmp/a; rm -rf b"]


def test_outside_a_repository_the_commit_is_unknown() -> None:
    assert "--git-commit unknown" in submission(git=Git("unknown", None)).entrypoint


def test_the_upload_is_small_and_holds_the_code() -> None:
    assert pack(ROOT).num_bytes < MAX_UPLOAD_BYTES
    assert "/data" in EXCLUDES  # model/data is code and goes along
    assert "data" not in EXCLUDES


def test_a_large_working_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(DEMO.read_text())
    with (tmp_path / "large").open("wb") as file:
        file.truncate(MAX_UPLOAD_BYTES + 1)
    with pytest.raises(ValueError, match=r"would upload 20.0 MB, over 20 MB"):
        make_submission(load_spec(DEMO), tmp_path / "spec.yaml", working_dir=tmp_path)


def test_a_spec_that_would_not_travel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not inside the working directory"):
        make_submission(load_spec(DEMO), DEMO, working_dir=tmp_path)


def test_ray_packs_what_is_not_excluded() -> None:
    from ray._private.runtime_env.packaging import _get_excludes

    is_excluded = _get_excludes(ROOT, list(EXCLUDES))
    assert [
        name for name in ("jobs/cli.py", "model/data/shards.py", "pyproject.toml", "") if is_excluded(ROOT / name)
    ] == []
    assert [name for name in (".git", ".venv", "runs", "data") if not is_excluded(ROOT / name)] == []


def test_a_link_to_a_folder_stays_at_home_and_is_named(tmp_path: Path) -> None:
    from ray._private.runtime_env.packaging import _get_excludes

    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    for folder in (home, elsewhere):
        folder.mkdir()
    (home / "spec.yaml").write_text(DEMO.read_text())
    with (elsewhere / "large").open("wb") as file:
        file.truncate(MAX_UPLOAD_BYTES + 1)
    name = "data sets [v2]!"
    (home / name).symlink_to(elsewhere)
    (home / "loop").symlink_to(home)
    job = make_submission(load_spec(DEMO), home / "spec.yaml", working_dir=home, git=Git("abc", False))
    assert job.left_links == (name, "loop")
    is_excluded = _get_excludes(home, job.runtime_env["excludes"])
    assert [path.name for path in home.iterdir() if not is_excluded(path)] == ["spec.yaml"]


def test_a_link_to_a_file_counts_as_the_file(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "large").write_bytes(b"x" * 1000)
    (tmp_path / "home" / "link").symlink_to(tmp_path / "large")
    assert pack(tmp_path / "home") == (1000, ())


def test_a_pattern_means_one_path_only() -> None:
    assert as_pattern("a/b c[1]*") == r"/a/b\ c\[1\]\*"


@pytest.mark.parametrize("command", [["run", str(DEMO)], ["rerun", "DIR", "--failed"]])
def test_no_cluster_is_asked_for_by_a_command_that_uses_none(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--local", "--address", "10.0.0.1:6379"])
    assert ended.value.code == 2
    assert "argument --address: not allowed with argument --local" in capsys.readouterr().err


class JobServer:
    """A job server that answers questions about one finished job, after it has failed some of them."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)

    def answer(self, value: Any) -> Any:
        """Return value, or fail as planned."""
        if self.failures:
            raise self.failures.pop(0)
        return value

    def get_address(self) -> str:
        return "http://cluster:8265"

    def submit_job(self, **_: Any) -> Any:
        return self.answer("raysubmit_1")

    def get_job_status(self, _: str) -> Any:
        return self.answer(SimpleNamespace(is_terminal=lambda: True))

    def get_job_logs(self, _: str) -> Any:
        return self.answer("seed=7 DONE\n")

    def get_job_info(self, _: str) -> Any:
        return self.answer(SimpleNamespace(status=SimpleNamespace(value="SUCCEEDED"), driver_exit_code=0))


NO_AGENT = "Request failed with status code 500: No available agent to submit job, please try again later.."


def test_a_cluster_without_a_job_agent_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray_job, "connect", lambda *_, **__: JobServer(RuntimeError(NO_AGENT)))
    assert main(["submit", str(DEMO), "--address", "http://cluster:8265", "--working-dir", str(ROOT)]) == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "--address http://cluster:8265: the cluster did not take the job" in said[0]
    assert "--dashboard-agent-listen-port" in said[0]


def test_following_outlives_a_job_server_that_is_away_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_job, "FOLLOW_EVERY_S", 0.0)
    text: list[str] = []
    assert follow(JobServer(ConnectionError("refused"), RuntimeError("502")), "raysubmit_1", text.append) == 0
    assert text == ["seed=7 DONE\n"]


def test_a_job_server_that_stays_away_is_said_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_job, "SILENT_S", 0.0)
    with pytest.raises(
        ray_job.JobServerFailed, match=r"not answered for 0 s \(refused\); the job may go on: `ray job logs"
    ):
        follow(JobServer(ConnectionError("refused")), "raysubmit_1")
