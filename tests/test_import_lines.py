"""results.published.lines, stages and sizes: what each form of line means, and which of several lines counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from results.published.log import parse_runs, seed_in_name, stage_of
from tests.made_folders import made_log, nats, parse_log, score_line


def scores(text: str) -> dict[str, float]:
    """Return the bits per byte of a log's stages."""
    run = parse_log(text, "train_seed42.log").run
    stages = ("post_ema", "post_quant", "sliding", "post_ttt", "ttt_lr0")
    return {stage: run[stage]["val_bpb"] for stage in stages if run[stage]}


def others(text: str) -> list[tuple[str, float]]:
    """Return label and bits per byte of a log's other scores."""
    run = parse_log(text, "train_seed42.log").run
    return [(entry["label"], entry["bpb"]) for entry in run["other_scores"]]


def pair(label: str, bpb: float, rest: str = "") -> str:
    return score_line(label, bpb, time_ms=None) + rest


@pytest.mark.parametrize("last", [
    "final_int8_zlib_roundtrip", "final_int8_zlib_roundtrip_exact", "final_int6_lzma_roundtrip_exact",
    "final_brotli_roundtrip", "final_int8_zlib_roundtrip_exact: ",
])  # fmt: skip
@pytest.mark.parametrize("final", ["final_int6_sliding_window_exact", "legal_ttt_exact", "final_ngram9_exact"])
def test_a_roundtrip_line_that_repeats_a_later_pass_is_no_roundtrip(last: str, final: str) -> None:
    text = "\n".join([pair("final_int6_roundtrip_exact", 1.155), pair(final, 1.131), pair(last, 1.131)])
    assert scores(text)["post_quant"] == 1.155
    assert 1.131 in [*scores(text).values(), *(bpb for _, bpb in others(text))]


def test_a_repeat_printed_with_fewer_decimals_is_one() -> None:
    text = "\n".join([
        pair("final_int6_roundtrip_exact", 1.155), pair("final_int6_sliding_window_exact", 1.13104321),
        "final_int8_zlib_roundtrip val_loss:1.9100 val_bpb:1.1310 eval_time:9ms",
        pair("final_int8_zlib_roundtrip_exact", 1.13104321),
    ])  # fmt: skip
    assert scores(text) == {"post_quant": 1.155, "sliding": 1.13104321}


def test_a_roundtrip_line_alone_that_repeats_the_sliding_score_gives_no_roundtrip() -> None:
    text = pair("final_int6_sliding_window_exact", 1.131) + "\n" + pair("final_int8_zlib_roundtrip_exact", 1.131)
    assert scores(text) == {"sliding": 1.131}


def test_a_later_and_exacter_line_of_the_same_label_counts() -> None:
    text = "final_int8_zlib_roundtrip val_loss:2.07 val_bpb:1.22\n" + pair("final_int8_zlib_roundtrip_exact", 1.2243657)
    assert scores(text) == {"post_quant": 1.2243657}


@pytest.mark.parametrize(
    ("rest", "stage"),
    [
        (" eval_mode:score_first_ttt", "post_ttt"), (" eval_time:9ms eval_mode:legal_ttt", "post_ttt"),
        (" eval_mode:sliding_window", "sliding"), (" eval_mode:standard", "post_quant"),
    ],
)  # fmt: skip
def test_the_evaluation_mode_behind_a_score_names_its_stage(rest: str, stage: str) -> None:
    assert scores(pair("final_int8_zlib_roundtrip", 1.11, rest)) == {stage: 1.11}


@pytest.mark.parametrize("label", [
    "pre_quant_eval", "post_swa", "post_average", "post-averaging", "raw", "raw_eval", "pre-quantization", "prequant",
    "DIAGNOSTIC post_swa", "pre_quantization_exact", "unquantized", "after ema", "before quantization", "pre_gptq_eval",
    "final_ema", "post_lawa",
])  # fmt: skip
def test_weights_before_quantization_are_one_stage(label: str) -> None:
    assert stage_of(label) == "post_ema"


