"""Does a rerun reproduce what was claimed? Reproduced and not reproduced both have to be shown; else it is not decided.

The question is about the mean over seeds, in bits per byte, against a margin that counts as the same. "Reproduced"
needs two one-sided t-tests (the difference is above -margin, and below +margin). "Not reproduced" needs the opposite
claim shown: a difference beyond the margin. Failing to show the one never counts as the other.

Which test is decided by the seeds alone, before any score is looked at. Where the seeds of one side are all among those
of the other, a rerun seed is paired with the claimed score of the same seed. That asks whether running these seeds
gives these scores. It is right however alike the two runs of a seed are, from bit for bit to nothing shared but a
number, because the spread it uses is that of the differences themselves; on other hardware that spread is simply large.
Where the seeds differ, Welch's test compares two samples of the recipe. The claimed mean is never taken for an exact
target: it comes from a few seeds, and an honest one misses the recipe's true mean by chance.

One seed on a side has no spread of its own. Lending it the other side's would let copied logs or one lucky run decide,
so such a comparison stays undecided, and says where the one score lies.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from results.compare.comparison import pooled_std_of
from results.compare.power import (
    POWER,
    equivalence_power,
    find_fewest,
    paired_equivalence_power,
    pairs_needed,
    power,
    seeds_needed,
)
from results.compare.sides import Side
from results.stats import Difference, paired, summarize, welch
from results.validation_text import relate, why_not_comparable

MARGIN_BPB = 0.0005  # below the spread over seeds of the published records, 0.0007
ALPHA = 0.05  # of each one-sided test, the usual level for equivalence: then a 90 % interval decides
REPRODUCED, NOT_REPRODUCED, NOT_DECIDED = "reproduced", "not reproduced", "not decided"


class Plan(NamedTuple):
    """Seeds that would decide with the usual power, None where no affordable number would.

    rerun: as many rerun seeds, beside those claimed; both: as many on each side. true_gap: the difference in bits per
    byte that is taken for true, 0 where the observed one lies within the margin.
    """

    rerun: int | None
    both: int | None
    true_gap: float


class Verdict(NamedTuple):
    """A rerun against a claim; differences are rerun - claimed in bits per byte, so that positive means worse.

    seeds: those of the rerun that the test uses, None where a log names none. p_equivalent is the larger p of the two
    one-sided tests, p_beyond that of a difference beyond the margin; None without spread.
    text: "same", "other" or "not known", the relation of the validation texts.
    """

    rerun: Side
    claimed: Side
    margin: float
    method: str
    is_paired: bool
    difference: Difference
    p_equivalent: float | None
    p_beyond: float | None
    words: str
    plan: Plan | None
    text: str
    forced: list[str]
    notes: list[str]


def judge(
    rerun: Side, claimed: Side, *, margin: float = MARGIN_BPB, pairing: str | None = None, is_forced: bool = False
) -> Verdict:
    """Return whether the mean of rerun is shown to lie within margin (bits per byte) of the claimed one.

    pairing: "seeds" or "none" instead of the rule. Raises ValueError for a margin that is not positive, for sides on
    different stages or known to be on other validation text or mixed in themselves (unless is_forced).
    """
    if not (math.isfinite(margin) and margin > 0):
        raise ValueError(f"margin={margin:g} must be a positive number of bits per byte: no data shows exact equality")
    if pairing == "documents":
        raise ValueError("--paired documents is about these artifacts only; --reproduces takes seeds or none")
    text = relate(claimed.text, rerun.text)
    forced = [f"{side.name}: {mixture}" for side in (rerun, claimed) for mixture in side.mixtures]
    forced += [str(why_not_comparable(claimed.text, rerun.text))] if text == "other" else []
    forced += [f"other stages: {rerun.stage} and {claimed.stage}"] if rerun.stage != claimed.stage else []
    if forced and not is_forced:
        raise ValueError(f"not compared: {'; '.join(forced)} (--force compares anyway and labels every line)")
    notes = [f"{side.name}: {note}" for side in (rerun, claimed) for note in side.notes]
    shared = shared_seeds(rerun, claimed)
    if shared and all(_is_copy(rerun, claimed, seed) for seed in shared):
        notes.append("every seed has the very score and seconds of the claim: these are its own logs, not a rerun")
    is_paired = is_nested(rerun, claimed) if pairing is None else pairing == "seeds"
    difference, method = _difference(rerun, claimed, shared if is_paired else None, notes)
    p_equivalent, p_beyond = difference.p_equivalent(margin), difference.p_beyond(margin)
    words = _words(p_equivalent, p_beyond)
    plan = _plan(rerun, claimed, difference, margin, is_paired) if words == NOT_DECIDED else None
    return Verdict(
        rerun, claimed, margin, method, is_paired, difference, p_equivalent, p_beyond, words, plan, text, forced, notes
    )


def shared_seeds(rerun: Side, claimed: Side) -> list[int]:
    """Return the seeds that both sides have, sorted; logs that name no seed share none."""
    return sorted(seed for seed in set(rerun.bpb) & set(claimed.bpb) if seed is not None)


def _is_copy(rerun: Side, claimed: Side, seed: int) -> bool:
    """Return whether a seed has the same score in the same times to the last digit, as no second run has."""
    paces = [side.pace.get(seed) for side in (rerun, claimed)]
    is_timed = paces[0] is not None and paces[0].train_s is not None and paces[0].score_s is not None
    return is_timed and paces[0] == paces[1] and rerun.bpb[seed] == claimed.bpb[seed]


def is_nested(rerun: Side, claimed: Side) -> bool:
    """Return whether a test would pair the seeds: one side's are all among the other's, and there are two or more."""
    shared = set(shared_seeds(rerun, claimed))
    return len(shared) > 1 and (shared == set(rerun.bpb) or shared == set(claimed.bpb))


def _difference(rerun: Side, claimed: Side, pairs: list[int] | None, notes: list[str]) -> tuple[Difference, str]:
    """Return rerun - claimed with the interval that the two one-sided tests amount to, and how it was tested."""
    confidence = 1 - 2 * ALPHA
    if pairs is None:
        values = list(rerun.bpb.values()), list(claimed.bpb.values())
        return welch(*values, confidence=confidence), "two one-sided Welch t-tests over seeds"
    if not pairs:
        raise ValueError(f"--paired seeds needs seeds that both sides have; {rerun.name} and {claimed.name} share none")
    for side in (rerun, claimed):
        alone = sorted(set(side.bpb) - set(pairs), key=str)
        if alone:
            notes.append(f"{side.name}: seeds {', '.join(map(str, alone))} have no partner and are not in the test")
    values = [rerun.bpb[seed] for seed in pairs], [claimed.bpb[seed] for seed in pairs]
    return paired(*values, confidence=confidence), f"two one-sided paired t-tests over {len(pairs)} seeds"


def _words(p_equivalent: float | None, p_beyond: float | None) -> str:
    """Return the verdict; at most one of the two claims can be shown."""
    if p_equivalent is not None and p_equivalent < ALPHA:
        return REPRODUCED
    return NOT_REPRODUCED if p_beyond is not None and p_beyond < ALPHA else NOT_DECIDED


def _plan(rerun: Side, claimed: Side, difference: Difference, margin: float, is_paired: bool) -> Plan | None:
    """Return how many seeds would decide, at the measured spread; None where none was measured.

    A difference within the margin, or of one seed, is planned for as none at all; a larger one as it was observed.
    """
    is_seen = difference.standard_error is not None and abs(difference.mean) > margin
    gap = abs(difference.mean) if is_seen else 0.0
    if is_paired and difference.standard_error is not None and difference.degrees_of_freedom is not None:
        std = difference.standard_error * math.sqrt(difference.degrees_of_freedom + 1)
        return None if std == 0 else Plan(None, _pairs(gap, std, margin), gap)
    spread = pooled_std_of([list(side.bpb.values()) for side in (rerun, claimed)])
    if not spread:
        return None
    return Plan(_reruns(gap, spread, margin, len(claimed.bpb)), _both(gap, spread, margin), gap)


def _pairs(gap: float, std: float, margin: float) -> int | None:
    """Return the pairs that would decide."""
    if gap:
        return pairs_needed(gain=gap - margin, std=std, alpha=ALPHA)
    return find_fewest(lambda n: paired_equivalence_power(gap=0, std=std, n=n, margin=margin, alpha=ALPHA) >= POWER)


def _both(gap: float, std: float, margin: float) -> int | None:
    """Return the seeds on each side that would decide."""
    if gap:
        return seeds_needed(gain=gap, std=std, margin=margin, alpha=ALPHA)
    return find_fewest(lambda n: _show_equal(std, margin, n, n) >= POWER)


def _reruns(gap: float, std: float, margin: float, num_claimed: int) -> int | None:
    """Return the rerun seeds that would decide beside the claimed ones; None where the claim's own few are too few."""
    if num_claimed < 2:
        return None
    if gap:
        return find_fewest(
            lambda n: power(gain=gap, std_a=std, std_b=std, n_a=n, n_b=num_claimed, margin=margin, alpha=ALPHA) >= POWER
        )
    return find_fewest(lambda n: _show_equal(std, margin, n, num_claimed) >= POWER)


def _show_equal(std: float, margin: float, n_a: int, n_b: int) -> float:
    return equivalence_power(gap=0, std_a=std, std_b=std, n_a=n_a, n_b=n_b, margin=margin, alpha=ALPHA)


def predicted_range(side: Side) -> tuple[float, float] | None:
    """Return the mean of a side and how far from it one more seed of the same spread falls in 95 % of cases."""
    from scipy import special

    entry = summarize(list(side.bpb.values()))
    if entry.mean is None or entry.std_ddof1 is None:
        return None
    reach = float(special.stdtrit(entry.n - 1, 0.975)) * entry.std_ddof1 * math.sqrt(1 + 1 / entry.n)
    return entry.mean, reach
