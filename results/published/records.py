"""Figures other people published for the 10-minute / 16 MB track, by pull request number: data, not our measurements.

`published.json` was made from the shared comparison set ("published-figures/1", copied by script out of the record
folders of openai/parameter-golf, snapshot of 2026-05-02, figures only: no names, code or prose) with
`python -m results.published.records RECORDS.json > results/published/published.json`. A record is the JSON object
described there; an imported submission folder is brought into the same form, so everything below and in
`disagreements` serves both.
"""

from __future__ import annotations

import json
import math
import sys
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from results.published.submitted import submitted_figures
from results.stats import Summary, bits_per_byte, population_std, summarize

RECORD_FILE = "record.json"  # where an imported folder's record lies, beside its tables
KEPT_FIELDS = (
    "pr", "folder", "merged_on_head", "date_folder", "track", "leaderboard", "submission_json", "readme_seed_tables",
    "pr_text", "source_file_bytes_in_folder", "std_convention", "runs",
)  # fmt: skip

# The validation set of the challenge: the first 50,000 FineWeb documents. Tokenizers of the published records count
# 151.074 to 151.081 MB, because they normalize the text a little differently and score another tail.
FINEWEB_BYTES = (151.06e6, 151.10e6)
SAME_TEXT_BYTES = 10_000  # logs print scores to so many decimals that their texts' sizes differ by less

Record = dict[str, Any]
Run = dict[str, Any]


class Recomputed(NamedTuple):
    """A record's own figures recomputed from its logs: one run a seed, the scored stage, both conventions of std."""

    stage: str
    seeds: list[int | None]
    bpb: Summary
    nats: Summary
    bpb_std_ddof0: float | None


@cache
def load_published(path: Path | None = None) -> dict[str, Any]:
    """Return the packaged comparison set, or one of the same form from a file.

    Raises ValueError when the file is not of that form.
    """
    if path is None:
        text = resources.files("results.published").joinpath("published.json").read_text(encoding="utf-8")
    else:
        text = Path(path).read_text(encoding="utf-8")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error.msg} in line {error.lineno})") from error
    if not isinstance(content, dict) or not isinstance(content.get("records"), list):
        raise ValueError(f"{path}: has no list 'records'; expected the form published-figures/1")
    return content


def find_record(number: str, path: Path | None = None) -> Record:
    """Return the record of a pull request number ("1536", "pr:1536", "#1536"); the unnumbered baseline is "baseline".

    Raises ValueError for an unknown number, with those that are known.
    """
    wanted = number.lower().removeprefix("pr:").removeprefix("#")
    records = load_published(path)["records"]
    for record in records:
        if record_number(record) == wanted:
            found: Record = record
            return found
    known = ", ".join(sorted((record_number(record) for record in records), key=lambda text: text.zfill(6)))
    raise ValueError(f"pr:{wanted} is not among the published records; known: {known}")


def record_number(record: Record) -> str:
    """Return the pull request number as text; "baseline" for the launch baseline, which has none."""
    return "baseline" if record["pr"] is None else str(record["pr"])


def submitted_seeds(record: Record) -> dict[int, dict[str, Any]]:
    """Return the per-seed figures of submission.json, whichever of the layouts in use it has."""
    return submitted_figures(record.get("submission_json"))


def one_run_a_seed(record: Record) -> list[Run]:
    """Return one run for each seed: of several logs the one chosen at import or reported, else the first.

    Logs that name no seed are one row, with seed None, and only where no log names one.
    """
    submitted = submitted_seeds(record)
    is_known = any(run["seed"] is not None for run in record["runs"])
    chosen: dict[int | None, Run] = {}
    for run in record["runs"]:
        if run["final_bpb"] is None or run.get("is_chosen") is False or (is_known and run["seed"] is None):
            continue
        said = submitted.get(run["seed"], {}).get("val_bpb")
        is_reported = isinstance(said, int | float) and math.isclose(run["final_bpb"], said, abs_tol=6e-6)
        if run["seed"] not in chosen or (is_reported and not chosen[run["seed"]]["is_reported"]):
            chosen[run["seed"]] = {**run, "is_reported": is_reported}
    return [chosen[seed] for seed in sorted(chosen, key=lambda seed: -1 if seed is None else seed)]


def recompute(record: Record) -> Recomputed | None:
    """Return mean, sample and population std over the seeds of a record, None when no log has a final score."""
    runs = one_run_a_seed(record)
    if not runs:
        return None
    scores = [run["final_bpb"] for run in runs]
    return Recomputed(
        stage="/".join(sorted({run["scored_stage"] for run in runs})),
        seeds=[run["seed"] for run in runs],
        bpb=summarize(scores),
        nats=summarize([run["final_nats"] for run in runs]),
        bpb_std_ddof0=population_std(scores),
    )


def bytes_per_token(run: Run) -> float | None:
    """Return UTF-8 bytes per scored token as the log's own two figures of the final stage imply."""
    nats, bpb = run["final_nats"], run["final_bpb"]
    return None if not nats or not bpb else bits_per_byte(nats, bpb)


def _ratio_of_a_stage(run: Run) -> float | None:
    """Return bytes per token by the last stage with both figures, where the final score was printed without nats."""
    for stage in ("post_ttt", "sliding", "post_quant", "post_ema"):
        entry = run.get(stage)
        if entry and entry.get("val_loss_nats") and entry["val_bpb"]:
            return bits_per_byte(entry["val_loss_nats"], entry["val_bpb"])
    return None


def validation_bytes(run: Run) -> float | None:
    """Return the size of the validation text that a log implies, None when it does not print its token count."""
    ratio = bytes_per_token(run) or _ratio_of_a_stage(run)
    return None if ratio is None or not run.get("val_tokens") else run["val_tokens"] * ratio


def text_bytes(runs: list[Run]) -> float | None:
    """Return the size of the validation text that the logs of a record agree on, None where they do not or print none.

    Each log gives it to the decimals of its scores, so that sizes a little apart are one text.
    """
    sizes = sorted(round(size) for run in runs if (size := validation_bytes(run)) is not None)
    if not sizes:
        return None
    is_one = sizes[-1] - sizes[0] < SAME_TEXT_BYTES or (FINEWEB_BYTES[0] <= sizes[0] and sizes[-1] <= FINEWEB_BYTES[1])
    return float(sizes[0]) if is_one else None


def read_imported_record(out: Path) -> Record | None:
    """Return the record of a directory that `import-logs` wrote, None for any other directory."""
    path = out / RECORD_FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); import the folder again") from error
    record = content.get("record") if isinstance(content, dict) else None
    if not isinstance(record, dict) or not isinstance(record.get("runs"), list):
        raise ValueError(f"{path}: has no record of an import; import the folder again")
    return record


def pack(content: dict[str, Any]) -> str:
    """Return the comparison set reduced to what this package uses, one record a line."""
    kept = {key: content[key] for key in ("schema", "source", "note", "units")}
    head = json.dumps(kept, separators=(",", ":"))[:-1]
    lines = [
        json.dumps({key: record.get(key) for key in KEPT_FIELDS}, separators=(",", ":"))
        for record in content["records"]
    ]
    listed = json.dumps(content["disagreements"], separators=(",", ":"))
    return f'{head},\n"disagreements":{listed},\n"records":[\n' + ",\n".join(lines) + "\n]}\n"


if __name__ == "__main__":
    print(pack(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")
