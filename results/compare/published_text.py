"""Published records as tables: the list, one record with its disagreements, and the block under a seed table."""

from __future__ import annotations

import json
from typing import Any

from results.compare.sides import side_of_record
from results.findings.findings import finding_json
from results.findings.review import find_disagreements
from results.findings.spread import convention_of, stated_std
from results.published.records import Record, Run, one_run_a_seed, recompute, record_number, validation_bytes
from results.render import csv_table, fixed, markdown_table, text_table
from results.stats import Summary, summarize
from results.validation_text import Text, relate

# heading, JSON key, decimals
COLUMNS = (
    ("steps", "steps", 0), ("live", "live_bpb", 4), ("post-EMA", "post_ema_bpb", 5), ("quantized", "pre_ttt_bpb", 5),
    ("sliding", "sliding_bpb", 5), ("post-TTT", "post_ttt_bpb", 5), ("final", "final_bpb", 5),
    ("nats/token", "final_nats", 5), ("artifact bytes", "artifact_bytes", 0), ("train s", "train_s", 1),
    ("TTT s", "ttt_s", 1),
)  # fmt: skip
TEXT_WORDS = {
    "same": "same validation text",
    "other": "other validation text: not comparable",
    "not known": "validation text not known to be the same: not comparable",
}


def published_row(run: Run) -> dict[str, Any]:
    """Return one seed of a record under the names of our own tables; None where the log shows nothing."""

    def score(stage: str) -> float | None:
        return run[stage]["val_bpb"] if run.get(stage) else None

    return {
        "seed": run["seed"],
        "steps": run.get("steps"),
        "live_bpb": run.get("live_weights_bpb_at_stop"),
        "post_ema_bpb": score("post_ema"),
        "pre_ttt_bpb": score("post_quant"),
        "sliding_bpb": score("sliding"),
        "post_ttt_bpb": score("post_ttt"),
        "final_bpb": run["final_bpb"],
        "final_nats": run["final_nats"],
        "artifact_bytes": run.get("total_bytes"),
        "train_s": run.get("train_seconds"),
        "ttt_s": run["post_ttt"]["seconds"] if run.get("post_ttt") else None,
    }


def record_json(record: Record) -> dict[str, Any]:
    """Return a record recomputed from its logs: seeds, summary with both conventions of std, disagreements."""
    rows = [published_row(run) for run in one_run_a_seed(record)]
    mine = recompute(record)
    summary = {key: summarize([row[key] for row in rows])._asdict() for _, key, _ in COLUMNS}
    return {
        "pr": record.get("pr"),
        "folder": record["folder"],
        "scored_stage": None if mine is None else mine.stage,
        "seeds": rows,
        "summary": summary,
        "std_ddof0": None if mine is None else mine.bpb_std_ddof0,
        "disagreements": [finding_json(finding) for finding in find_disagreements(record)],
    }


def render_list(records: list[Record], form: str) -> str:
    """Return one line a record: number, date, seeds, scored stage, recomputed mean and std, text, disagreements."""
    header = ["PR", "date", "n", "stage", "mean bpb", "std (ddof=1)", "text MB", "disagreements", "folder"]
    rows = []
    for record in records:
        mine = recompute(record)
        size = next((size for run in one_run_a_seed(record) if (size := validation_bytes(run))), None)
        summary = Summary(0, None, None) if mine is None else mine.bpb
        rows.append([
            record_number(record), str(record.get("date_folder") or "-"), str(summary.n), mine.stage if mine else "-",
            fixed(summary.mean, 5), "no spread" if summary.n == 1 else fixed(summary.std_ddof1, 5),
            fixed(None if size is None else size / 1e6, 3), str(len(find_disagreements(record))), record["folder"],
        ])  # fmt: skip
    if form == "json":
        return json.dumps([record_json(record) for record in records], indent=2, allow_nan=False)
    if form == "csv":
        return csv_table(header, rows).rstrip("\n")
    return markdown_table(header, rows) if form == "markdown" else text_table(header, rows)


def render_record(record: Record, form: str) -> str:
    """Return one record: seeds, mean, both stds, what was stated, and every disagreement."""
    if form == "json":
        return json.dumps(record_json(record), indent=2, allow_nan=False)
    header, rows = _cells(record)
    if form == "csv":
        seeds = record_json(record)["seeds"]
        keys = ["seed", *(key for _, key, _ in COLUMNS)]
        return csv_table(keys, [[row[key] for key in keys] for row in seeds]).rstrip("\n")
    table = markdown_table(header, rows) if form == "markdown" else _text(header, rows)
    number = "imported" if record.get("pr") is None else f"PR {record['pr']}"
    title = f"{number} ({record['folder']}): figures of its authors, recomputed from their logs"
    return "\n".join([title, table, *_facts(record), *_disagreement_lines(record)])


def published_block(record: Record, ours: Text) -> str:
    """Return a record's seed table for under our own, headed by whether its validation text is ours."""
    verdict = TEXT_WORDS[relate(ours, side_of_record(record).text)]
    header, rows = _cells(record)
    count = len(find_disagreements(record))
    lines = [f"published, PR {record_number(record)} ({verdict})", _text(header, rows)]
    if count:
        lines.append(f"{count} disagreements inside this record: seedsweep published show {record_number(record)}")
    return "\n".join(lines)


def block_json(record: Record, ours: Text) -> dict[str, Any]:
    """Return the same block as JSON."""
    relation = relate(ours, side_of_record(record).text)
    return {"is_comparable": relation == "same", "validation_text": relation, **record_json(record)}


def _text(header: list[str], rows: list[list[str]]) -> str:
    return text_table(header, rows, rules_before=[len(rows) - 3])


def _cells(record: Record) -> tuple[list[str], list[list[str]]]:
    content = record_json(record)
    shown = [entry for entry in COLUMNS if content["summary"][entry[1]]["n"]]
    header = ["seed", *(heading for heading, _, _ in shown)]
    rows = [
        [
            "?" if row["seed"] is None else str(row["seed"]),
            *(fixed(row[key], places) for _, key, places in shown),
        ]
        for row in content["seeds"]
    ]
    entries = [(Summary(**content["summary"][key]), places) for _, key, places in shown]
    rows.append(["mean", *(fixed(entry.mean, max(places, 1)) for entry, places in entries)])
    spread = ["no spread" if entry.n == 1 else fixed(entry.std_ddof1, max(places, 1)) for entry, places in entries]
    return header, [*rows, ["std", *spread], ["n", *(str(entry.n) for entry, _ in entries)]]


def _facts(record: Record) -> list[str]:
    mine = recompute(record)
    if mine is None or mine.bpb.mean is None:
        return ["no log shows a final score"]
    spread = "no spread (n = 1)"
    if mine.bpb.std_ddof1 is not None:
        spread = f"sample std {mine.bpb.std_ddof1:.5f} (ddof=1), population std {mine.bpb_std_ddof0:.5f} (ddof=0)"
    lines = [f"{mine.stage} bpb: mean {mine.bpb.mean:.5f}, {spread}, n = {mine.bpb.n}"]
    stated = stated_std(record)
    if stated is not None:
        lines.append(f"stated std: {stated} ({convention_of(record)})")
    return lines


def _disagreement_lines(record: Record) -> list[str]:
    findings = find_disagreements(record)
    if not findings:
        return ["no disagreements found"]
    return [f"disagreements: {len(findings)}", *(f"  {finding}" for finding in findings)]
