"""The checks of logs and code alone: each finds its made-up fault with its value and its limit, and nothing else."""

from __future__ import annotations

import ast
import base64
import json
import lzma
import re
from pathlib import Path
from typing import Any

import pytest

from results.findings.code_files import read_code
from results.findings.findings import Finding
from results.findings.importer import read_submission
from results.findings.known_texts import FINGERPRINTS, KNOWN_TEXTS
from results.findings.review import find_disagreements
from tests.made_folders import Made, made_log, write_folder

SP8192, CASEOPS = 2.583104, 2.188371


def stage(bpb: float, ratio: float = SP8192, seconds: float = 60.0) -> dict[str, Any]:
    """Return one stage of a run."""
    return {"val_bpb": bpb, "val_loss_nats": round(bpb * ratio, 8), "seconds": seconds, "label": "made up"}


def run_of(seed: int, bpb: float = 1.08123457, **changes: Any) -> dict[str, Any]:
    """Return a run without faults, in the form of a published record."""
    losses = [[step, round(9.0 + 0.0017 * (seed % 13) - 0.01 * step + 0.0001 * (seed % 7), 4)] for step in range(1, 21)]
    run = {
        "log_file": f"train_seed{seed}.log", "seed": seed, "seed_in_log": seed, "seed_in_filename": seed, "steps": 4000,
        "train_ms": 598_000 + seed, "scored_stage": "post_ttt", "final_bpb": bpb, "final_nats": round(bpb * SP8192, 8),
        "post_quant": stage(bpb + 0.01), "post_ttt": stage(bpb), "total_bytes": 15_920_000, "model_bytes": 15_900_000,
        "code_bytes_implied": 20_000, "code_bytes_printed": {"Code size": 20_000}, "val_tokens": 40_540_160,
        "hparams": {"vocab_size": "8192", "train_batch_tokens": "786432"}, "train_losses": losses,
        "clock": [[step, 149.5 * step + seed] for step in range(1, 21)],
    }  # fmt: skip
    return {**run, **changes}


