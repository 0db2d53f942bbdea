"""The README of a submission folder: every figure rendered from the rows, none typed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from results.render import fixed, markdown_table, signed
from results.stats import summarize, t_interval

if TYPE_CHECKING:
    import pandas as pd

SEED_COLUMNS = (
    ("Steps", "steps", 0), ("ms/step", "step_avg_ms", 2), ("Pre-TTT BPB", "pre_ttt_bpb", 8),
    ("Post-TTT BPB", "post_ttt_bpb", 8), ("TTT gain", "gain", None), ("val_loss (nats)", "post_ttt_nats_per_token", 8),
    ("Artifact", "artifact_bytes", 0),
)  # fmt: skip
DIAGNOSTIC_COLUMNS = (
    ("Pre-EMA BPB", "live_bpb", 8), ("Post-EMA BPB", "post_ema_bpb", 8), ("Quantized BPB", "pre_ttt_bpb", 8),
    ("TTT path at lr 0", "ttt_lr0_bpb", 8), ("Context effect", "context", None), ("Adaptation", "adaptation", None),
    ("Train s", "train_s", 1), ("Quantize s", "quantize_s", 1), ("Plain eval s", "evaluate_s", 1),
    ("TTT s", "ttt_s", 1),
)  # fmt: skip


def write_readme(
    out: str, runs: pd.DataFrame, submission: dict[str, Any], notes: list[str], against: str | None
) -> str:
    """Return README.md of a submission folder."""
    rows = runs.assign(
        gain=runs["post_ttt_bpb"] - runs["pre_ttt_bpb"],
        context=runs["ttt_lr0_bpb"] - runs["pre_ttt_bpb"],
        adaptation=runs["post_ttt_bpb"] - runs["ttt_lr0_bpb"],
        step_avg_ms=1000 * runs["train_s"] / runs["steps"],
    )
    parts = [
        f"# {submission['name']}", "", *_headline(runs, submission), "",
        "## Seeds", "", _seed_table(rows, SEED_COLUMNS), "",
        "Std is the sample standard deviation (ddof=1). TTT gain is after minus before: negative is better.", "",
        "## Diagnostics", "", _seed_table(rows, DIAGNOSTIC_COLUMNS), "",
        "The gain of test-time training is two effects: a longer context (the same path with learning rate 0 against "
        "plain evaluation) and adaptation (learning rate on against 0).", "",
        "## Delta", "", *_delta(out, runs, submission["name"], against), "",
        "## Compliance", "", *_compliance(submission["compliance"]), "",
        "## Requirements and command", "",
        f"`pip install -r requirements.txt`; measured on {submission['hardware']}, "
        f"PyTorch {submission['pytorch_version'] or 'unknown'}, commit {submission['git_commit'] or 'unknown'}.", "",
        "```sh", _command(runs), "```", "",
        "## How to verify", "", *_verification(runs, submission), "",
        "## Credits", "",
        "Recipe after parameter-golf PR #1536 and the pull requests it builds on (#1493, #1530). Figures were rendered "
        "from per-seed Parquet rows by seedsweep; the logs in this folder are rendered from the same rows.",
    ]  # fmt: skip
    if notes:
        parts += ["", "## Not in the mean", "", *(f"- {note}" for note in notes)]
    return "\n".join(parts) + "\n"


def _headline(runs: pd.DataFrame, submission: dict[str, Any]) -> list[str]:
    """Return the score in one sentence with its interval, and the largest artifact."""
    spread = "one seed, no spread"
    interval = t_interval(runs["post_ttt_bpb"].tolist())
    if interval is not None:
        spread = (
            f"sample std {submission['val_bpb_std']:.5f}, 95% t interval {interval.low:.5f} to {interval.high:.5f}, "
            f"n = {len(runs)}"
        )
    return [
        f"**val_bpb {submission['val_bpb']:.5f}** ({spread}); {submission['val_loss']:.5f} nats per token; "
        f"largest artifact {submission['bytes_total']:,} bytes "
        f"(code {fixed(submission['bytes_code'], 0)}, counted as: {submission['bytes_code_convention'] or 'unknown'}).",
        *_shared(runs),
    ]


def _shared(runs: pd.DataFrame) -> list[str]:
    """Return which stages another run of the sweep computed, nothing where each run computed its own."""
    taken = [
        f"{', '.join(run['reused_stages'].split(','))} of seed {run['seed']}"
        for _, run in runs.iterrows()
        if isinstance(run["reused_stages"], str)
    ]
    if not taken:
        return []
    return [
        "",
        f"Computed once in the sweep, under the same settings, and taken over with its times: {'; '.join(taken)}.",
    ]


def _seed_table(rows: pd.DataFrame, columns: tuple[tuple[str, str, int | None], ...]) -> str:
    """Return one row a seed, then mean and sample std."""
    shown = [entry for entry in columns if rows[entry[1]].notna().any()]
    header = ["Seed", *(heading for heading, _, _ in shown)]
    body = [[str(row["seed"]), *(_cell(row[key], places) for _, key, places in shown)] for _, row in rows.iterrows()]
    summaries = [(summarize(rows[key].tolist()), places) for _, key, places in shown]
    body.append(["Mean", *(_cell(entry.mean, places) for entry, places in summaries)])
    decimals = [8 if places is None else max(places, 1) for _, places in summaries]
    spreads = [_cell(entry.std_ddof1, places) for (entry, _), places in zip(summaries, decimals)]
    body.append(["Std", *("no spread" if entry.n == 1 else cell for (entry, _), cell in zip(summaries, spreads))])
    return markdown_table(header, body)


def _cell(value: float | None, decimals: int | None) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return signed(float(value), 8) if decimals is None else fixed(float(value), decimals)


def _delta(out: str, runs: pd.DataFrame, name: str, against: str | None) -> list[str]:
    """Return the comparison with another side, or why there is none; our side has the submission's name."""
    if against is None:
        return ["No comparison was asked for (`seedsweep export --against pr:N`)."]
    from results.compare.comparison import compare
    from results.compare.sides import open_side, side_of_runs
    from results.compare.text import render

    try:
        ours = side_of_runs(out, variant=str(runs["variant"].iloc[0]))._replace(name=name)
        return [render(compare(ours, open_side(against)), "markdown")]
    except ValueError as error:
        return [f"Against {against}: {error}."]


