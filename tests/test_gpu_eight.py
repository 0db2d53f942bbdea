"""tests/gpu_eight.py and its parts: shares of the time, tables and projection, speeds around a death, a rehearsal."""

from __future__ import annotations

import json
import re
import shutil
import time
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runner.spec.read import parse_spec
from tests import gpu_eight, gpu_eight_gangs, gpu_eight_parts
from tests import gpu_eight_rows as eight_rows
from tests.gpu_eight_rows import Need, project_steps, read_rows, share_s, summarize, waves
from tests.gpu_kit import ROOT, end_processes, list_gpus, read_fates, start_process
from tests.small_run import TOKENIZER, write_data
from tests.smallest import smallest

NEEDS = [Need("published", 300.0, 440.0), Need("scale", 50.0, 120.0), Need("gangs", 98.0, 148.0)]
REPORT = ROOT / "docs" / "bench" / "bench_train_published_2gpu_h200.json"


def samples(median: float, count: int = 50) -> dict[str, Any]:
    """Return made-up samples as the rows describe them."""
    return {"median": median, "p10": median, "p90": median, "samples": count}


def arguments(tmp_path: Path, *more: str) -> Namespace:
    """Return the script's arguments over an empty corpus."""
    corpus = tmp_path / "corpus"
    corpus.mkdir(exist_ok=True)
    for name in ("made_train_0.bin", "made_val_0.bin", "made.model"):
        (corpus / name).touch()
    folders = [str(corpus), str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    return gpu_eight.parse_arguments([*folders, *more])


def made_rows(gpus: int = 8) -> list[dict[str, Any]]:
    """Return the rows of a whole call, all made up."""
    stage = {"part": "published", "gpus": gpus, "peak_memory_bytes": 25 * 2**30, "compile_s": 0.0}
    rates = {"plain": samples(9.78e6, 500), "looped": samples(6.6e6, 1500)}
    visits = {"plain": "11 layers", "looped": "17 visits"}
    scale = {"part": "scale", "row": "rates", "visits": visits, "peak_memory_gib": 25.2}
    before = samples(4.9e6, 30)
    return [
        {"part": "machine", "row": "machine", "gpus": gpus, "gpu_model": "NVIDIA H100", "cpus": 128, "torch": "2.11.0",
         "ray": "2.60.0", "git_commit": "abc1234"},
        {"part": "published", "row": "start", "seconds": 21.5, "all_reduce_bytes_per_s": 201.5e9},
        {**stage, "row": "train", "stage_s": 260.0, "rates": rates, "attention": "triton", "steps": 2190,
         "train_s": 228.1, "warmup_s": 17.4, "compile_s": 9.1, "batch_tokens": 786_432,
         "gpu_clock_mhz": samples(1710.0), "gpu_power_w": samples(5200.0)},
        {**stage, "row": "quantize", "stage_s": 8.2, "artifact_bytes": 15_892_274, "within_limit": True},
        {**stage, "row": "evaluate", "stage_s": 2.5, "passes_s": {"live": 0.51}},
        {**stage, "row": "ttt", "stage_s": 14.1, "passes_s": {"ttt_lr0": 1.2, "post_ttt": 12.3},
         "bpb": {"post_ttt": 1.2}, "documents": 1500, "tokens": 2_393_696},
        {"part": "published", "row": "end", "seconds": 340.0, "cut": False, "gpu_used_bytes": [30 * 2**30] * gpus},
        {**scale, "gpus": 8, "beside": [], "rates": {"plain": samples(9.6e6), "looped": samples(6.5e6)}},
        {**scale, "gpus": 1, "beside": [2, 4], "rates": {"plain": samples(1.25e6, 7), "looped": samples(0.83e6, 7)}},
        {"part": "gangs", "row": "speed", "gpus_each": 4, "before": before, "gone": samples(4.87e6, 110), "both": None,
         "alone": samples(4.91e6, 20), "again_after_s": 24.25, "gone_slower_percent": 0.61,
         "both_slower_percent": None, "together_slower_percent": 0.2},
        {"part": "gangs", "row": "fates", "gpus_each": 4, "killed": {"rank": 3, "seed": 42, "step": 47},
         "fates": {"42": {"state": "DONE", "attempts": 2}, "0": {"state": "DONE", "attempts": 1}}},
        {"part": "plan", "row": "plan", "gang": 4, "slots": "slots: 2 gang(s) at once", "exit_code": 0,
         "problems": []},
    ]  # fmt: skip


def test_a_part_gets_what_later_ones_can_spare_and_none_where_that_is_too_little() -> None:
    assert share_s(NEEDS, "published", 560.0) == 412.0  # 560 - 50 - 98
    assert share_s(NEEDS, "published", 900.0) == 440.0  # its most
    assert share_s(NEEDS, "published", 400.0) == 300.0  # the first part comes first
    assert share_s(NEEDS, "published", 299.0) is None
    assert share_s(NEEDS, "scale", 200.0) == 102.0
    assert share_s(NEEDS, "gangs", 97.0) is None  # the last one keeps nothing for others
    assert share_s(NEEDS, "gangs", 98.0) == 98.0


def test_the_least_of_all_parts_fits_into_the_limit(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    needs = gpu_eight.make_needs(args)
    assert [need.part for need in needs] == ["published", "scale", "gangs", "plan"]
    assert sum(need.least_s for need in needs) <= args.limit_s
    picked = arguments(tmp_path, "--parts", "plan", "scale")
    assert [need.part for need in gpu_eight.make_needs(picked)] == ["scale", "plan"]


@pytest.mark.parametrize(("gpus", "wanted"), [(1, [[1]]), (2, [[1], [2]]), (8, [[1, 2, 4], [8]])])
def test_numbers_of_gpus_that_fit_beside_each_other_are_measured_at_once(gpus: int, wanted: list[list[int]]) -> None:
    assert waves(gpus) == wanted
    assert all(sum(wave) <= gpus for wave in wanted)


def test_the_projection_from_the_published_rates_comes_to_the_published_steps() -> None:
    assert project_steps(eight_rows.PUBLISHED_RATES) == pytest.approx(eight_rows.PUBLISHED_STEPS, rel=0.005)
    assert project_steps({"plain": 786_432.0, "looped": 786_432.0}, seconds=10.0) == 10


def test_the_tables_of_a_whole_call_say_what_was_measured_and_what_was_not() -> None:
    text = summarize(made_rows())
    for line in (
        "8 x NVIDIA H100 of one host, 128 CPU cores, torch 2.11.0, Ray 2.60.0, commit abc1234.",
        "| published recipe, in a run through Ray | measured | published logs |\n| --- | --- | --- |",
        "| train tokens/s, 11 layers, triton | 9.780 M (x1.20), 500 steps | 8.15 M |",
        "| train tokens/s, 17 visits, triton | 6.600 M (x1.20), 1500 steps | 5.50 M |",
        "| steps within 228.1 s | 2,190 | - |",
        "| warm-up before the training clock, compilation in it | 17.4 s, 9.1 s | - |",
        "| slowest SM clock, power, medians | 1710 MHz, 650 W a GPU | - |",
        "| stages, s | train 260.0, quantize 8.2, evaluate 2.5, ttt 14.1 | - |",
        "| passes, s | live 0.51, ttt_lr0 1.20, post_ttt 12.30 | - |",
        "| TTT of 1,500 documents, 2,393,696 targets | 12.3 s | - |",
        "| artifact bytes | 15,892,274 (within the limit) | - |",
        "| most memory in use on each GPU, GiB | 30.0, 30.0, 30.0, 30.0, 30.0, 30.0, 30.0, 30.0 | - |",
        "**Projection, not measured:** at these rates 588 s of training on 8 GPUs hold 5,766 steps, 35% of the time",
        "| GPUs | tokens/s, 11 layers | tokens/s, 17 visits | peak GiB | measured beside gangs of |",
        "| 1 | 1.250 M | 0.830 M | 25.2 | 2, 4 |\n| 8 | 9.600 M (x7.68) | 6.500 M (x7.83) | 25.2 | - |",
        "| killed | rank 3 of seed 42 killed at step 47 |",
        "| ends | seed 42 DONE at attempt 2, seed 0 DONE at attempt 1 |",
        "| from the kill to training again | 24.2 s |",
        "| slower while the killed gang was gone by | +0.61 %, 110 steps (bar: 2 %) |",
        "| slower once both trained again by | not measured |",
        "| `seedsweep plan`, gangs of 4 | slots: 2 gang(s) at once; exit code 0 |",
        "| preflight's all-reduce of the whole gang | 201.5 GB/s |",
    ):
        assert line in text
    assert "Left out" not in text


def test_two_gpus_are_not_held_against_eight() -> None:
    text = summarize(made_rows(gpus=2))
    assert "| train tokens/s, 11 layers, triton | 9.780 M, 500 steps | 8.15 M |" in text
    assert "588 s of training on 2 GPUs hold" in text


def test_a_call_that_was_cut_off_makes_tables_of_what_is_there() -> None:
    rows = made_rows()
    for count in range(len(rows)):
        assert summarize(rows[:count]) is not None
    short = [
        *rows[:2],
        {"part": "published", "row": "end", "seconds": 400.4, "cut": True, "gpu_used_bytes": []},
        {"part": "scale", "row": "none", "left_out": "30 s were left"},
        {"part": "gangs", "row": "error", "error": "OSError: no room"},
    ]
    text = summarize(short)
    assert "Cut off: published after 400 s." in text
    assert "Left out: scale, 30 s were left." in text
    assert "Failed: gangs, OSError: no room." in text
    assert "201.5 GB/s" in text
    assert "Projection" not in text


def test_a_run_without_loops_or_with_other_steps_is_not_projected() -> None:
    for changed in ({"batch_tokens": 512}, {"rates": {"plain": samples(1e6), "looped": None}}):
        rows = made_rows()
        rows[2] |= changed
        assert "No projection" in summarize(rows)


def test_a_line_that_was_cut_off_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"part": "scale", "row": "end"}\n{"part": "pla')
    assert read_rows(path) == [{"part": "scale", "row": "end"}]


def test_the_report_of_the_benchmark_is_read_as_committed_ones_are() -> None:
    row = gpu_eight_parts.read_bench(REPORT)
    assert row["visits"] == {"plain": "11 layers", "looped": "17 visits"}
    assert row["rates"]["plain"]["samples"] == 13  # of the first of its three processes
    assert row["rates"]["plain"]["median"] == pytest.approx(2.56e6, rel=0.05)
    assert row["rates"]["looped"]["median"] == pytest.approx(1.72e6, rel=0.05)
    assert (row["compiled_while_timed_s"], row["attention"]) == (0.0, "triton")
    assert row["peak_memory_gib"] == pytest.approx(25.1, abs=0.1)


def leave_training(out: Path, seed: int, *, begun: float, rates: list[float], attempt: int) -> None:
    """Leave what the training of a seed leaves whose steps begin a second after each other."""
    folder = out / "seeds" / f"seed={seed}-repeat=0"
    (folder / "stages").mkdir(parents=True)
    (folder / "stages" / "train.json").touch()
    elapsed = np.arange(float(len(rates)))
    np.savez(folder / "steps.npz", elapsed_s=elapsed, tokens_per_s=np.array(rates))
    with (out / f"notes-{seed}.jsonl").open("a") as file:
        for step, elapsed_s in enumerate(elapsed, start=1):
            late_s = 0.25 * (step % 3)  # reports come when they come
            file.write(json.dumps([begun + elapsed_s + late_s, attempt, "train", step, elapsed_s]) + "\n")


def test_the_living_gang_is_held_against_itself_before_the_kill(tmp_path: Path) -> None:
    order = {"seed": 42, "rank": 3, "other": 0, "at_s": 8.0}
    assert gpu_eight_gangs.measure_speed(tmp_path, warm_s=2.0) is None
    (tmp_path / "notes-42.jsonl").write_text(json.dumps([1000.0, 1, "train", 1, 0.0]) + "\n")
    (tmp_path / "killed.json").write_text(json.dumps({"time": 1010.5, "step": 10, **order}))
    assert gpu_eight_gangs.measure_speed(tmp_path, warm_s=2.0) is None  # the living gang still trains
    leave_training(tmp_path, 0, begun=1000.0, rates=[1.0] * 2 + [100.0] * 9 + [90.0] * 9 + [101.0] * 6, attempt=1)
    found = gpu_eight_gangs.measure_speed(tmp_path, warm_s=2.0)
    assert found is not None
    assert (found["before"]["samples"], found["before"]["median"]) == (9, 100.0)  # steps that began from 2 to 10 s
    assert found["gone_slower_percent"] == pytest.approx(10.0)
    assert (found["both"], found["again_after_s"], found["alone"]) == (None, None, None)
    leave_training(tmp_path, 42, begun=1020.0, rates=[125.0] * 20, attempt=2)
    found = gpu_eight_gangs.measure_speed(tmp_path, warm_s=2.0)
    assert found is not None
    assert found["again_after_s"] == pytest.approx(9.5)
    assert (found["gone"]["samples"], found["both"]["samples"]) == (9, 6)
    assert found["both_slower_percent"] == pytest.approx(-1.0)
    assert found["alone"]["samples"] == 14  # those that began after the other's last step, at 1025 s
    assert found["together_slower_percent"] == pytest.approx(20.0)


def test_a_gang_waits_with_its_death_until_the_other_has_come_as_far(tmp_path: Path) -> None:
    order = gpu_eight_gangs.Order(seed=42, rank=0, other=0, at_s=5.0)
    assert not gpu_eight_gangs.has_come(tmp_path, order)
    lines = [json.dumps([1000.0, 1, "train", 9, 4.9]), json.dumps([1001.0, 1, "train", 10, 5.0])]
    (tmp_path / "notes-0.jsonl").write_text(lines[0] + "\n" + lines[1])  # the second is not whole yet
    assert not gpu_eight_gangs.has_come(tmp_path, order)
    (tmp_path / "notes-0.jsonl").write_text("\n".join([*lines, ""]))
    assert gpu_eight_gangs.has_come(tmp_path, order)


@pytest.mark.parametrize(
    ("seed", "rank", "attempt", "wanted"),
    [(42, 1, 1, [12]), (42, 0, 1, []), (42, 1, 2, []), (0, 1, 1, [])],  # the step at which a rank dies
)
def test_only_the_rank_that_was_named_dies_and_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, rank: int, attempt: int, wanted: list[int]
) -> None:
    def train(rank: Any) -> None:
        rank.report("start", 0, None, {})
        for step in range(1, 15):
            if step == 12:  # from here on the other gang has come as far
                (tmp_path / "notes-0.jsonl").write_text(json.dumps([1000.0, 1, "train", 10, 5.0]) + "\n")
            rank.report("train", step, None, {"elapsed_s": 0.5 * step})

    died: list[int] = []
    order = gpu_eight_gangs.Order(seed=42, rank=1, other=0, at_s=5.0)
    (tmp_path / "kill.json").write_text(json.dumps(order._asdict()))
    monkeypatch.setattr("runner.gang.worker.run_pipeline", train)
    monkeypatch.setattr(
        gpu_eight_gangs.os, "kill", lambda *_: died.append(gpu_eight_gangs.read_killed(tmp_path)["step"])
    )
    job = SimpleNamespace(out=str(tmp_path), key=SimpleNamespace(seed=seed), attempt=attempt)
    gpu_eight_gangs.work(SimpleNamespace(job=job, rank=rank, report=lambda *_: None))  # type: ignore[arg-type]
    assert died[:1] == wanted
    assert (tmp_path / f"notes-{seed}.jsonl").exists() == (rank == 0 or seed == 0)


def test_both_specs_are_those_that_were_asked_for(tmp_path: Path) -> None:
    args = arguments(tmp_path, "--overrides", "{ttt: {lora_rank: 8}}")
    whole = parse_spec(gpu_eight_parts.published_spec(args))
    assert (whole.preset, whole.gang.gpus, whole.gang.cpus, whole.seeds) == ("published", 8, 8, (42,))
    assert (whole.config.train.budget_s, whole.config.train.batch_tokens) == (240.0, 786_432)
    assert (whole.config.data.val_documents, whole.config.ttt.lora_rank) == (1500, 8)
    halves = parse_spec(gpu_eight_parts.gangs_spec(args))
    assert (halves.gang.gpus, halves.seeds, halves.limits.attempts) == (4, (42, 0), 2)
    assert (halves.config.train.budget_s, halves.config.train.loop_start_frac) == (30.0, 1.0)
    assert halves.config.runtime.attention == whole.config.runtime.attention == "triton"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--gpus", "8"], "8 GPUs are needed, 0 are here; see --gpus"),
        (["--device", "cpu", "--gpus", "8", "--cpus", "1000"], "--gpus 8 ranks of --cpus 1000 need more than the "),
        (["--device", "cpu", "--gpus", "1", "--cpus", "1"], "--gpus 1 makes no two gangs; name the other --parts"),
        (["--device", "cpu", "--gpus", "1", "--cpus", "1", "--parts", "plan"], "corpus has 2 tokenizers (*.model)"),
    ],
)
def test_what_the_machine_lacks_is_said_in_one_line(
    tmp_path: Path, options: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    args = arguments(tmp_path)
    (args.corpus / "second.model").touch()
    code = gpu_eight.main([str(args.corpus), str(args.out), "--work", str(args.work), *options])
    said = capsys.readouterr()
    assert (code, said.out, said.err.count("\n")) == (2, "", 1)
    assert line in said.err
    assert not args.work.exists()


def test_a_part_that_fails_or_finds_no_time_leaves_a_row_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_session: object, _until: float) -> bool:
        raise OSError("no room")

    def plan(session: gpu_eight.Session, _until: float) -> bool:
        session.add("plan", "plan", gang=1, slots="slots: 2", exit_code=2, problems=["no shard"])
        return True

    args = arguments(tmp_path, "--device", "cpu", "--limit_s", "40")
    needs = [Need("published", 1.0, 20.0), Need("scale", 60.0, 70.0), Need("plan", 1.0, 20.0)]
    for name, value in {"why_unfit": "", "make_needs": needs, "parse_arguments": args}.items():
        monkeypatch.setattr(gpu_eight, name, lambda _given, value=value: value)
    monkeypatch.setattr(gpu_eight, "PARTS", {"published": fail, "plan": plan})
    assert gpu_eight.main([]) == 1
    rows = read_rows(args.out / "rows.jsonl")
    wanted = [("machine", "machine"), ("published", "error"), ("scale", "none"), ("plan", "plan")]
    assert [(row["part"], row["row"]) for row in rows] == wanted
    assert sorted(path.name for path in args.out.iterdir()) == ["records.tar.xz", "rows.jsonl", "summary.md"]
    said = capsys.readouterr().out
    assert re.search(r"Left out: scale, (3[0-9]|40) s were left\.", said)
    assert "slots: 2; exit code 2; no shard" in said
    assert "Failed: published, OSError: no room." in said