def test_raw_weights_do_not_replace_averaged_ones() -> None:
    lines = [score_line("raw", 1.121), score_line("post_ema", 1.119)]
    for order in (lines, lines[::-1]):
        text = made_log(swap={"post_ema": order})
        assert scores(text)["post_ema"] == 1.119
        assert others(text) == [("raw", 1.121)]


@pytest.mark.parametrize("label", [
    "final_slot_exact", "final_slot", "ngram_mixed", "final_ppm_exact", "knn_lm", "final", "final_exact", "baseline",
    "hedge_mixer", "final_cache_exact", "etlb",
])  # fmt: skip
def test_an_unknown_label_is_kept_as_another_score(label: str) -> None:
    text = made_log(more=score_line(label, 0.968))
    assert others(text) == [(label, 0.968)]
    assert scores(text) == {"post_ema": 1.119, "post_quant": 1.13, "sliding": 1.115}


@pytest.mark.parametrize("label", [
    "final_ppm_sliding_window_exact", "final_sliding_window_ngram9", "quantized_sliding_window_slot", "sliding_s64",
    "final_int6_sliding_window_s64_exact", "quantized_sliding_window T=0.98", "sliding_window_unpaid",
    "final_int8_zlib_roundtrip_ngram9_exact", "final_int6_roundtrip_ppm", "quantized_ttt_slot", "DIAGNOSTIC post_ttt",
    "prequant_ttt", "final_knn_roundtrip_exact",
])  # fmt: skip
def test_a_known_word_with_another_one_is_kept_beside_its_stage(label: str) -> None:
    text = made_log(ttt=1.111, more=score_line(label, 1.143))
    assert scores(text) == {"post_ema": 1.119, "post_quant": 1.13, "sliding": 1.115, "post_ttt": 1.111}
    assert others(text) == [(label, 1.143)]


@pytest.mark.parametrize(
    ("label", "stage"),
    [
        ("final_int6", "post_quant"), ("int8_zlib", "post_quant"), ("after quantization", "post_quant"),
        ("post-quant", "post_quant"), ("Quantized model", "post_quant"), ("dequantized_eval", "post_quant"),
        ("pre-TTT", "post_quant"), ("no_ttt", "post_quant"), ("sliding_eval", "sliding"),
        ("pre-ttt sliding", "sliding"), ("final_sliding_window:done", "sliding"), ("ttt_sliding:done", "post_ttt"),
        ("legal_ttt", "post_ttt"), ("ema", "post_ema"), ("TTT", "post_ttt"), ("doc_ttt_lora", "post_ttt"),
        ("final", None), ("seed 42", None),
    ],
)  # fmt: skip
def test_labels_are_read_word_by_word(label: str, stage: str | None) -> None:
    assert stage_of(label) == stage


@pytest.mark.parametrize("line", [
    f"quantized sliding val_loss:{nats(1.115):.8f} sliding val_bpb:1.11500000 eval_time:90000ms",
    f"final_sliding | val_loss:{nats(1.115):.8f} | val_bpb:1.11500000 | time:90000ms",
    f"final_sliding val_bpb:1.11500000 val_loss:{nats(1.115):.8f} elapsed:90.0s",
    f"quantized sliding: loss={nats(1.115):.8f}, bpb=1.11500000, eval_time=90s",
    f'{{"stage": "sliding", "val_loss": {nats(1.115):.8f}, "val_bpb": 1.115, "eval_time_ms": 90000}}',
])  # fmt: skip
def test_words_and_signs_inside_a_score_line_do_not_hide_it(line: str) -> None:
    entry = parse_log(line, "train_seed42.log").run["sliding"]
    assert (entry["val_bpb"], round(entry["val_loss_nats"], 8)) == (1.115, round(nats(1.115), 8))


