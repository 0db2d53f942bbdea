"""The audit's section of the report: every probe's result for every audited seed, read from the runs' audit.json."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from html import escape
from pathlib import Path
from typing import Any

from results.schema import BASE
from results.store.names import parse_run_name

MARKS = {"pass": "ok", "fail": "mark"}


def audit_section(out: str, variants: Collection[str]) -> list[str]:
    """Return the section's lines of HTML, none where no run was audited. Only local folders are looked at.

    variants: whose runs are shown, `base` for those of a sweep that names none.
    """
    if "://" in out:
        return []
    every = sorted(Path(out).glob("seeds/*/audit.json"))
    paths = [path for path in every if ((parse_run_name(path.parent.name) or [""])[0] or BASE) in variants]
    audits = {path.parent.name: _read(path) for path in paths}
    if not audits:
        return []
    rows: dict[str, dict[str, Mapping[str, Any]]] = {}
    for run, probes in audits.items():
        for probe in probes:
            rows.setdefault(str(probe.get("probe", "-")), {})[run] = probe
    heads = "".join(f"<th>{escape(run)}</th>" for run in audits)
    body = "".join(_row(name, by_run, list(audits)) for name, by_run in rows.items())
    return [
        "<h3>Audit</h3>",
        "<p>could-not-run is never a pass. Hover over a result for what was not checked.</p>",
        f'<div class="scroll"><table class="facts"><thead><tr><th>probe</th><th>rule</th>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>",
        *[f'<p class="mark">{escape(run)}: {escape(text)}</p>' for run, text in _faults(rows)],
    ]


def _read(path: Path) -> list[Mapping[str, Any]]:
    """Return the results of one audit. Raises ValueError naming path if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        probes = content["probes"]
        if not all(isinstance(probe, dict) for probe in probes):
            raise TypeError("a result is not a mapping")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); run seedsweep audit again") from None
    return list(probes)


def _row(name: str, by_run: Mapping[str, Mapping[str, Any]], runs: list[str]) -> str:
    rule = next((str(probe.get("rule", "")) for probe in by_run.values()), "")
    cells = "".join(_cell(by_run.get(run)) for run in runs)
    return f"<tr><td>{escape(name)}</td><td>{escape(rule)}</td>{cells}</tr>"


def _cell(probe: Mapping[str, Any] | None) -> str:
    if probe is None:
        return "<td>not run</td>"
    result = str(probe.get("result", "-"))
    figures = f"{_shown(probe.get('measured'))} (limit {_shown(probe.get('limit'))}) {probe.get('unit', '')}"
    sample = f"{probe.get('sample_size', '')} {probe.get('sample_of', '')}"
    hover = f"{probe.get('detail', '')}. Not checked: {probe.get('not_checked') or '-'}"
    return (
        f'<td title="{escape(hover)}"><span class="{MARKS.get(result, "")}">{escape(result)}</span><br>'
        f"<small>{escape(figures.strip())}<br>{escape(sample.strip())}</small></td>"
    )


def _faults(rows: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[tuple[str, str]]:
    """Return (run, words) for everything that is no pass."""
    return [
        (run, f"{name} {probe.get('result')}: {probe.get('detail', '')}")
        for name, by_run in rows.items()
        for run, probe in by_run.items()
        if probe.get("result") != "pass"
    ]


def _shown(value: object) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
