"""Hold every formula of the project against golden figures of published scripts: python -m tests.parity DIR.

Two families of sets: 1 to 10 for the base recipe (tests/golden), F1 to F6 for what the frontier adds
(tests/golden_frontier). DIR may hold one family, both, or some sets only; every set found is checked.
One line a set, in this order: its name, then pass or FAIL with the worst key, its error and its tolerance. A set of
which DIR has no file is named as missing: that fails only where DIR has no file of any set, for then nothing
was checked. A set of which DIR has some files, but not all, fails and names the first that it lacks.
Keys without a stated tolerance are listed as not compared. Exit code 0: every set found passes; 1: one fails, or there
is none; 2: bad use.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.parity_core import Comparison, GoldenSet
from tests.parity_facts import check_facts
from tests.parity_frontier_model import check_extras, check_gates, check_two_lane
from tests.parity_frontier_parts import check_polar_express
from tests.parity_frontier_quant import check_quant
from tests.parity_frontier_ttt import check_ttt_scaled
from tests.parity_model import check_model
from tests.parity_parts import check_bytes, check_gptq, check_muon, check_packing, check_schedule
from tests.parity_runs import check_evaluation, check_training, check_ttt


@dataclass(frozen=True)
class Outcome:
    """What became of one set: its worst comparison, or why there is none."""

    name: str
    num_compared: int
    num_inputs: int
    worst: Comparison | None
    failures: tuple[Comparison, ...]
    not_compared: tuple[str, ...] = ()
    reason: str = ""
    is_missing: bool = False

    @property
    def has_passed(self) -> bool:
        """True if something was compared and nothing was off."""
        return self.num_compared > 0 and not self.failures and not self.reason

    def line(self, *, is_empty: bool = False) -> str:
        """Return the set's line of the report; is_empty: no set at all is there, so that a missing one fails."""
        verdict = "pass" if self.has_passed else "FAIL"
        if self.is_missing and not is_empty:
            return f"{self.name:<20} {self.reason}"
        if self.worst is None:
            return f"{self.name:<20} {verdict}  {self.reason or 'no key of it was compared'}"
        found = f"worst {self.worst.key} error {self.worst.error:.3g} tolerance {self.worst.tolerance:.3g}"
        counts = f"({self.num_compared} compared, {len(self.not_compared)} not compared)"
        return f"{self.name:<20} {verdict}  {found} {counts}{'  ' + self.reason if self.reason else ''}"


@dataclass(frozen=True)
class ParitySet:
    """One set: its files, the check that reads them, and files of other sets that it reads as well."""

    name: str
    files: tuple[str, ...]
    check: Callable[[GoldenSet], None]
    borrowed: tuple[str, ...] = ()

    def is_in(self, directory: Path) -> bool:
        """Return whether a folder has any of the set's own files."""
        return any((directory / name).exists() for name in self.files)


SETS = (
    ParitySet("1 bytes", ("bpb_luts.npz",), check_bytes),
    ParitySet("2 model", ("model_tiny.npz", "model_tiny_grads.npz"), check_model),
    ParitySet("3 full size", ("model_full_facts.json",), check_facts),
    ParitySet("4 muon", ("newton_schulz.npz", "muon.npz"), check_muon),
    ParitySet("5 gptq", ("gptq.npz", "byte_shuffle.npz"), check_gptq),
    ParitySet("6 packing", ("cu_seqlens.json",), check_packing),
    ParitySet("7 schedule", ("schedule.json",), check_schedule),
    ParitySet("8 training", ("train_tiny.npz", "train_tiny_params.npz", "train_tiny_f32ns.npz"), check_training),
    ParitySet("9 adaptation", ("doc_ttt_tiny.npz",), check_ttt),
    ParitySet("10 evaluation", ("eval_doc.npz",), check_evaluation, borrowed=("doc_ttt_tiny.npz",)),
    ParitySet("F1 two lanes", ("model_two_lane.npz",), check_two_lane),
    ParitySet("F2 gates", ("model_gates.npz",), check_gates),
    ParitySet("F3 extras", ("model_extras.npz",), check_extras),
    ParitySet("F4 polar express", ("polar_express.npz",), check_polar_express),
    ParitySet("F5 scaled adapters", ("ttt_scaled.npz",), check_ttt_scaled, borrowed=("model_gates.npz",)),
    ParitySet("F6 groups", ("quant.npz",), check_quant),
)


def run_set(parity_set: ParitySet, directory: Path) -> Outcome:
    """Check one set; a missing file, a setting we lack and a formula that raises are failures with a reason."""
    if not parity_set.is_in(directory):
        missing = f"missing {', '.join(parity_set.files)}"
        return Outcome(parity_set.name, 0, 0, None, (), (), missing, is_missing=True)
    golden, reason = None, ""
    try:
        golden = GoldenSet(directory, parity_set.files, parity_set.borrowed)
        parity_set.check(golden)
    except (OSError, ValueError, LookupError, RuntimeError, AssertionError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    if golden is None:
        return Outcome(parity_set.name, 0, 0, None, (), (), reason)
    comparisons = golden.comparisons
    return Outcome(
        name=parity_set.name,
        num_compared=len({item.key for item in comparisons}),
        num_inputs=len(golden.inputs),
        worst=max(comparisons, key=lambda item: item.severity, default=None),
        failures=tuple(item for item in comparisons if not item.has_passed),
        not_compared=tuple(golden.not_compared()),
        reason=reason,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Check the sets that a directory has and print the report; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "directory", type=Path, help="folder with golden files of the base, of the frontier, or of both"
    )
    directory = parser.parse_args(argv).directory
    if not directory.is_dir():
        print(f"tests.parity: error: {directory} is not a folder", file=sys.stderr)
        return 2
    is_empty = not any(parity_set.is_in(directory) for parity_set in SETS)
    outcomes = []
    for parity_set in SETS:
        outcome = run_set(parity_set, directory)
        outcomes.append(outcome)
        print(outcome.line(is_empty=is_empty), flush=True)
    for outcome in outcomes:
        for item in outcome.failures:
            print(f"failed: {outcome.name}: {item.key} error {item.error:.3g} tolerance {item.tolerance:.3g}")
    left_out = [f"{outcome.name}: {', '.join(outcome.not_compared)}" for outcome in outcomes if outcome.not_compared]
    print(f"not compared: {sum(len(outcome.not_compared) for outcome in outcomes)} keys without a stated tolerance")
    for line in left_out:
        print(f"  {line}")
    num_passed = sum(outcome.has_passed for outcome in outcomes)
    num_found = len(outcomes) if is_empty else sum(not outcome.is_missing for outcome in outcomes)
    print(
        f"{num_passed} of {num_found} sets pass"
        + f", {len(outcomes) - num_found} missing" * (num_found < len(outcomes))
    )
    return 0 if num_passed == num_found else 1


if __name__ == "__main__":
    sys.exit(main())