def test_what_still_runs_at_the_end_of_a_share_is_ended_even_if_looking_fails(tmp_path: Path) -> None:
    def sleep(name: str) -> Any:
        return start_process(["-c", "import time; time.sleep(600)"], tmp_path / f"{name}.log")

    args = arguments(tmp_path)
    session = gpu_eight.Session(args, time.monotonic())
    process = sleep("long")
    assert gpu_eight_parts.wait_for(session, [process], session.now() + 0.2)
    assert process.returncode not in (0, None)
    process = sleep("other")
    with pytest.raises(ZeroDivisionError):
        gpu_eight_parts.wait_for(session, [process], session.now() + 60, look=lambda: 1 / 0)
    assert process.returncode not in (0, None)


def test_a_process_that_does_not_end_when_asked_is_killed_with_its_group(tmp_path: Path) -> None:
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    )
    process = start_process(["-c", code], tmp_path / "deaf.log")
    deadline = time.monotonic() + 60
    while "deaf" not in (tmp_path / "deaf.log").read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    end_processes([process], stop_s=0.2)
    assert process.returncode == -9


def fake_bench(args: Namespace, gpus: int) -> list[str]:
    """Return a command that leaves a committed report: a real measurement on two CPU cores takes minutes."""
    copy = f"import shutil; shutil.copy({str(REPORT)!r}, {str(args.work / f'scale-{gpus}.json')!r})"
    return ["-c", copy]


