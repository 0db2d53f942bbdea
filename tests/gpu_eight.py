"""All GPUs of one host within one time limit: python -m tests.gpu_eight CORPUS OUT [--gpus 8] [--limit_s 560].

CORPUS holds shards (*_train_*.bin, *_val_*.bin) and one tokenizer (*.model). One part after the other, each within its
share of the time: `published`, the whole recipe over a gang of all GPUs through Ray; `scale`, train tokens/s on 1, 2,
4, 8 GPUs; `gangs`, two gangs of half the GPUs, one of which loses a rank; `plan`, what `seedsweep plan` says here.
OUT gets each row at once (rows.jsonl) and, after each part, the tables (summary.md) and one archive of what the runs
left: a call that is killed leaves what was measured. Exit code 1 if a part failed or was left out, 2 if the machine
lacks something. `--device cpu --gpus 2` rehearses it; docs/bench/README.md says what the rows hold.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests import gpu_eight_parts as parts
from tests.gpu_eight_rows import Need, share_s, summarize
from tests.gpu_kit import data_section, write_archive

PARTS = {
    "published": parts.run_published, "scale": parts.run_scale, "gangs": parts.run_gangs, "plan": parts.run_plan,
}  # fmt: skip
KEPT = ("sweep.json", "events.jsonl", "state.json", "kill.json", "killed.json", "notes-*.jsonl", "results",
        "seeds/*/attempt.json", "seeds/*/stages", "seeds/*/ledger", "seeds/*/gpu.npz", "seeds/*/steps.npz",
        "seeds/*/logs")  # fmt: skip
END_S = 8.0  # of a part's share, to end what it started


def make_needs(args: argparse.Namespace) -> list[Need]:
    """Return the seconds of each part that was picked, in their order; estimates for eight H100."""
    needs = {
        "published": Need("published", args.budget_s + 120.0, args.budget_s + 200.0),
        "scale": Need("scale", 50.0, 120.0),
        "gangs": Need("gangs", 1.25 * args.gang_s + 60.0, 1.25 * args.gang_s + 110.0),
        "plan": Need("plan", 8.0, 40.0),
    }
    return [needs[name] for name in PARTS if name in args.parts]


def why_unfit(args: argparse.Namespace) -> str:
    """Return in one line what this machine lacks for the run, "" where it lacks nothing."""
    from importlib.util import find_spec

    import torch

    from model.data.cpus import usable_cpus
    from runner.machine.gpus import count_gpus

    if args.device == "cuda" and (here := min(count_gpus(), torch.cuda.device_count())) < args.gpus:
        return f"{args.gpus} GPUs are needed, {here} are here; see --gpus"
    if args.gpus * args.cpus > usable_cpus():
        return f"--gpus {args.gpus} ranks of --cpus {args.cpus} need more than the {usable_cpus()} CPU cores here"
    if "gangs" in args.parts and args.gpus < 2:
        return "--gpus 1 makes no two gangs; name the other --parts"
    if find_spec("ray") is None:
        return "the package ray is missing; install it in this Python"
    for path in (args.work, args.out / "rows.jsonl"):
        if path.exists():
            return f"{path} exists already; name a new folder"
    try:
        data_section(args.corpus)
    except ValueError as error:
        return str(error)
    return ""


@dataclass
class Session:
    """The call at work: its arguments, its clock, and the rows so far."""

    args: argparse.Namespace
    begun: float
    rows: list[dict[str, Any]] = field(default_factory=list)

    def now(self) -> float:
        """Return the seconds since the call began."""
        return time.monotonic() - self.begun

    def say(self, text: str) -> None:
        """Print a line of progress with the seconds."""
        print(f"t={self.now():5.1f} {text}", flush=True)

    def add(self, part: str, row: str, **values: Any) -> None:
        """Keep a row: in memory, as a line of OUT/rows.jsonl at once, and on the terminal."""
        whole = {"part": part, "row": row, "at_s": round(self.now(), 1), **values}
        self.rows.append(whole)
        line = json.dumps(whole, default=float)
        with (self.args.out / "rows.jsonl").open("a") as file:
            file.write(f"{line}\n")
        self.say(line if len(line) < 400 else f"{line[:400]}...")

    def keep(self) -> None:
        """Write the tables, and everything small that the runs left, into OUT."""
        work, out = self.args.work, self.args.out
        (out / "summary.md").write_text(summarize(self.rows))
        small = [path for pattern in ("*.yaml", "*.log", "*.json") for path in sorted(work.glob(pattern))]
        small += [path for pattern in KEPT for path in sorted(work.glob(f"*/{pattern}"))]
        write_archive(out / "records.tar.xz", [(path, str(path.relative_to(work))) for path in small], work)


def run_part(session: Session, name: str, needs: Sequence[Need]) -> bool:
    """Run a part within its share of the time; return whether all of it was done and well."""
    share = share_s(needs, name, session.args.limit_s - session.now())
    if share is None:
        left = session.args.limit_s - session.now()
        session.add(name, "none", left_out=f"{left:.0f} s were left")
        return False
    session.say(f"{name} begins, for {share:.0f} s at most")
    begun, until = session.now(), session.now() + share - END_S
    run: Callable[[Session, float], bool] = PARTS[name]
    try:
        is_well = run(session, until)
    except Exception as error:  # the other parts are to be measured whatever happens in this one
        session.add(name, "error", error=f"{type(error).__name__}: {error}")
        is_well = False
    session.say(f"{name} ended after {session.now() - begun:.1f} s" + ("" if is_well else ", not well"))
    session.keep()
    return is_well


def note_machine(session: Session) -> None:
    """Keep what everything runs on."""
    from importlib.metadata import version

    from model.data.cpus import usable_cpus
    from runner.machine.gpus import query_gpus
    from runner.provenance import git_state

    args = session.args
    gpus = query_gpus([]) if args.device == "cuda" else []
    commit = args.git_commit or git_state().commit
    session.add(
        "machine", "machine", gpus=args.gpus, gpu_model=gpus[0].model if gpus else None,
        driver=gpus[0].driver if gpus else None, cpus=usable_cpus(), cpus_each=args.cpus, torch=version("torch"),
        ray=version("ray"), preset=args.preset, corpus=args.corpus.name, git_commit=commit,
    )  # fmt: skip


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command's arguments, paths absolute."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path, help="what is to be kept: three files")
    parser.add_argument("--work", type=Path, default=Path("/tmp/gpu_eight"), help="run directories; must be new")
    parser.add_argument("--gpus", type=int, choices=(1, 2, 4, 8), default=8)
    parser.add_argument("--cpus", type=int, default=8, help="of each rank")
    parser.add_argument("--limit_s", type=float, default=560.0, help="all is over after this")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS))
    parser.add_argument("--preset", default="published")
    parser.add_argument("--attention", default="triton", help="one kernel for all rows; auto: a stopwatch chooses")
    parser.add_argument("--budget_s", type=float, default=240.0, help="train.budget_s of the whole run")
    parser.add_argument("--documents", type=int, default=1500, help="validation documents of the whole run, at most")
    parser.add_argument("--gang_s", type=float, default=30.0, help="of training, each of the two gangs")
    parser.add_argument("--overrides", type=yaml.safe_load, default={}, help="YAML of settings laid over both specs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--git_commit", default="", help="commit to record, where git is not at hand")
    args = parser.parse_args(argv)
    for name in ("corpus", "out", "work"):
        setattr(args, name, getattr(args, name).resolve())
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts."""
    begun = time.monotonic()
    args = parse_arguments(argv)
    if problem := why_unfit(args):
        print(f"tests.gpu_eight: error: {problem}", file=sys.stderr)
        return 2
    for folder in (args.work, args.out):
        folder.mkdir(parents=True, exist_ok=True)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # on the way out what was started is ended
    session, needs = Session(args, begun), make_needs(args)
    try:
        note_machine(session)
        well = [run_part(session, need.part, needs) for need in needs]
    finally:
        session.keep()
        signal.signal(signal.SIGTERM, before)
    print(summarize(session.rows), flush=True)
    return 0 if all(well) else 1


if __name__ == "__main__":
    sys.exit(main())
