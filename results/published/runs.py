"""Several runs in one log file: where one ends and the next begins."""

from __future__ import annotations

import re

from results.published.labels import is_progress
from results.published.lines import SETTING_LINE, STOP, TRAIN_LOSS, read_score, step_of

HEAD = re.compile(
    r"^\s*(?:Hyperparameters:|model_params|val_tokens|val_loader|train_loader|world_size|Running Python)", re.IGNORECASE
)

SEED_HEADING = re.compile(
    r"^\W*(?:running |starting |start |begin |training |run |evaluating )?(?:with )?(?:random_?)?"
    r"seed\s*[:=#]?\s*(\d{1,18})\W*$",
    re.IGNORECASE,
)


def split_runs(lines: list[str]) -> list[list[str]]:
    """Return the lines of each run in a log; a second run starts its steps anew, or prints another seed.

    A part whose lines are those of an earlier one is left out: a log that was written twice is one run.
    """
    kinds = [_kind(line) for line in lines]
    starts = [0, *_starts(lines, kinds)]
    kept: dict[tuple[str, ...], list[str]] = {}
    for start, end in zip(starts, [*starts[1:], len(lines)]):
        figures = tuple(lines[place].strip() for place in range(start, end) if kinds[place] in ("curve", "tail"))
        kept.setdefault(figures, lines[start:end])
    return list(kept.values())


def _starts(lines: list[str], kinds: list[str | None]) -> list[int]:
    """Return the index of the first line of every run but the first."""
    starts: list[int] = []
    last_figure, top_step, has_tail, seed, head = -1, -1, False, None, None
    for index, (line, kind) in enumerate(zip(lines, kinds)):
        if kind == "head":
            head = index if head is None or head < last_figure else head
            match = SEED_HEADING.match(line)
            is_other = match is not None and seed is not None and match.group(1) != seed
            seed = match.group(1) if match else seed
            if not (is_other and has_tail):
                continue
            starts.append(_start(head, last_figure))
            top_step, has_tail = -1, False
        elif kind == "curve":
            step = step_of(line)
            assert step is not None, "a line of the curve has a step"
            is_new = step[0] < top_step and step[0] <= 10 and (has_tail or (head is not None and head > last_figure))
            if is_new:
                starts.append(_start(head, last_figure))
                has_tail = False
            top_step = step[0] if is_new else max(top_step, step[0])
            last_figure = index
        elif kind == "tail":
            has_tail, last_figure = True, index
    return starts


def _start(head: int | None, last_figure: int) -> int:
    """Return where a run starts: at its settings, else right behind the last figure of the run before it."""
    return head if head is not None and head > last_figure else last_figure + 1


def _kind(line: str) -> str | None:
    """Return head, curve or tail for a line that stands for this part of a run."""
    if SEED_HEADING.match(line) or HEAD.match(line) or SETTING_LINE.match(line):
        return "head"
    if step_of(line) is not None:
        return "curve" if TRAIN_LOSS.search(line) or read_score(line) else None
    if STOP.search(line) and "train_time" in line:
        return "tail"
    score = read_score(line)
    return "tail" if score is not None and not is_progress(score.label) else None