@pytest.mark.parametrize(
    ("line", "stage", "bpb", "nats_"),
    [
        ("Quantized BPB: 1.045200", "post_quant", 1.0452, None),
        ("ttt vl:0.8112 bpb:0.4801 t:412000ms", "post_ttt", 0.4801, 0.8112),
        ("Sliding window val_bpb = 1.1150", "sliding", 1.115, None),
        ("sliding_val_bpb: 1.1150", "sliding", 1.115, None),
        ("quantized_bpb=1.1300", "post_quant", 1.13, None),
        ("TTT BPB (exact): 1.1110", "post_ttt", 1.111, None),
    ],
)  # fmt: skip
def test_a_named_score_without_nats_is_read(line: str, stage: str, bpb: float, nats_: float | None) -> None:
    entry = parse_log(line, "train_seed42.log").run[stage]
    assert (entry["val_bpb"], entry["val_loss_nats"]) == (bpb, nats_)


@pytest.mark.parametrize("line", [
    "ttt_chunk 10/100 val_loss:2.8 val_bpb:1.1", "sliding_eval [ 50.0%] 100/200 windows running_bpb:1.2",
    "ttt_progress: batch 779/782 batch_loss:2.6576 batch_bpb:1.0825", "TTT gain bpb: 0.0024", "mean val_bpb: 1.115",
    "target bpb: 1.1", "#   final_roundtrip_exact val_loss:2.1 val_bpb:1.2", "ttt batch 5 bpb: 1.2",
    "#   final_roundtrip_exact val_loss:... val_bpb:...", "quantized val_loss:... val_bpb:...",
    "improvement over baseline bpb: 0.01", "  sliding doc 100 bpb:1.3",
])  # fmt: skip
def test_progress_differences_and_comments_are_no_scores(line: str) -> None:
    assert scores(made_log(more=line)) == {"post_ema": 1.119, "post_quant": 1.13, "sliding": 1.115}
    assert others(made_log(more=line)) == []


RAW = ["Serialized model: 67224983 bytes", "Code size: 20000 bytes", "Total submission size: 67244983 bytes"]


@pytest.mark.parametrize(
    "lines",
    [
        ["Serialized model int6+zlib: 15900000 bytes", "Total submission size: 15920000 bytes"],
        ["Serialized model int6+zlib: 15900000 bytes", "Total submission size int6+zlib:15920000bytes"],
        ["Serialized model int6+brotli: 15900000 bytes total: 15920000 bytes"],
        ["artifact: 15900000 bytes  code: 20000 bytes  total: 15920000 bytes"],
        ["Compressed model: 15,900,000 bytes", "Total submission: 15920000 bytes"],
        ["Serialized model (int6+zstd): 15900000 bytes", "Total artifact size: 15,920,000 bytes"],
        ["Serialized model int8+zlib: 15900000 bytes", "Total: 15920000 bytes (15.92 MB)"],
        ["Serialized model int8+zlib: 15900000 bytes (payload:17178912 raw_torch:17224025)", "bytes_total: 15920000"],
        ["serialized_model_int6_lzma: 15900000 bytes", "total_submission_size: 15920000 bytes"],
        ["model: 15900000 bytes, code: 20000 bytes, total: 15920000 bytes"],
        ["Compressed model: 15.90 MB (15900000 bytes)", "Total submission size: 15.92 MB (15920000 bytes)"],
        ["Compressed size: 15900000 bytes", "Total submission size (model + code): 15920000 bytes"],
        ["Serialized model int6+xz: 15900000 bytes", "size_check total=15920000 limit=16000000"],
    ],
)
def test_size_lines_of_every_form_are_read(lines: list[str]) -> None:
    for before in ([], RAW):
        run = parse_log(made_log(swap={"raw": before, "sizes": lines}), "train_seed42.log").run
        assert (run["model_bytes"], run["total_bytes"]) == (15_900_000, 15_920_000)


