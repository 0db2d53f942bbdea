"""The checks of a submission folder that span its seeds: one configuration, and every announced seed accounted for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from results.export.evidence import EVIDENCE
from results.verify.checks import AGREES, DIFFERS, UNCHECKED, Check, compare, read_json

HASHES = ("config_hash", "data_hash", "code_hash")


def check_sweep(folder: Path, rows: list[dict[str, Any]]) -> Iterator[Check]:
    """Compare the seeds with each other and with what was announced before they ran."""
    for name in HASHES:
        values = sorted({str(row[name]) for row in rows})
        is_one = len(values) == 1 and values[0] not in ("None", "nan")
        shown = ", ".join(value[:12] for value in values) or "no row"
        yield Check(f"{name} of all seeds", AGREES if is_one else DIFFERS, f"{len(rows)} seeds: {shown}")
    path = folder / EVIDENCE / "sweep.json"
    if not path.is_file():
        yield Check("announced seeds", UNCHECKED, f"{EVIDENCE}/sweep.json is not in this folder")
        return
    sweep = read_json(path)
    for name in HASHES[:2]:
        if rows:
            yield compare(f"{name} of the rows", str(rows[0][name]), str(sweep.get(name)), f"{EVIDENCE}/sweep.json")
    announced = {int(seed) for entry in sweep["announcements"] for seed in entry["seeds"]}
    scored = {int(row["seed"]) for row in rows}
    readme = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    for seed in sorted(announced - scored):
        is_told = f"seed={seed} " in readme.partition("## Not in the mean")[2]
        detail = "was announced, did not finish" + (" and is listed in the README" if is_told else "; nothing says so")
        yield Check(f"seed={seed}", AGREES if is_told else DIFFERS, detail)
    for seed in sorted(scored - announced):
        yield Check(f"seed={seed}", DIFFERS, "has a score, but was never announced")
    if announced == scored:
        yield Check("announced seeds", AGREES, f"all {len(scored)} have a score: {', '.join(map(str, sorted(scored)))}")
