"""`seedsweep verify FOLDER`: derive every figure of a submission folder again from its own files, without a GPU."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a folder that `seedsweep export` wrote")
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--all", action="store_true", help="list what agrees, too")


def execute(args: argparse.Namespace) -> int:
    """Print disagreements, what could not be checked, and the counts; 1 when anything disagrees."""
    from model.bundle.program import is_twin
    from results.verify.checks import AGREES, DIFFERS, UNCHECKED, Formulas, counts
    from results.verify.folder import verify_folder

    checks = verify_folder(args.folder, Formulas(hash_config, hash_data_of, check_score_ledger, is_twin))
    found = counts(checks)
    if args.format == "json":
        print(json.dumps({"counts": found, "checks": [check._asdict() for check in checks]}, indent=1))
        return int(found[DIFFERS] > 0)
    for check in checks:
        if args.all or check.state != AGREES:
            print(f"{check.state}: {check.where}: {check.detail}")
    print(
        f"{args.folder}: {found[AGREES]} statements agree, {found[DIFFERS]} differ, "
        f"{found[UNCHECKED]} could not be checked"
    )
    return int(found[DIFFERS] > 0)


def hash_config(config: Mapping[str, Any], world_size: int) -> str:
    """Return the hash of a resolved configuration."""
    from model.config import config_from_plain, config_hash

    return config_hash(config_from_plain(config), world_size=world_size)


def hash_data_of(run: Mapping[str, Any]) -> str:
    """Return the hash over the files that run.json lists."""
    from model.config import config_from_plain
    from model.data.manifest import combine_hashes

    # JSON has sorted them by path; they are read in the order of their names
    train, val = (
        dict(sorted(run["data"][split].items(), key=lambda entry: (Path(entry[0]).name, entry[0])))
        for split in ("train", "val")
    )
    return combine_hashes(train, val, run["data"]["tokenizer"], config_from_plain(run["config"]).data)


def check_score_ledger(arrays: Mapping[str, np.ndarray], targets: np.ndarray) -> list[str]:
    """Return what is wrong with a score ledger, given each document's number of targets."""
    import numpy as np

    from model.ttt.ledger_reading import broken_chains, read_events, times_scored

    events = read_events(dict(arrays))
    starts = np.concatenate(([0], np.cumsum(targets)[:-1]))
    problems = [f"the chain of rank {rank} is broken" for rank in broken_chains(events)]
    scored = times_scored(events, starts, int(targets.sum()))
    wrong = np.flatnonzero(scored != 1)
    if wrong.size:
        problems.append(f"{wrong.size} targets were not scored exactly once, the first is {wrong[0]}")
    return problems
