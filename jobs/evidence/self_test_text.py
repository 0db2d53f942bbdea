"""What the audit's test of itself found, in words: two tables for a terminal, or the page docs/audit.md."""

from __future__ import annotations

from model.audit.audit import PROBES
from model.controls.self_test import SelfTest
from results.render import markdown_table, text_table

HEALTHY_HEAD = ("probe", "rule", "looks at", "healthy run", "measured", "limit", "unit")
BROKEN_HEAD = ("control", "what is broken", "probe", "verdict", "measured", "limit")
# columns of the two tables on a terminal, whose lines are short
HEALTHY_SHOWN, BROKEN_SHOWN = (0, 3, 4), (0, 2, 3, 4)
NETWORK_PROBE = {"network_block": "ways out of the fresh process"}  # comes with the probe named reload

PAGE = """# Audit

`seedsweep audit DIR` runs every probe below on the finished runs of a sweep and writes `audit.json` beside each.
`seedsweep audit --self-test` shows that each probe passes a healthy system and catches one that is broken on purpose.
This page is made by `seedsweep audit --self-test --format markdown > docs/audit.md`; do not edit it by hand.

A result is pass, fail or could-not-run, and the last is never a pass. Exit code 1 says that something failed. Each
result in `audit.json` also names its sample and what it did not check.

## Probes, on the healthy system

{healthy}

## Negative controls

{broken}

{verdict}.

## The ledgers

Always on, in the run directory. Measured at 0.17 % of the time of test-time training with the demo's model on one CPU
core; an event costs 3 microseconds, and the larger the model, the smaller its share.

- `ledger/STAGE.json`: `spans` (monotonic seconds by phase and rank; every kernel compilation is a span of its own,
  `compile`) and `reads` (file, phase, rank, sha256 where known). `declared` counts opens that the code announced,
  `seen` those that the interpreter's audit hook saw: a read that nobody announced has `declared` 0.
  `earlier` in `ledger/train.json` holds rank 0's spans of the attempts before a resume, each up to the checkpoint that
  training went on from.
- `ttt_scores.npz`: one row an event of test-time training (`rank`, `kind` 0 score or 1 update, `document`,
  `first_prediction`, `end_prediction`, `num_updates_before`, `loss_sum`), `nll` of every target, and `chain_heads`.
  The chain: sha256("seedsweep score ledger 1" + rank as 8 bytes little-endian), then for each event of the rank
  sha256(link before + the seven values above as six little-endian int64 and one float64). Only each rank's last link
  is kept; the stage record's `score_chain` is the sha256 over them.
- The stage record counts `targets_scored_once` against `num_targets`.
"""


def render_self_test(outcome: SelfTest, *, is_markdown: bool) -> str:
    """Return both tables and the verdict."""
    healthy, broken = list_healthy(outcome), list_broken(outcome)
    verdict = f"{sum(x.is_caught for x in outcome.lines)} of {len(outcome.lines)} controls caught"
    if outcome.unproven:
        verdict += f"; without a caught control: {', '.join(outcome.unproven)}"
    if outcome.false_alarms:
        verdict += f"; the healthy run did not pass {', '.join(r.probe for r in outcome.false_alarms)}"
    if is_markdown:
        tables = {
            "healthy": markdown_table(HEALTHY_HEAD, healthy, is_words=True),
            "broken": markdown_table(BROKEN_HEAD, broken, is_words=True),
        }
        return PAGE.format(**tables, verdict=verdict)
    blocks = [
        text_table([head[c] for c in shown], [[row[c] for c in shown] for row in rows], is_words=True)
        for head, rows, shown in ((HEALTHY_HEAD, healthy, HEALTHY_SHOWN), (BROKEN_HEAD, broken, BROKEN_SHOWN))
    ]
    return "\n\n".join([*blocks, f"{verdict}, {outcome.seconds:.0f} s"])


def list_healthy(outcome: SelfTest) -> list[list[str]]:
    """Return the cells of the healthy run's table, a row a result."""
    what = {name: words for name, (words, _) in PROBES.items()} | NETWORK_PROBE
    return [
        [r.probe, r.rule, what[r.probe], r.result, shorten(r.measured), shorten(r.limit), r.unit]
        for r in outcome.healthy
    ]


def list_broken(outcome: SelfTest) -> list[list[str]]:
    """Return the cells of the controls' table, a row a control."""
    return [
        [x.control, x.broken, x.probe, "caught" if x.is_caught else f"MISSED ({x.result.result})",
         shorten(x.result.measured), shorten(x.result.limit)] for x in outcome.lines
    ]  # fmt: skip


def shorten(value: object) -> str:
    """Return a figure to four digits; words as they are."""
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
