"""tests/gpu_speed.py: which row comes when and what a failure costs, and the table made of what was measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.bench.figures import Probe, Report
from jobs.bench.process import MeasurementFailed
from model.config import TTTConfig
from model.ttt.windows import window_cost
from tests import gpu_speed, gpu_speed_tasks
from tests.gpu_speed import ROWS, Row, Session, Tree
from tests.gpu_speed_outside import seconds_outside
from tests.gpu_speed_rows import LINES, as_text, find_figure, join_reports

BENCH = gpu_speed.ROOT / "docs" / "bench"


def make_session(tmp_path: Path, *more: str, waiting: tuple[Row, ...] = ROWS) -> Session:
    """Return a call over two trees that has not begun."""
    args = gpu_speed.parse_arguments([str(tmp_path), "--corpus", str(tmp_path), *more])
    trees = [Tree("now", tmp_path / "ours", "a" * 40), Tree("before", tmp_path / "theirs", "")]
    return Session(args, trees, tmp_path, environment={}, waiting=list(waiting))


def pretend(monkeypatch: pytest.MonkeyPatch, *, failing: str = "") -> list[str]:
    """Let no process run, write no file, and return the list of what would have been run, in order."""
    begun: list[str] = []

    def measure(_session: Session, row: Row, tree: Tree, number: int, _gpu: str | None) -> None:
        begun.append(f"{row.name} {tree.name} {number}")
        if row.name == failing:
            raise MeasurementFailed("no kernel")

    monkeypatch.setattr(gpu_speed, "measure_once", measure)
    monkeypatch.setattr(Session, "write", lambda _self: None)
    return begun


def test_trees_take_turns_and_the_most_important_row_is_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = pretend(monkeypatch)
    session = make_session(tmp_path)
    gpu_speed.work_off(session, None)
    turns = [f"train {name} {number}" for number in range(3) for name in ("now", "before")]
    rest = [f"{row.name} {name} 0" for row in ROWS[1:] for name in ("now", "before")]
    assert begun == [*turns, *rest]
    assert session.failures == []


def test_a_row_that_fails_costs_no_other_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = pretend(monkeypatch, failing="ttt")
    session = make_session(tmp_path, "--repeats", "1")
    gpu_speed.work_off(session, None)
    assert [name.split()[0] for name in begun[::2]] == [row.name for row in ROWS]
    assert session.failures == ["ttt, now: no kernel", "ttt, before: no kernel"]


def test_what_would_not_end_in_time_is_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = pretend(monkeypatch)
    session = make_session(tmp_path, "--budget_s", "50")
    gpu_speed.work_off(session, None)
    assert {name.split()[0] for name in begun} == {"train", "eval", "gptq"}
    assert [text.split(",")[0] for text in session.failures] == ["ttt: left out", "outside: left out",
                                                                 "share: left out"]  # fmt: skip


def test_a_second_process_is_given_as_long_as_the_first_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = pretend(monkeypatch)
    session = make_session(tmp_path, "--budget_s", "50", waiting=ROWS[:1])
    session.took["before", "train"] = 60.0
    gpu_speed.work_off(session, None)
    assert begun == [f"train now {number}" for number in range(3)]
    assert session.failures[0] == "train, before: 0 of 3 processes, the time was over"


def test_a_share_is_measured_whole_where_both_trees_have_the_time(tmp_path: Path) -> None:
    share = ROWS[-1]
    for budget_s, count in (("400", None), ("290", gpu_speed.SHARE_PART)):
        row = gpu_speed.settle_share(make_session(tmp_path, "--budget_s", budget_s), share)
        assert row.options == {"share_documents": count}
    named = make_session(tmp_path, "--share_documents", "30")
    assert gpu_speed.settle_share(named, share).options == {"share_documents": 30}


def test_a_process_that_outlasts_the_time_is_ended_and_its_words_are_kept(tmp_path: Path) -> None:
    session = make_session(tmp_path, "--budget_s", "0")  # it gets a second
    code = "import time; print('begun', flush=True); time.sleep(600)"
    with pytest.raises(MeasurementFailed, match="the time was over"):
        session.run(["-c", code], {}, tmp_path / "process.log")
    assert session.running == []
    assert "sleep(600)" in (tmp_path / "speed.log").read_text()


def report_of(*files: str, row: str, gpu: str = "NVIDIA H200", **environment: Any) -> dict[str, Any]:
    """Return committed reports of `seedsweep bench` as tests.gpu_speed would have them."""
    parts = [json.loads((BENCH / f"{file}.json").read_text()) for file in files]
    figures = [{**figure, "name": f"{row}: {figure['name']}"} for part in parts for figure in part["figures"]]
    environment = {**parts[0]["environment"], "gpu_model": gpu, **environment}
    return {**parts[0], "figures": figures, "environment": environment}


def test_every_line_of_the_table_finds_its_figure_under_the_name_that_is_measured() -> None:
    found = [report_of(f"bench_{row}_h200", row=row) for row in ("train", "eval", "gptq")]
    missing = [line for line in LINES if not any(find_figure(report, line.figure) for report in found)]
    assert {line.figure.split(":")[0] for line in missing} == {"ttt", "outside", "share"}
    source = Path(gpu_speed_tasks.__file__).read_text()
    for line in missing:
        name = line.figure.partition(": ")[2].removesuffix(".*")
        if not line.figure.startswith("outside"):  # those of TTT's sample are named by seedsweep bench, label by label
            assert f'"{name}' in source or name == "sample: useful window tokens", name


def test_the_table_says_how_much_faster_and_compares_with_the_same_gpu_only() -> None:
    now = report_of("bench_train_h200", row="train")
    before = report_of("bench_train_fa2_h200", row="train")
    lines = {line.split("  ")[0]: line for line in as_text(now, before).splitlines()}
    rate, peak = lines["train tokens/s, 17 visits"], lines["peak, 98,304-token micro-batch"]
    for cell in ("0.670 M (H200)", "0.754 M", "0.866 M (x1.29)", "x1.148", "75 of 3"):
        assert cell.removesuffix(" (H200)") in rate
    assert "(x1.61)" in peak
    other = as_text(report_of("bench_train_h200", row="train", gpu="NVIDIA H100 80GB HBM3"), None)
    assert "0.866 M (x1.44)" in other
    apart = as_text(report_of("bench_gptq_h200", row="gptq", gpu="NVIDIA H100 80GB HBM3"), None)
    (line,) = (line for line in apart.splitlines() if line.startswith("Hessians, solve"))
    assert "109.0 s (H200)" in line
    assert "(x" not in line


def test_parts_are_joined_and_others_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = {"one": report_of("bench_train_h200", row="train"), "two": report_of("bench_gptq_h200", row="gptq")}
    for name, report in parts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "speed.json").write_text(json.dumps(report))
    out = tmp_path / "out"
    folders = [str(tmp_path / name) for name in parts]
    assert gpu_speed.main([str(out), "--join", *folders]) == 0
    names = [figure["name"] for figure in json.loads((out / "speed.json").read_text())["figures"]]
    assert len(names) == sum(len(report["figures"]) for report in parts.values())
    assert "5.72 s" in (out / "speed.txt").read_text()
    again = join_reports([parts["one"], parts["one"]])
    assert again["figures"][0]["num_samples"] == 2 * parts["one"]["figures"][0]["num_samples"]
    with pytest.raises(ValueError, match="different code_hash"):
        join_reports([parts["one"], report_of("bench_gptq_h200", row="gptq", code_hash="other")])
    capsys.readouterr()
    assert gpu_speed.main([str(out), "--join", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_what_failed_is_in_the_table_of_both_files(tmp_path: Path) -> None:
    environment = json.loads((BENCH / "bench_train_h200.json").read_text())["environment"]
    session = make_session(tmp_path)
    session.environment = environment
    report = Report("speed", {}, {"code_hash": "f" * 64, "gpu_model": "NVIDIA H100 80GB HBM3"})
    report.add("17 visits: rate", "tokens/s", [1e6, 2e6, 3e6])
    session.reports["before", "train"] = report
    session.fail("eval: no room")
    session.write()
    now, before = (json.loads((tmp_path / name).read_text()) for name in ("speed.json", "speed_before.json"))
    assert (now["environment"]["git_commit"], before["environment"]["git_commit"]) == ("a" * 40, "unknown")
    assert (before["environment"]["code_hash"], now["environment"]["code_hash"]) == ("f" * 64, None)
    assert before["figures"][0]["name"] == "train: 17 visits: rate"
    assert "note: eval: no room" in (tmp_path / "speed.txt").read_text()


def test_a_seeds_seconds_are_those_of_its_own_events() -> None:
    at = {
        "PLACED": 0,
        "STARTING": 1,
        "TRAIN": 3,
        "QUANTIZE": 13,
        "EVALUATE": 20,
        "TTT": 22,
        "COMMITTING": 50,
        "DONE": 51,
    }
    events = [{"seed": seed, "to": to, "time": f"2026-01-01T00:{minute:02}:{second:02}.500+00:00"}
              for seed, minute in ((0, 0), (42, 1)) for to, second in at.items()]  # fmt: skip
    found = seconds_outside(events, 0, {"train_s": 6.0, "warmup_s": 2.5})
    assert found == {
        "outside the clock and TTT": 3 + 4 + 7 + 2 + 1, "start": 3.0, "train, outside the clock": 4.0, "quantize": 7.0,
        "evaluate": 2.0, "commit": 1.0, "warm-up": 2.5, "training clock": 6.0, "ttt": 28.0,
    }  # fmt: skip


@pytest.mark.parametrize("count", [gpu_speed.SHARE_PART, gpu_speed_tasks.SHARE_DOCUMENTS])
def test_a_share_is_as_long_and_as_much_work_as_an_eighth_of_fineweb(count: int) -> None:
    lengths = gpu_speed_tasks.share_lengths(count)
    assert lengths.mean() * 50_000 == pytest.approx(40.5e6, rel=0.01)
    work = sum(window_cost(int(n), TTTConfig()) for n in lengths) * 50_000 / count
    assert work == pytest.approx(552e6, rel=0.03)
    documents = gpu_speed_tasks.documents_of(lengths[:50], 8192)
    assert [documents.document(index).size - 1 for index in range(50)] == lengths[:50].tolist()


def test_a_task_refuses_to_measure_another_tree(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the package model is that of"):
        gpu_speed_tasks.measure_eval({"tree": str(tmp_path)}, Probe("eval"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--corpus FOLDER is missing"),
        (["--corpus", "none"], "has no *_train_*.bin"),
        (["--corpus", "data", "--gpu_parts", "0"], "--gpu_parts 0 must be"),
        (["--corpus", "data", "--baseline", "data"], "jobs/bench/child.py is missing"),
    ],
)
def test_a_mistake_ends_with_one_line(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("a_train_0.bin", "a_val_0.bin", "a.model"):
        (tmp_path / "data" / name).touch()
    assert gpu_speed.main(["out", *options]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert words in said.err


def test_each_part_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.machine.gpus.count_gpus", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_speed.choose_gpus(SimpleNamespace(gpu_parts=1)) == ["0"]  # two seeds must not run at once
    assert gpu_speed.choose_gpus(SimpleNamespace(gpu_parts=3)) == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5,6,7")
    assert gpu_speed.choose_gpus(SimpleNamespace(gpu_parts=2)) == ["3", "5"]
    with pytest.raises(ValueError, match="--gpu_parts 5"):
        gpu_speed.choose_gpus(SimpleNamespace(gpu_parts=5))


def test_the_tasks_stand_alone_beside_another_tree(tmp_path: Path) -> None:
    shutil.copy(gpu_speed.TASKS, tmp_path)
    source = (tmp_path / gpu_speed.TASKS.name).read_text()
    assert "from tests" not in source
    assert all(hasattr(gpu_speed_tasks, row.task) for row in ROWS if row.task)