@pytest.mark.parametrize("line", [
    "budget:15920000/16000000 (15.92/16.00MB) FITS", "Total submission: 15920000 bytes", "submission_bytes: 15920000",
    "Total submission size: 15920000 bytes", "size 15,920,000 / 16,000,000 bytes", "artifact_bytes=15920000",
    "Artifact size: 15920000 bytes", "final artifact: 15920000 bytes",
])  # fmt: skip
def test_a_total_without_a_model_line_is_read(line: str) -> None:
    run = parse_log(made_log(swap={"sizes": line}), "train_seed42.log").run
    assert (run["model_bytes"], run["total_bytes"]) == (None, 15_920_000)


@pytest.mark.parametrize("lines", [
    RAW, ["Total code size: 20000 bytes"], ["Total training tokens: 15920000"], ["total val bytes: 151078222 bytes"],
    ["Total submission size: 15.92 MB"], ["peak memory total: 40019 bytes MiB"],
])  # fmt: skip
def test_other_sizes_are_not_the_artifact(lines: list[str]) -> None:
    assert parse_log(made_log(swap={"raw": [], "sizes": lines}), "train_seed42.log").run["total_bytes"] is None


@pytest.mark.parametrize(
    ("line", "steps", "ms"),
    [
        ("step:20000/20000 val_loss:2.8930 val_bpb:1.1200 train_time:265657ms step_avg:13.28ms", 20_000, 265_657),
        ("20000/20000 val_loss: 2.8930 val_bpb: 1.1200 train_time: 265.657s", 20_000, 265_657),
        ("Step 9000/9000 | val_loss:2.1012 | val_bpb:1.1200 | train_time:598000ms", 9000, 598_000),
        ("[step 9000/9000] val_loss=2.1012 val_bpb=1.1200 train_time=598000ms", 9000, 598_000),
        ("step:7000/20000 val_loss:2.8930 val_bpb:1.1200 train_time:598000ms step_avg:85.4ms", 7000, 598_000),
    ],
)
def test_a_run_without_a_stop_line_ends_at_its_last_validation(line: str, steps: int, ms: int) -> None:
    run = parse_log(made_log(swap={"live": line, "stop": []}), "train_seed42.log").run
    assert (run["steps"], run["train_ms"], run["live_weights_bpb_at_stop"]) == (steps, ms, 1.12)


def test_other_scores_at_a_step_are_not_the_live_one() -> None:
    lines = [
        score_line(f"step:4000/20000 {words}", bpb) for words, bpb in (("", 1.12), ("ema", 1.119), ("roundtrip", 1.14))
    ]
    run = parse_log(made_log(post_ema=None, swap={"live": lines}), "train_seed42.log").run
    assert (run["live_weights_bpb_at_stop"], run["post_ema"]["val_bpb"]) == (1.12, 1.119)
    assert run["post_quant"]["val_bpb"] == 1.13  # the line behind training counts
    assert run["steps"] == 4000


@pytest.mark.parametrize(
    ("line", "ms"),
    [
        ("stopping_early: wallclock_cap train_time:598000ms step:4000/20000", 598_000),
        ("stopping_early:wallclock_cap step: 4000/20000 train_time: 598.0s", 598_000),
        ("Stopped early at step 4000 after 598.0s", 598_000),
        ("wallclock cap reached at step 4000 (598.0s)", 598_000),
        ("Training complete: 4000 steps in 598.0s", 598_000),
        ("training done steps=4000 time=598000ms", 598_000),
        ("Training finished at step 4000, elapsed 598000 ms", 598_000),
    ],
)
def test_lines_that_say_where_training_stopped(line: str, ms: int) -> None:
    run = parse_log(made_log(swap={"stop": line}), "train_seed42.log").run
    assert (run["steps"], run["train_ms"]) == (4000, ms)