def record_of(*runs: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Return a record of these runs, three clean ones without any."""
    return {
        "pr": None,
        "folder": "made up",
        "runs": list(runs or (run_of(42), run_of(7, 1.0819), run_of(0, 1.0807))),
        **more,
    }


def only(record: dict[str, Any]) -> Finding:
    """Return the one finding of a record."""
    (finding,) = find_disagreements(json.loads(json.dumps(record)))
    return finding


def test_a_clean_record_has_no_findings() -> None:
    assert find_disagreements(record_of()) == []


# --- the text --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", KNOWN_TEXTS, ids=lambda text: text.name)
def test_the_right_byte_constant_is_no_finding(text: Any) -> None:
    right = {"val_tokens": text.val_tokens[-1], "hparams": {"vocab_size": str(text.vocab_size)}}
    stages = {"post_quant": stage(1.09, text.nats_per_bpb * (1 + 6.5e-5)), "post_ttt": stage(1.08, text.nats_per_bpb)}
    assert find_disagreements(record_of(run_of(42, 1.08, **stages, **right))) == []


def test_another_byte_constant_than_the_texts_is_found_with_the_score_it_should_be() -> None:
    stages = {"post_quant": stage(1.0169, 2.3843), "post_ttt": stage(1.0069, 2.3843)}
    finding = only(record_of(run_of(42, 1.0069, final_nats=2.40073, val_tokens=47_851_520, **stages)))
    assert (finding.check, finding.limit) == ("nats_per_bpb", CASEOPS)
    assert finding.value == pytest.approx(2.3843, abs=1e-5)
    (right,) = [value for name, value in finding.values.items() if name.endswith("with the right bytes")]
    assert right == pytest.approx(1.0970, abs=0.011)


def test_an_unknown_count_of_tokens_has_no_constant_to_compare_with() -> None:
    stages = {"post_quant": stage(1.0169, 2.4), "post_ttt": stage(1.0069, 2.4)}
    assert find_disagreements(record_of(run_of(42, 1.0069, val_tokens=51_234_567, **stages))) == []


def test_bytes_that_move_inside_one_log_are_found() -> None:
    stages = {"post_quant": stage(1.09, 2.19235), "post_ttt": stage(1.08, 2.18856)}
    finding = only(record_of(run_of(42, 1.08, val_tokens=None, **stages)))
    assert (finding.check, finding.value) == ("nats_per_bpb_drift", pytest.approx(0.00173, abs=1e-5))


def test_scores_of_four_decimals_leave_the_constant_open() -> None:
    coarse = {"val_bpb": 1.0769, "val_loss_nats": 2.7819, "seconds": 1.0, "label": "coarse"}
    assert find_disagreements(record_of(run_of(42, 1.0769, post_quant=coarse, post_ttt=coarse))) == []


def test_a_part_of_the_targets_is_found() -> None:
    stages = {"post_quant": stage(1.09, CASEOPS * 1.004), "post_ttt": stage(1.08, CASEOPS * 1.004)}
    finding = only(record_of(run_of(42, 1.08, val_tokens=9_662_464, **stages)))
    assert (finding.check, finding.value, finding.limit) == ("val_tokens", 9_662_464, 47_851_520)
    assert finding.field.startswith("20.2% of the validation targets of SP8192 CaseOps")


def test_seeds_that_scored_different_numbers_of_targets_are_found() -> None:
    finding = only(
        record_of(
            run_of(42), run_of(7, 1.0819, val_tokens=62_021_632, post_quant=None, post_ttt=stage(1.0819, 1.688458))
        )
    )
    assert finding.check == "val_tokens"


@pytest.mark.parametrize("has_leak", [True, False])
def test_losses_of_shards_with_validation_documents_are_known(has_leak: bool) -> None:
    (mark,) = [mark for mark in FINGERPRINTS if mark.has_validation_documents == has_leak]
    stages = {"post_quant": stage(1.09, CASEOPS), "post_ttt": stage(1.08, CASEOPS)}
    runs = [run_of(seed, 1.08 + seed / 1e5, val_tokens=47_851_520, train_losses=[[1, mark.losses[seed]]], **stages)
            for seed in (42, 0)]  # fmt: skip
    found = find_disagreements(record_of(*runs))
    assert [finding.check for finding in found] == (["first_loss_of_shards"] if has_leak else [])


# --- logs against each other -----------------------------------------------------------------------------------------


def test_nearly_equal_logs_of_different_seeds_are_one_finding() -> None:
    losses = run_of(42)["train_losses"]
    changed = [[step, loss + 0.0003] if step > 17 else [step, loss] for step, loss in losses]
    finding = only(
        record_of(run_of(42), run_of(7, 1.0819, train_losses=losses), run_of(0, 1.0807, train_losses=changed))
    )
    assert (finding.check, finding.value, finding.limit) == ("near_duplicate_logs", 1.0, 0.5)
    assert finding.values["seeds 0 and 42"] == "17 of 20 logged losses are equal"


def test_seeds_that_start_with_one_loss_are_found() -> None:
    start = [[1, 9.0087], [2, 9.1203], [3, 8.9012]]
    runs = [run_of(42, train_losses=[*start, [500, 3.2]]), run_of(7, 1.0819, train_losses=[*start, [500, 3.3]])]
    finding = only(record_of(*runs))
    assert (finding.check, finding.value) == ("first_loss", 9.0087)
    assert finding.field.startswith("seeds 7 and 42 ") or finding.field.startswith("seeds 42 and 7 ")


def test_one_equal_first_loss_may_be_chance() -> None:
    other = [[1, 9.0087], [2, 9.3], [3, 8.8]]
    runs = [run_of(42, train_losses=[[1, 9.0087], [2, 9.1203], [3, 8.9]]), run_of(7, 1.0819, train_losses=other)]
    assert find_disagreements(record_of(*runs)) == []


def test_logs_of_one_seed_that_start_with_different_losses_are_found() -> None:
    again = run_of(42, log_file="rerun_seed42.log", train_losses=[[1, 9.0073]])
    finding = only(record_of(run_of(42, train_losses=[[1, 9.0087]]), again))
    assert (finding.seed, finding.check, finding.value, finding.limit) == (42, "first_loss", 9.0073, 9.0087)


def test_logs_of_one_seed_with_different_scores_are_found() -> None:
    again = run_of(42, 1.0832, log_file="rerun_seed42.log")
    finding = only(record_of(run_of(42), again))
    assert (finding.seed, finding.check, finding.value, finding.limit) == (42, "several_logs", 2, 1)
    assert find_disagreements(record_of(run_of(42), {**run_of(42), "log_file": "copy_seed42.log"})) == []


def test_many_settings_that_differ_are_one_finding() -> None:
    other = dict.fromkeys(("matrix_lr", "beta", "num_layers", "model_dim"), "1") | {"vocab_size": "8192"}
    runs = [run_of(42, hparams=dict.fromkeys(other, "2") | {"vocab_size": "8192", "quantize": "12.1s"}),
            run_of(7, 1.0819, hparams={**other, "quantize": "12.2s"})]  # fmt: skip
    finding = only(record_of(*runs))
    assert (finding.check, finding.value) == ("one_configuration", 4)


def test_a_clock_that_runs_backwards_is_found() -> None:
    clock = [[1, 120], [500, 60_123], [1000, 55_017], [1500, 180_211]]
    finding = only(record_of(run_of(42, clock=clock)))
    assert (finding.check, finding.value, finding.limit) == ("clock_ms", 55_017, 60_123)


@pytest.mark.parametrize("clock", [
    [[1, 0], [500, 60_000], [501, 57_213]],  # a tenth of a minute, then milliseconds
    [[4000, 598_000], [1, 120], [500, 60_000]],  # a second run in the same file
    [[1, 0], [2, 0], [3, 0]],
])  # fmt: skip
def test_clocks_of_other_units_and_new_runs_do_not_run_backwards(clock: list[list[float]]) -> None:
    assert find_disagreements(record_of(run_of(42, clock=clock))) == []


@pytest.mark.parametrize(("rate", "checks"), [(786_432 / 0.15, []), (2 * 786_432 / 0.15, ["tokens_per_second"])])
def test_tokens_per_second_are_steps_times_tokens_over_time(rate: float, checks: list[str]) -> None:
    clock = [[step, 150.0 * step] for step in (500, 1000, 1500)]
    run = run_of(42, clock=clock, token_rates=[[step, rate] for step, _ in clock])
    assert [finding.check for finding in find_disagreements(record_of(run))] == checks


# --- seeds that are left out -----------------------------------------------------------------------------------------


def test_worse_seeds_that_are_left_out_are_found() -> None:
    runs = [run_of(seed, bpb) for seed, bpb in ((1, 1.0801), (2, 1.0802), (3, 1.0803), (4, 1.0890))]
    finding = only(record_of(*runs, submission_json={"val_bpb": 1.0802, "seeds": [1, 2, 3]}))
    assert (finding.check, finding.value, finding.limit) == (
        "seed_selection", pytest.approx(1.0802), pytest.approx(1.0824),
    )  # fmt: skip


def test_worse_seeds_left_out_of_a_folders_mean_are_found(tmp_path: Path) -> None:
    scores = {1: 1.1151, 2: 1.1152, 3: 1.1153, 4: 1.1250}
    logs: dict[str, str | bytes] = {
        f"train_seed{seed}.log": made_log(Made(seed=seed, sliding=score)) for seed, score in scores.items()
    }
    results = {str(seed): {"val_bpb": scores[seed]} for seed in (1, 2, 3)}
    submission = {"val_bpb": 1.1152, "seeds": [1, 2, 3], "seed_results": results}
    folder = write_folder(tmp_path / "record", logs, submission=submission)
    finding = only(read_submission(folder).record)
    assert (finding.check, finding.values["seed 4"]) == ("seed_selection", 1.125)


def test_a_headline_that_is_the_mean_of_the_lowest_seeds_is_found() -> None:
    runs = [run_of(seed, bpb) for seed, bpb in ((1, 1.0801), (2, 1.0812), (3, 1.0823), (4, 1.0890))]
    finding = only(record_of(*runs, submission_json={"val_bpb": 1.08065}))
    assert finding.check == "seed_selection"
    assert "2 lowest of 4" in finding.field


def test_better_seeds_that_are_left_out_are_no_selection() -> None:
    runs = [run_of(seed, bpb) for seed, bpb in ((1, 1.0801), (2, 1.0802), (3, 1.0780))]
    assert find_disagreements(record_of(*runs, submission_json={"val_bpb": 1.08015, "seeds": [1, 2]})) == []


# --- the code --------------------------------------------------------------------------------------------------------

SCRIPT = """
import os
import helper_math
from os import environ

class Hyperparameters:
    vocab_size = int(os.environ.get("VOCAB_SIZE", 1024))
    matrix_lr = float(os.environ.get("MATRIX_LR", 0.02))
    max_wallclock_seconds = float(os.environ["MAX_WALLCLOCK_SECONDS"])
    iterations = int(os.getenv("ITERATIONS", "20000"))
    beta = float(environ.get("MUON_BETA", "0.95"))
    data_path = os.environ.get("DATA_PATH", "./data")

rank = int(os.environ["RANK"])
alpha = float(os.environ.get("TTT_LORA_ALPHA", "144"))
if os.getenv("SMEAR_GATE_BOS_FIX", "1") == "1":
    pass
"""
LOGGED = (("vocab_size", "8192"), ("matrix_lr", "0.022"), ("max_wallclock_seconds", "600.0"), ("iterations", "20000"),
          ("beta", "0.95"))  # fmt: skip


def folder_with_code(
    path: Path, script: str = SCRIPT, helper: str = "def f(): pass\n", counted: int | None = None
) -> Path:
    """Write a folder with a log, a script and a helper; by default the log counts both."""
    code_bytes = len(script) + len(helper) if counted is None else counted
    folder = write_folder(path / "record", {"train_seed42.log": made_log(Made(settings=LOGGED, code_bytes=code_bytes))})
    (folder / "train_gpt.py").write_text(script)
    (folder / "helper_math.py").write_text(helper)
    return folder


def test_settings_that_are_not_logged_are_found(tmp_path: Path) -> None:
    finding = only(read_submission(folder_with_code(tmp_path)).record)
    assert (finding.check, finding.value, finding.limit) == ("hidden_settings", 2, 0)
    assert finding.values["names"] == "SMEAR_GATE_BOS_FIX, TTT_LORA_ALPHA"


def test_settings_of_a_packed_script_are_read(tmp_path: Path) -> None:
    packed = base64.b85encode(
        lzma.compress((SCRIPT + "\n".join(f"x{i} = {i * 7919}" for i in range(1500))).encode())
    ).decode()
    script = f"import base64, lzma\nexec(lzma.decompress(base64.b85decode({packed!r})))\n"
    assert len(packed) > 2000
    folder = folder_with_code(tmp_path, script)
    assert "TTT_LORA_ALPHA" in read_code(folder)["settings"]
    assert "helper_math.py" in read_code(folder)["helpers"]


def test_a_log_without_a_dump_hides_nothing(tmp_path: Path) -> None:
    folder = folder_with_code(tmp_path)
    (folder / "train_seed42.log").write_text(made_log(Made(settings=LOGGED[:1], code_bytes=len(SCRIPT) + 14)))
    assert find_disagreements(read_submission(folder).record) == []


def test_helper_modules_that_are_not_counted_are_found(tmp_path: Path) -> None:
    helper = "TABLE = [" + ", ".join(str(i * 7919 % 10007) for i in range(4000)) + "]\n"
    script = SCRIPT.replace("TTT_LORA_ALPHA", "BETA").replace("SMEAR_GATE_BOS_FIX", "ITERATIONS")
    finding = only(read_submission(folder_with_code(tmp_path, script, helper, counted=len(script))).record)
    assert finding.check == "helper_code_bytes"
    assert (finding.value, finding.limit) == (15_900_000 + len(script) + len(helper), 16_000_000)
    assert finding.values["helper_math.py"] == len(helper)


def test_code_that_is_not_python_is_passed_over(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "record")
    (folder / "train_gpt.py").write_bytes(b"\x00\xff not python (")
    assert read_code(folder)["settings"] == {}


def test_every_check_is_in_the_documents() -> None:
    root = Path(__file__).parent.parent
    text = (root / "docs" / "imports.md").read_text()
    rows = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    trees = [ast.parse(path.read_text()) for path in sorted((root / "results" / "findings").glob("*.py"))]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    made = [call.args for call in calls if isinstance(call.func, ast.Name) and call.func.id == "Finding"]
    named = {args[3].value for args in made if len(args) > 3 and isinstance(args[3], ast.Constant)}
    assert rows == {*named, "printed_figure"}
