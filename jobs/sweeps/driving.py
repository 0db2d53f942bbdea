"""Options of the commands that drive a sweep."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.work import Options


def add_driving_options(parser: argparse.ArgumentParser) -> None:
    """Add where the runs of a sweep are computed, what may have changed, and how progress is shown."""
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--local", action="store_true", help="one seed after the other in this process, without Ray")
    place.add_argument("--address", metavar="A", help="Ray cluster to use; without it one is started on this machine")
    parser.add_argument(
        "--allow-code-change", action="store_true",
        help="continue a run directory made by other code, libraries, device or threads; rows are marked",
    )  # fmt: skip
    parser.add_argument(
        "--progress", choices=("auto", "plain", "json"), default="auto",
        help="auto: a live table on a terminal, plain lines elsewhere",
    )  # fmt: skip


def options_of(args: argparse.Namespace, **more: Any) -> Options:
    """Return the driver's options as given, and more."""
    from runner.work import Options

    return Options(
        is_local=args.local, address=args.address, allow_code_change=args.allow_code_change, progress=args.progress,
        **more,
    )  # fmt: skip