@pytest.mark.parametrize(
    "line", ["sliding eval time: 90.0s", "sliding_window_eval_time:90000ms", "sliding time: 90.0 s"]
)
def test_the_time_of_a_stage_may_have_a_line_of_its_own(line: str) -> None:
    score = score_line("quantized_sliding_window", 1.115, time_ms=None)
    run = parse_log(made_log(swap={"sliding": [score, line]}), "train_seed42.log").run
    assert (run["eval_times"]["sliding"], run["sliding"]["seconds"]) == (90_000, 90.0)


@pytest.mark.parametrize("wrap", [
    lambda line: json.dumps({"log": line + "\n", "stream": "stdout", "time": "2026-03-20T12:00:00Z"}),
    lambda line: json.dumps({"level": "info", "message": line}),
])  # fmt: skip
def test_lines_wrapped_in_json_are_unwrapped(wrap: Callable[[str], str]) -> None:
    text = "\n".join(wrap(line) for line in made_log().splitlines())
    run = parse_log(text, "train.log").run
    assert (run["seed"], run["steps"], run["total_bytes"]) == (42, 4000, 15_920_000)
    assert scores(text) == scores(made_log())


def test_a_run_that_was_cut_off_has_no_steps() -> None:
    text = "step:500/20000 val_loss:2.8930 val_bpb:1.1200 train_time:9000ms\n"
    text += "step:600/20000 train_loss:2.9 train_time:9900ms"
    assert parse_log(text, "train_seed42.log").run["steps"] is None


@pytest.mark.parametrize("line", [
    "lr:embed=0.03 batch:786432 wall:600s seed:42", "eval: stride=64 zstd=1 seed=42", "seed:42 ema_enabled:True",
    "SEED=42", "Running seed 42", "=== seed 42 ===", "args: --seed 42 --lr 0.02", "{'seed': 42, 'lr': 0.02}",
    "random_seed: 42", '"seed": 42,', "    seed = 42",
])  # fmt: skip
def test_seeds_are_found_in_every_form(line: str) -> None:
    assert parse_log(made_log(seed=None, swap={"seed": line}), "train.log").run["seed"] == 42


def test_a_seed_in_passing_does_not_stand_against_the_file_name() -> None:
    run = parse_log(made_log(seed=None, more="calibration seed: 0 for 64 batches"), "train_seed42.log").run
    assert (run["seed"], run["seed_in_log"]) == (42, None)


@pytest.mark.parametrize("label", ["final_batched_ttt", "ttt_chunked_exact", "quantized_ttt_partially_tied"])
def test_a_label_with_the_letters_of_a_progress_word_is_a_score(label: str) -> None:
    text = made_log(more=score_line(label, 1.1))
    assert 1.1 in [*scores(text).values(), *(bpb for _, bpb in others(text))]


def test_several_numbers_called_seed_name_none() -> None:
    text = made_log(seed=None, more="seed 42 done\nseed 1337 done")
    assert parse_log(text, "train.log").run["seed"] is None


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("run_seq16384.log", None), ("train_v2.txt", None), ("train_rtx4090.log", None), ("train_42.log", 42),
        ("42.log", 42), ("seed42.log", 42), ("seed_42.log", 42), ("log_s42.txt", 42), ("train_seq_16384.log", None),
        ("step_4000.log", None), ("eval_s64.log", None), ("train_20260320.log", None), ("logs/seed_7/train.log", 7),
        ("train_8xh100.log", None), ("train_seed-42.log", 42), ("run_1.log", None), ("run2.log", None),
        ("train_1770000003.log", None), ("3f2a1b4c-1234-4abc-8def-123456789012.txt", None), ("rank_0.log", None),
        ("train_SEED42_final.log", 42), ("train_600s.log", None), ("seq8192/train.log", None), ("train0.txt", 0),
        ("v3_s1337_h100.log", 1337),
    ],
)  # fmt: skip
def test_only_a_seed_in_a_file_name_is_one(name: str, seed: int | None) -> None:
    assert seed_in_name(name) == seed