def _compliance(checks: dict[str, bool | None]) -> list[str]:
    words = {True: "yes", False: "NO", None: "could not be checked: a figure is missing"}
    return [f"- {name.replace('_', ' ')}: {words[value]}" for name, value in checks.items()]


def _command(runs: pd.DataFrame) -> str:
    """Return the command that trains and scores one seed."""
    run = runs.iloc[0]
    ranks = int(run["world_size"]) if run["world_size"] == run["world_size"] else 1
    return (
        f"torchrun --standalone --nproc_per_node={ranks} train_gpt.py --seed {run['seed']} "
        "--train 'DATA/*_train_*.bin' --val 'DATA/*_val_*.bin' --tokenizer DATA/TOKENIZER.model"
    )


def _verification(runs: pd.DataFrame, submission: dict[str, Any]) -> list[str]:
    """Return how a stranger checks the figures: by arithmetic, by scoring the artifact, by training again."""
    run = runs.iloc[0]
    seed, readable, counted = run["seed"], submission["bytes_code_readable"], submission["bytes_code"]
    sizes = "The rows do not say how large the readable code is."
    if readable is not None and counted is not None:
        sizes = (
            f"Code is {fixed(counted, 0)} bytes as counted (train_gpt_packed.py, the compressed twin that extracts "
            f"itself) and {fixed(readable, 0)} bytes as committed (train_gpt.py, the same code to read); with the "
            f"latter the largest total is {fixed(submission['bytes_total'] - counted + readable, 0)} bytes."
        )
    return [
        "1. Without a GPU and without PyTorch, every figure here is derived again from `evidence/` (rows, ledgers, "
        "per-document scores, stage records, artifacts) and SHA256SUMS: `seedsweep verify .`",
        "2. The score of a seed, from two files, in an environment with torch, numpy, sentencepiece and brotli only; "
        "on a CPU it is reproduced to the last bit where the run was made on one (same PyTorch build, same number of "
        "threads):",
        "",
        f"   `python train_gpt.py --eval evidence/seed={seed}-repeat={run['repeat']}/model.ssq --tokenizer T --val "
        "'SHARDS'`",
        "",
        f"3. The whole seed: the command above, or `seedsweep reproduce RUN --seed {seed}` where the run directory is.",
        "",
        sizes,
    ]