@pytest.mark.slow
def test_a_rehearsal_on_two_cpu_ranks_leaves_every_row_and_the_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus, out, work = (tmp_path / name for name in ("corpus", "out", "work"))
    write_data(corpus)
    shutil.copy(TOKENIZER, corpus)
    settings = smallest(vocab_size=8192)
    settings["train"] = {**settings["train"], "max_steps": 20_000, "reserve_s": 0.0}
    monkeypatch.setattr(gpu_eight_parts, "bench_command", fake_bench)
    code = gpu_eight.main([
        str(corpus), str(out), "--work", str(work), "--device", "cpu", "--gpus", "2", "--cpus", "1", "--preset", "tiny",
        "--budget_s", "1.5", "--gang_s", "6", "--documents", "4", "--limit_s", "280",
        "--overrides", json.dumps(settings),
    ])  # fmt: skip
    rows = read_rows(out / "rows.jsonl")
    assert code == 0, rows
    names = [(row["part"], row["row"]) for row in rows]
    published = [("published", row) for row in ("start", "train", "quantize", "evaluate", "ttt", "end")]
    assert names[: 1 + len(published)] == [("machine", "machine"), *published]
    by_name = dict(zip(names, rows))
    train, ttt = by_name["published", "train"], by_name["published", "ttt"]
    assert train["steps"] >= 1
    assert train["batch_tokens"] == 512
    assert train["rates"]["looped"]["median"] > 0
    assert 0 < ttt["documents"] <= 4
    assert ttt["passes_s"].keys() == {"ttt_lr0", "post_ttt"}
    assert by_name["published", "start"]["all_reduce_bytes_per_s"] > 0
    assert [row["gpus"] for row in rows if row["row"] == "rates"] == [1, 2]
    fates, speed = by_name["gangs", "fates"], by_name["gangs", "speed"]
    assert (fates["killed"]["seed"], fates["killed"]["rank"]) == (42, 0)
    assert {seed: (fate["state"], fate["attempts"]) for seed, fate in fates["fates"].items()} == {
        "42": ("DONE", 2), "0": ("DONE", 1),
    }  # fmt: skip
    assert "SIGKILL" in fates["fates"]["42"]["failures"][0]
    assert speed["before"]["samples"] > 0
    assert speed["gone"]["samples"] > 0
    assert [row["slots"] for row in rows if row["row"] == "plan"] == [f"slots: {n} gang(s) at once" for n in (1, 2)]
    assert (out / "summary.md").read_text() == summarize(rows)
    assert read_fates(work / "gangs")[42]["attempts"] == 2


@pytest.mark.parametrize(
    ("visible", "wanted"), [(None, ["0", "1", "2", "3"]), ("2, 3", ["2", "3"]), ("GPU-a", ["GPU-a"]), ("", [])]
)
def test_only_the_gpus_that_the_environment_names_are_used(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, wanted: list[str]
) -> None:
    count = 4 if visible is None else sum(bool(name.strip()) for name in visible.split(","))
    monkeypatch.setattr("runner.machine.gpus.count_gpus", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert list_gpus() == wanted
