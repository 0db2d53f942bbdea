"""Writing a submission folder from the Parquet tables: no figure in it is typed by hand, and all can be read back."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from results.export.evidence import EVIDENCE, copy_evidence
from results.export.log import train_log
from results.export.readme import write_readme
from results.published.track import SIZE_LIMIT_BYTES, TIME_LIMIT_S
from results.schema import FINISHED, READS_TRAINING_S
from results.stats import population_std, summarize
from results.store.announced import rows_of_variant
from results.store.names import is_named
from results.store.reader import latest_attempts, read_attempt, read_runs

if TYPE_CHECKING:
    from collections.abc import Sequence

TRACK = "10min_16mb"
REQUIRED = ("post_ttt_bpb", "post_ttt_nats_per_token", "artifact_bytes", "steps", "train_s")
# a requirement only where the distribution's name is what pip calls it
PIP_NAMES = ("torch", "numpy", "sentencepiece", "brotli", "safetensors", "ray", "triton", "huggingface_hub", "pyyaml")


class Author(NamedTuple):
    """Who submits."""

    name: str
    github_id: str


class Submission(NamedTuple):
    """What a folder says, rendered: its text files by name, the rows behind them, and what must be said."""

    files: dict[str, str]
    runs: pd.DataFrame
    notes: list[str]


def export_submission(
    out: str, folder: Path, author: Author, *, against: str | None = None, variant: str | None = None
) -> list[str]:
    """Write README.md, submission.json, one log a seed and requirements.txt into folder; return what must be said.

    out: run directory (path or URI). against: the side (see results.compare.sides) that the README's delta is taken to.
    variant: which one of a sweep that has several. The evidence (results.export.evidence) goes along. Raises ValueError
    when no seed finished, a figure is missing, folder is not empty, or it is not clear which variant is meant.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder={folder} is not empty; name a new one")
    submission = render_submission(out, author, against=against, variant=variant)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in submission.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    notes = copy_evidence(out, submission.runs, folder)
    details = {"author": author.name, "github_id": author.github_id, "against": against}
    (folder / EVIDENCE / "export.json").write_text(json.dumps(details, indent=1) + "\n", encoding="utf-8")
    return [*submission.notes, *notes]


def render_submission(
    out: str, author: Author, *, against: str | None = None, variant: str | None = None
) -> Submission:
    """Return the text files of a submission folder, computed from the rows alone. Raises as export_submission does."""
    rows = latest_attempts(read_runs(out))
    if not rows.frame.empty:
        rows = rows_of_variant(rows, out, variant, fix="name one with --variant, such as --variant ")
    finished = rows.frame[rows.frame["state"] == FINISHED] if not rows.frame.empty else rows.frame
    if finished.empty:
        raise ValueError(f"{out}: no finished seed to export")
    if finished["source"].eq("program").any():
        raise ValueError(
            f"{out}: figures of somebody else's program are not ours to export; export a sweep of a recipe"
        )
    runs = finished.sort_values(["seed", "repeat"]).drop_duplicates("seed")
    _require_figures(runs)
    notes = [*rows.notes, *rows.problems, *_not_exported(rows.frame, runs)]
    submission = make_submission_json(runs, author)
    files = {}
    for _, run in runs.iterrows():
        steps = read_attempt(out, "steps", run, ["step", "loss", "elapsed_s", "tokens_per_s", "is_looped"])
        files[f"train_seed{run['seed']}.log"] = train_log(run, steps)
    files["submission.json"] = json.dumps(submission, indent=2) + "\n"
    files["requirements.txt"] = list_requirements(runs)
    files["README.md"] = write_readme(out, runs, submission, notes, against)
    return Submission(files, runs, notes)


def folder_name(runs: pd.DataFrame) -> str:
    """Return <YYYY-MM-DD>_<ShortName>: the day the last seed ended, the sweep's name and that of its variant."""
    run = runs.iloc[0]
    words = re.findall(r"[A-Za-z0-9.]+", f"{run['sweep'] or 'sweep'} {run['variant'] if is_named(run) else ''}")
    return f"{_date(runs)}_{''.join(word[:1].upper() + word[1:] for word in words)}"


