"""results.published.log and layout: a clean folder is read completely in every form of line, encoding and layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from results.findings.importer import Submission, read_submission
from results.findings.review import find_disagreements
from tests.made_folders import (
    ENCODINGS,
    LAYOUTS,
    PREFIXES,
    Made,
    made_log,
    readme_table,
    split_evaluation,
    with_prefix,
    write_folder,
)

STAGES = ("post_ema", "post_quant", "sliding", "post_ttt")
RUNS = (Made(seed=42, ttt=1.1110), Made(seed=1337, ttt=1.1121, steps=4010, model_bytes=15_900_321, live=1.1207))
SUBMISSION = {
    "val_bpb": 1.11155,
    "seeds": [42, 1337],
    "seed_results": {
        str(made.seed): {"val_bpb": made.ttt, "artifact_bytes": made.total_bytes, "steps": made.steps} for made in RUNS
    },
}
README = readme_table([
    {"Seed": made.seed, "Steps": made.steps, "Sliding BPB": made.sliding, "Post-TTT BPB": made.ttt,
     "Artifact": f"{made.total_bytes:,}"} for made in RUNS
])  # fmt: skip


def expected(made: Made) -> tuple[Any, ...]:
    """Return a run's figures as `shown` gives them."""
    return (
        made.steps, made.train_ms, made.live, made.post_ema, made.quantized, made.sliding, made.ttt, made.model_bytes,
        made.total_bytes, made.ttt, 40_540_160,
    )  # fmt: skip


def shown(submission: Submission) -> dict[int, tuple[Any, ...]]:
    """Return what a folder's table shows, by seed."""
    return {
        run["seed"]: (
            run["steps"], run["train_ms"], run["live_weights_bpb_at_stop"],
            *(run[stage]["val_bpb"] if run[stage] else None for stage in STAGES),
            run["model_bytes"], run["total_bytes"], run["final_bpb"], run["val_tokens"],
        )
        for run in submission.record["runs"]
    }  # fmt: skip


def check(folder: Path) -> None:
    """Assert that the folder of RUNS is read completely and without a finding."""
    submission = read_submission(folder)
    assert shown(submission) == {made.seed: expected(made) for made in RUNS}, submission.notes
    assert find_disagreements(submission.record) == []
    assert not [note for note in submission.notes if "not found" in note]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_what_stands_before_the_lines_changes_nothing(tmp_path: Path, prefix: str) -> None:
    logs: dict[str, str | bytes] = {f"train_seed{made.seed}.log": with_prefix(made_log(made), prefix) for made in RUNS}
    check(write_folder(tmp_path / "record", logs, submission=SUBMISSION, readme=README))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_encoding_changes_nothing(tmp_path: Path, encoding: str) -> None:
    logs: dict[str, str | bytes] = {f"train_seed{made.seed}.log": ENCODINGS[encoding](made_log(made)) for made in RUNS}
    check(write_folder(tmp_path / "record", logs, submission=SUBMISSION, readme=README))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_place_of_the_logs_changes_nothing(tmp_path: Path, layout: str) -> None:
    logs: dict[str, str | bytes] = {LAYOUTS[layout](made.seed or 0): made_log(made) for made in RUNS}
    check(write_folder(tmp_path / "record", logs, submission=SUBMISSION, readme=README))


@pytest.mark.parametrize("place", ["eval_seed{}.log", "eval_only/seed_{}.log", "logs/eval/seed{}/ttt.txt"])
@pytest.mark.parametrize("prefix", ["none", "ray", "iso time"])
def test_an_evaluation_kept_apart_is_joined_to_its_training(tmp_path: Path, place: str, prefix: str) -> None:
    logs: dict[str, str | bytes] = {}
    for made in RUNS:
        train, evaluation = split_evaluation(made)
        logs |= {f"train_seed{made.seed}.log": with_prefix(train, prefix)}
        logs |= {place.format(made.seed): with_prefix(evaluation, prefix)}
    folder = write_folder(tmp_path / "record", logs, submission=SUBMISSION, readme=README)
    check(folder)
    run = read_submission(folder).record["runs"][0]
    assert set(run["files"]) == {f"train_seed{run['seed']}.log", place.format(run["seed"])}
