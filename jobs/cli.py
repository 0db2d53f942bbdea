"""The front door: one command, `seedsweep`, with a module of jobs behind each subcommand.

Only the chosen command's module is imported, so `seedsweep --help` needs neither torch nor ray.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import select
import sys
import threading
from collections.abc import Sequence

from seedsweep import hold_packages

# name -> (module in jobs, one line of help); the order is the order of the help page
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("sweeps.run", "run a sweep: every seed of a spec, on Ray or in this process"),
    "plan": ("sweeps.plan", "show what a sweep would do, and whether it can, without starting anything"),
    "status": ("sweeps.status", "show where every seed stands, from the run directory alone"),
    "logs": ("sweeps.logs", "print what a rank printed"),
    "cancel": ("sweeps.cancel", "let a running sweep, one seed or one variant end with a checkpoint"),
    "rerun": ("sweeps.rerun", "run the failed seeds of a sweep again"),
    "program": ("sweeps.program", "write the spec that runs somebody else's training program over its seeds"),
    "submit": ("sweeps.submit", "run a sweep on a cluster as a Ray job"),
    "data": ("sweeps.data", "make or fetch token shards"),
    "table": ("figures.table", "print the seed table of a run directory, computed from Parquet"),
    "compare": ("figures.compare", "compare two systems: difference, interval, p, and what it means"),
    "published": ("figures.published", "list or show the figures other people published"),
    "import-logs": ("figures.import_logs", "read a submission folder into the same Parquet tables"),
    "report": ("figures.report", "make one self-contained page of figures and tables"),
    "export": ("figures.export", "write a submission folder from Parquet"),
    "verify": ("evidence.verify", "derive every figure of a submission folder again from its own files"),
    "reproduce": ("evidence.reproduce", "run a seed again as recorded and show how far each stage moved"),
    "bundle": ("evidence.bundle", "write an artifact with the one file that scores it, or trains it again"),
    "audit": ("evidence.audit", "probe finished runs against every rule, or the probes themselves"),
    "bench": ("bench.command", "measure how fast each part is here, with raw samples"),
    "inspect": ("evidence.inspect", "print what is inside an artifact"),
}

EXIT_PIPE_CLOSED = 141  # 128 and the number of SIGPIPE


class Version(argparse.Action):
    """Prints the version as installed; looked up only when asked, because that reads the disk."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print and end."""
        from importlib import metadata

        try:
            print(f"seedsweep {metadata.version('seedsweep')}")
        except metadata.PackageNotFoundError:
            print("seedsweep, from sources that are not installed")
        parser.exit()


def build_parser(chosen: str | None) -> argparse.ArgumentParser:
    """Return the parser; only the chosen command's options are filled in."""
    parser = argparse.ArgumentParser(prog="seedsweep", description="Prove what a recipe scores, over seeds.")
    parser.add_argument("--version", action=Version, nargs=0, help="print the version and end")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, help_line) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=help_line, description=help_line)
        if name == chosen:
            command = importlib.import_module(f"jobs.{module}")
            command.configure(subparser)
            subparser.set_defaults(execute=command.execute)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code (0 done, 1 failed, 2 bad input, 3 interrupted and resumable).

    A ValueError or OSError that reaches this point is a user's mistake or a full disk: one line, no traceback. When
    the reader of a pipe leaves (`| head`), the code is the one that a shell gives a program ended by that signal.
    """
    hold_packages()
    code = run_command(argv)
    if argv is None:  # the whole process is this command's
        end_under_threads(code)
    return code


def run_command(argv: Sequence[str] | None) -> int:
    """Run one command, print what went wrong, and return the exit code."""
    from runner.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED  # ours, now that the names are held

    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    try:
        parsed = build_parser(chosen).parse_args(arguments)
        code = int(parsed.execute(parsed))
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("seedsweep: interrupted; run the same command again to continue", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError) as error:
        if isinstance(error, BrokenPipeError) and has_reader_left():
            return EXIT_PIPE_CLOSED
        print(f"seedsweep: error: {error}", file=sys.stderr)
        return int(getattr(error, "exit_code", EXIT_BAD_INPUT))


def end_under_threads(code: int) -> None:
    """End the process now if a thread of ours is still inside a library: the interpreter's own way out would crash it.

    Such a thread is a seed of `--local` that was left in the middle of a step, or a store that does not answer.
    """
    if not any(thread.name.startswith("seedsweep-") for thread in threading.enumerate()):
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def has_reader_left() -> bool:
    """Return whether standard output is a pipe that nobody reads any more; what is left to say then goes nowhere."""
    waiting = select.poll()
    waiting.register(sys.stdout.fileno(), select.POLLOUT)
    if not any(state & select.POLLERR for _, state in waiting.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


if __name__ == "__main__":
    sys.exit(main())