def make_submission_json(runs: pd.DataFrame, author: Author) -> dict[str, Any]:
    """Return the content of submission.json; scores carry eight decimals, as the logs do."""
    bpb, nats = (summarize(runs[f"post_ttt_{name}"].tolist()) for name in ("bpb", "nats_per_token"))
    sizes = [int(size) for size in runs["artifact_bytes"]]
    return {
        "author": author.name,
        "github_id": author.github_id,
        "name": folder_name(runs).partition("_")[2],
        "date": _date(runs),
        "track": TRACK,
        "val_bpb": _rounded(bpb.mean),
        "val_bpb_std": _rounded(bpb.std_ddof1),
        "val_bpb_std_ddof": 1,
        "val_bpb_std_population": _rounded(population_std(runs["post_ttt_bpb"].tolist())),
        "val_loss": _rounded(nats.mean),
        "val_loss_std": _rounded(nats.std_ddof1),
        **({"variant": str(runs["variant"].iloc[0])} if is_named(runs.iloc[0]) else {}),
        "seeds": [int(seed) for seed in runs["seed"]],
        "seed_results": {str(run["seed"]): _seed_result(run) for _, run in runs.iterrows()},
        "hardware": describe_hardware(runs),
        "pytorch_version": _first(runs["torch_version"]),
        "bytes_total": max(sizes),
        "bytes_code": _whole(_first(runs["code_bytes"])),
        "bytes_code_convention": _first(runs["code_bytes_convention"]),
        "bytes_code_readable": _whole(_first(runs["code_bytes_readable"])),
        "git_commit": _first(runs["git_commit"]),
        "compliance": judge_compliance(runs),
    }


def judge_compliance(runs: pd.DataFrame) -> dict[str, bool | None]:
    """Return what the figures themselves show; None where a figure is missing (never a pass)."""
    train = _training_s(runs)
    evaluation = runs["evaluate_s"] + runs["ttt_s"]
    hashes = [runs[name] for name in ("config_hash", "data_hash", "code_hash")]
    return {
        "train_under_600s": _all_within(train, TIME_LIMIT_S),
        "eval_under_600s": _all_within(evaluation, TIME_LIMIT_S),
        "artifact_under_16mb": _all_within(runs["artifact_bytes"], SIZE_LIMIT_BYTES),
        "three_seeds": len(runs) >= 3,
        "one_configuration": None if any(column.isna().any() for column in hashes)
        else all(column.nunique() == 1 for column in hashes),
        "code_unchanged_while_running": not runs["code_changed"].eq(True).any(),
    }  # fmt: skip


def _training_s(runs: pd.DataFrame) -> pd.Series:
    """Return the seconds that read training data; NaN where fit did and an older row does not say for how long."""
    quant = runs["config_json"].map(lambda text: json.loads(text or "{}").get("quant") or {})
    is_fit = quant.map(lambda settings: settings.get("on_oversize") == "fit")
    is_known = runs["train_s"].notna() & ~(is_fit & runs["sensitivity_s"].isna())
    return runs[list(READS_TRAINING_S)].fillna(0.0).sum(axis=1).where(is_known)


def describe_hardware(runs: pd.DataFrame) -> str:
    """Return the machine of one seed in words."""
    run = runs.iloc[0]
    if pd.notna(run["num_gpus"]) and run["num_gpus"] > 0:
        return f"{int(run['num_gpus'])}x {run['gpu_model'] if pd.notna(run['gpu_model']) else 'GPU'}"
    if pd.isna(run["num_cpus"]):
        return "unknown"
    return f"{int(run['num_cpus'])} CPU core{'s' if run['num_cpus'] > 1 else ''}"


def list_requirements(runs: pd.DataFrame) -> str:
    """Return the packages the runs used, pinned, one a line."""
    versions = json.loads(_first(runs["versions_json"]) or "{}")
    lines = [f"{name}=={versions[name].partition('+')[0]}" for name in PIP_NAMES if versions.get(name)]
    return "\n".join(lines or ["# the runs recorded no package versions"]) + "\n"


def _seed_result(run: pd.Series) -> dict[str, Any]:
    return {
        "val_bpb": _rounded(run["post_ttt_bpb"]),
        "val_loss": _rounded(run["post_ttt_nats_per_token"]),
        "artifact_bytes": int(run["artifact_bytes"]),
        "steps": int(run["steps"]),
        "step_avg_ms": round(1000 * float(run["train_s"]) / int(run["steps"]), 3),
    }


def _require_figures(runs: pd.DataFrame) -> None:
    for name in REQUIRED:
        missing = runs.loc[runs[name].isna(), "seed"].tolist()
        if missing:
            raise ValueError(f"{name} is missing for seed {', '.join(map(str, missing))}; a submission needs it")


def _not_exported(frame: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    """Return a line for every launched seed and repeat that the folder's mean does not contain."""
    kept = set(zip(runs["seed"], runs["repeat"]))
    return [
        f"seed={row['seed']} repeat={row['repeat']} is not in the mean: {row['state']}"
        + (f" ({row['error']})" if isinstance(row["error"], str) else ", a repeat of a seed that is")
        for _, row in frame.iterrows()
        if (row["seed"], row["repeat"]) not in kept
    ]


def _all_within(values: pd.Series, limit: float) -> bool | None:
    return None if values.isna().any() else bool((values <= limit).all())


def _date(runs: pd.DataFrame) -> str:
    ended = runs["ended_at"].dropna()
    return (ended.max() if len(ended) else datetime.now(UTC)).strftime("%Y-%m-%d")


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 8)


def _first(column: pd.Series) -> Any:
    """Return the first value that is there."""
    known: Sequence[Any] = column.dropna().tolist()
    return known[0] if known else None


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)