def test_two_runs_in_one_file_are_two_runs() -> None:
    tail = "Total submission size int8+zlib: 15930000 bytes"
    text = made_log(sliding=1.2, swap={"raw": [], "sizes": []}, more=tail) + made_log(steps=4100, sliding=1.115)
    assert [log.run["total_bytes"] for log in parse_runs(text, "t.log")] == [15_930_000, 15_920_000]
    found = [
        (log.run["log_file"], log.run["steps"], log.run["sliding"]["val_bpb"]) for log in parse_runs(text, "t.log")
    ]
    assert found == [("t.log (run 1 of 2)", 4000, 1.2), ("t.log (run 2 of 2)", 4100, 1.115)]


def test_runs_of_several_seeds_in_one_file_keep_their_seeds() -> None:
    text = "".join(made_log(seed=seed, sliding=bpb) for seed, bpb in ((42, 1.115), (7, 1.116), (1337, 1.117)))
    found = {log.run["seed"]: log.run["sliding"]["val_bpb"] for log in parse_runs(text, "all.log")}
    assert found == {42: 1.115, 7: 1.116, 1337: 1.117}


@pytest.mark.parametrize(
    "heading", ["===== seed 42 =====", "Running seed 42", "--- seed: 42 ---", "SEED=42", "# seed 42"]
)
def test_headings_tell_the_seeds_of_one_file_apart(heading: str) -> None:
    text = "".join(
        f"{heading.replace('42', str(seed))}\n{made_log(seed=None, sliding=bpb)}"
        for seed, bpb in ((42, 1.115), (7, 1.116), (1337, 1.117))
    )
    found = {log.run["seed"]: log.run["sliding"]["val_bpb"] for log in parse_runs(text, "all.log")}
    assert found == {42: 1.115, 7: 1.116, 1337: 1.117}


def test_evaluations_of_several_seeds_in_one_file_keep_their_seeds() -> None:
    text = "".join(f"seed: {seed}\n{score_line('quantized_ttt', bpb)}\n" for seed, bpb in ((42, 1.11), (7, 1.12)))
    found = {log.run["seed"]: log.run["post_ttt"]["val_bpb"] for log in parse_runs(text, "eval.log")}
    assert found == {42: 1.11, 7: 1.12}


def test_a_log_written_twice_is_one_run() -> None:
    assert len(parse_runs(made_log() + made_log(), "t.log")) == 1
    doubled = "".join(line + line for line in made_log().splitlines(keepends=True))
    assert len(parse_runs(doubled, "t.log")) == 1


def test_a_script_printed_before_the_run_is_not_read() -> None:
    script = (
        "import os\nimport torch\nfrom torch import nn\n  seed: 7\nquantized val_loss:1.0 val_bpb:1.0\n" + "=" * 100
    )
    run = parse_log(f"{script}\n{made_log()}", "train.log").run
    assert (run["seed"], run["post_quant"]["val_bpb"]) == (42, 1.13)


def test_a_run_carries_what_comparisons_need() -> None:
    swap: dict[str, Any] = {
        "curve": [
            "step:2000/20000 train_loss:3.0 train_time:200000ms step_avg:100.00ms",
            "step:3900/20000 train_loss:2.9 train_time:363000ms step_avg:93.12ms",
        ]
    }
    run = parse_log(made_log(ttt=1.11, swap=swap), "train_seed42.log").run
    assert run["step_avg_ms"] == 93.12
    assert run["train_losses"] == [[2000, 3.0], [3900, 2.9]]
    assert run["clock"] == [[2000, 200_000.0], [3900, 363_000.0]]
    assert run["eval_times"] == {"post_ema": 20_000, "post_quant": 20_000, "sliding": 20_000, "post_ttt": 250_000}
    assert run["score_decimals"] == {"live": 4, "post_ema": 8, "post_quant": 8, "sliding": 8, "post_ttt": 8}
    assert run["settings"]["matrix_lr"] == "0.022"
    assert run["num_lines"] > 15
    assert list(run["files"]) == ["train_seed42.log"]
