"""Hold every formula of the project against golden figures of the published script: python -m tests.parity DIR.

DIR holds the files of ten sets. One line a set: name, worst key and its error, tolerance, pass or fail. Keys without a
stated tolerance are listed as not compared. Exit code 0: all ten sets pass; 1: one fails or is missing; 2: bad use.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.parity_core import Comparison, GoldenSet
from tests.parity_facts import check_facts
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

    @property
    def has_passed(self) -> bool:
        """True if something was compared and nothing was off."""
        return self.num_compared > 0 and not self.failures and not self.reason

    def line(self) -> str:
        """Return the set's line of the report."""
        verdict = "pass" if self.has_passed else "FAIL"
        if self.worst is None:
            return f"{self.name:<20} {verdict}  {self.reason or 'no key of it was compared'}"
        found = f"worst {self.worst.key} error {self.worst.error:.3g} tolerance {self.worst.tolerance:.3g}"
        counts = f"({self.num_compared} compared, {len(self.not_compared)} not compared)"
        return f"{self.name:<20} {verdict}  {found} {counts}{'  ' + self.reason if self.reason else ''}"


@dataclass(frozen=True)
class ParitySet:
    """One of the ten sets: its files and the check that reads them."""

    name: str
    files: tuple[str, ...]
    check: Callable[[GoldenSet], None]
    borrowed: tuple[str, ...] = ()


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
)


def run_set(parity_set: ParitySet, directory: Path) -> Outcome:
    """Check one set; a missing file, a setting we lack and a formula that raises are failures with a reason."""
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
    """Check all sets in a directory and print the report; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path, help="folder with the golden files of ten sets")
    directory = parser.parse_args(argv).directory
    if not directory.is_dir():
        print(f"tests.parity: error: {directory} is not a folder", file=sys.stderr)
        return 2
    outcomes = []
    for parity_set in SETS:
        outcome = run_set(parity_set, directory)
        outcomes.append(outcome)
        print(outcome.line(), flush=True)
    for outcome in outcomes:
        for item in outcome.failures:
            print(f"failed: {outcome.name}: {item.key} error {item.error:.3g} tolerance {item.tolerance:.3g}")
    left_out = [f"{outcome.name}: {', '.join(outcome.not_compared)}" for outcome in outcomes if outcome.not_compared]
    print(f"not compared: {sum(len(outcome.not_compared) for outcome in outcomes)} keys without a stated tolerance")
    for line in left_out:
        print(f"  {line}")
    num_passed = sum(outcome.has_passed for outcome in outcomes)
    print(f"{num_passed} of {len(SETS)} sets pass")
    return 0 if num_passed == len(SETS) else 1


if __name__ == "__main__":
    sys.exit(main())
