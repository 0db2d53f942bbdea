"""The scores of one run by stage: which of several lines counts, which only repeat another, and which are variants."""

from __future__ import annotations

import math
import re
from typing import Any

from results.published.labels import base_label, meaning_of
from results.published.lines import Score

# the scoring passes that a log may show, in their order
STAGES = ("post_ema", "post_quant", "sliding", "ttt_lr0", "post_ttt")


class ScoreBoard:
    """Collects the score lines of one run in their order."""

    def __init__(self, log_file: str) -> None:
        self.log_file = log_file
        self.stages: dict[str, Score] = {}
        self.bare: dict[str, Score] = {}
        self.at_steps: dict[str, Score] = {}  # printed behind a step of the training: the last ones may be all there is
        self.others: list[tuple[Score, str | None]] = []
        self.notes: list[str] = []

    @property
    def has_any(self) -> bool:
        """Some score was read."""
        return bool(self.stages or self.bare or self.others)

    @property
    def is_past_training(self) -> bool:
        """A score of the quantized weights was read, so training is over."""
        return any(stage in self.stages for stage in ("post_quant", "sliding", "post_ttt"))

    def take(self, score: Score) -> None:
        """Take one score line: a stage, a repeat of another score, a variant, or an unknown label."""
        meaning = meaning_of(score.label, score.rest)
        if not (math.isfinite(score.bpb) and (score.nats is None or math.isfinite(score.nats))):
            said = f"({score.nats}, {score.bpb}): not used"
            self.notes.append(f"{self.log_file}: stage {meaning.stage or score.label} is not a number {said}")
        elif meaning.stage is None or meaning.is_variant:
            self._take_other(score, meaning.stage)
        elif score.nats is None:
            self.bare[meaning.stage] = score
        elif not self._is_repeat(meaning.stage, score):
            self._take_stage(meaning.stage, score)

    def _take_other(self, score: Score, stage: str | None) -> None:
        base = _base(score.label)
        same = next((place for place, (known, _) in enumerate(self.others) if _base(known.label) == base), None)
        if same is None:
            self.others.append((score, stage))
            return
        known = self.others[same][0]
        if known.nats is not None and (score.nats is None or (_is_exact(known) and not _is_exact(score))):
            return
        self.others[same] = (score._replace(seconds=score.seconds or known.seconds), stage)

    def _is_repeat(self, stage: str, score: Score) -> bool:
        """Return whether a line repeats the score of a later pass under the label of an earlier one."""
        later = {"post_quant": ("sliding", "post_ttt"), "sliding": ("post_ttt",)}.get(stage, ())
        known = self.stages.get(stage)
        if known is not None and _base(known.label) == _base(score.label):
            return False
        passes = [self.stages[name] for name in later if name in self.stages]
        passes += [other for other, of_stage in self.others if of_stage != "post_ema"]
        if any(_are_equal(score, other) for other in passes):
            return True
        if known is not None and stage == "post_quant" and passes and not _are_equal(score, known):
            self._take_other(score, stage)  # printed behind the final pass: its own figure, whatever its label
            return True
        return False

    def _take_stage(self, stage: str, score: Score) -> None:
        known = self.stages.get(stage)
        if known is not None and stage == "post_ema" and _is_raw(known) != _is_raw(score):
            averaged, raw = (score, known) if _is_raw(known) else (known, score)
            self.stages[stage] = averaged  # the averaged weights are those that are quantized
            self._take_other(raw, stage)
            return
        if known is not None and _is_exact(known) and not _is_exact(score):
            return
        if known is not None and known.bpb != score.bpb and not _are_equal(known, score):
            self.notes.append(
                f"{self.log_file}: stage {stage} is printed more than once ({known.bpb} as {known.label!r}, "
                f"{score.bpb} as {score.label!r}): the last one is used"
            )
        seconds = score.seconds if score.seconds is not None or known is None else known.seconds
        self.stages[stage] = score._replace(seconds=seconds)  # the exact line repeats the figures without the time

    def write_to(self, run: dict[str, Any], provenance: dict[str, str], unknown: list[str]) -> None:
        """Write the stages and the other scores into a run, with the label that each was printed under."""
        for stage, score in (*self.bare.items(), *self.at_steps.items()):
            if math.isfinite(score.bpb):
                self.stages.setdefault(stage, score)
        for stage, score in self.stages.items():
            run[stage] = entry_of(score)
            provenance[stage] = f"{self.log_file}: {score.label}"
        run["score_decimals"] = {stage: score.decimals for stage, score in self.stages.items()}
        run["eval_times"] = {
            stage: round(1000 * score.seconds, 3) for stage, score in self.stages.items() if score.seconds is not None
        }
        run["other_scores"] = [
            {
                "label": score.label, "nats": score.nats, "bpb": score.bpb, "decimals": score.decimals, "stage": stage,
                "time_ms": None if score.seconds is None else round(1000 * score.seconds, 3),
            }
            for score, stage in self.others
        ]  # fmt: skip
        if self.others:
            provenance["other_scores"] = f"{self.log_file}: {', '.join(score.label for score, _ in self.others)}"
        unknown += self.notes
        unknown += [unused_note(self.log_file, score.label, stage) for score, stage in self.others]


def unused_note(log_file: str, label: str, stage: str | None) -> str:
    """Return the note on a score that is no stage of its run."""
    if stage is None:
        return f"{log_file}: score line with an unknown label {label!r}: not used"
    return f"{log_file}: {label!r} is another score of stage {stage}: kept beside it, not used"


def entry_of(score: Score) -> dict[str, Any]:
    """Return a score in the form of a stage of a published record."""
    return {"val_bpb": score.bpb, "val_loss_nats": score.nats, "seconds": score.seconds, "label": score.label}


def _base(label: str) -> str:
    return base_label(label.lower().strip())


def _is_raw(score: Score) -> bool:
    return re.search(r"(?<![a-z])raw(?![a-z])", score.label.lower()) is not None


def _is_exact(score: Score) -> bool:
    return score.label.lower().endswith("exact")


def _are_equal(a: Score, b: Score) -> bool:
    """Return whether two scores are one number, printed with as many or with fewer decimals."""
    half_unit = 0.5 * 10.0 ** -min(a.decimals, b.decimals)
    return abs(a.bpb - b.bpb) <= half_unit * (1 + 1e-6)
