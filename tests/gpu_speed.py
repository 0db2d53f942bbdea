"""Every row of the table of speed that one GPU can give: python -m tests.gpu_speed OUT --corpus FOLDER.

FOLDER holds shards (*_train_*.bin, *_val_*.bin) and one tokenizer (*.model). Each measurement is a process
of its own, the most important row first, and none begins that would not end within --budget_s. With --baseline TREE
the same is measured by the sources in another folder, in turns with ours, on the same GPU. --gpu_parts 4 takes the
rows to four GPUs of one machine; --rows picks rows, for parts that are called apart, and --join joins what they left.
OUT gets, again after every process: speed.json and speed_before.json in the format of `seedsweep bench`, the table
in speed.txt, what the processes said in speed.log. Exit code 1 if a row failed or was left out, 2 for a mistake.
`--preset tiny` over the corpus of `seedsweep data builtin` rehearses it on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from jobs.bench.figures import Report, describe_environment
from jobs.bench.process import Bench, MeasurementFailed
from model.data.cpus import usable_cpus
from model.files.atomic import replace_file
from runner.machine.gpus import VISIBLE
from tests.gpu_kit import ROOT, data_section, end_processes, last_words, list_gpus, search_path, start_process
from tests.gpu_speed_outside import LOG, measure_outside
from tests.gpu_speed_rows import as_text, join_reports

TASKS = ROOT / "tests" / "gpu_speed_tasks.py"
SHARE_PART = 1250  # documents of a rank's share where there is no time for all
SHARE_WHOLE_S = 150.0


class Row(NamedTuple):
    """One kind of process: what it measures, a guess of its seconds, and how many there are of each tree."""

    name: str
    task: str
    guess_s: float
    repeats: int = 1
    options: Mapping[str, Any] = {}


ROWS = (
    Row("train", "measure_train", 40.0, 3),
    Row("ttt", "measure_ttt", 60.0),
    Row("eval", "measure_eval", 25.0),
    Row("gptq", "measure_gptq", 35.0, options={"process": 1}),  # only process 0 compares with brotli, for a minute
    Row("outside", "", 100.0),
    Row("share", "measure_share", 60.0),
)


class Tree(NamedTuple):
    """Sources to measure."""

    name: str  # "now" or "before"
    root: Path
    commit: str


@dataclass
class LimitedBench(Bench):
    """A benchmark whose processes are ended with all they started when the time is over, and whose words are kept."""

    session: Session | None = None

    def execute(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Run a measuring process within what is left of the time. Raises MeasurementFailed where that is too short."""
        assert self.session is not None
        ours = {name: value for name, value in environment.items() if os.environ.get(name) != value}
        return self.session.run(command[1:], ours, self.folder / LOG)


@dataclass
class Session:
    """The call at work: its arguments and clock, what was measured of each tree and row, what failed."""

    args: argparse.Namespace
    trees: list[Tree]
    folder: Path  # for what the processes leave
    environment: dict[str, Any] = field(default_factory=describe_environment)
    begun: float = field(default_factory=time.monotonic)
    waiting: list[Row] = field(default_factory=list)
    reports: dict[tuple[str, str], Report] = field(default_factory=dict)  # by tree and row
    failures: list[str] = field(default_factory=list)
    took: dict[tuple[str, str], float] = field(default_factory=dict)  # the longest process so far
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def left_s(self) -> float:
        """Return the seconds that are left."""
        return float(self.args.budget_s) - (time.monotonic() - self.begun)

    def say(self, text: str) -> None:
        """Print a line with the seconds."""
        print(f"t={time.monotonic() - self.begun:5.1f} {text}", flush=True)

    def fail(self, text: str) -> None:
        """Note what a row lacks."""
        with self.lock:
            self.failures.append(text)
        self.say(text)

    def next_row(self) -> Row | None:
        """Return the most important row that waits and would end in time; what would not goes to nobody."""
        with self.lock:
            for row in list(self.waiting):
                self.waiting.remove(row)
                if self.left_s() >= row.guess_s:
                    return row
                self.fail(f"{row.name}: left out, {self.left_s():.0f} s were left")
            return None

    def run(self, command: Sequence[str], env: Mapping[str, str], log: Path, cwd: Path = ROOT) -> int:
        """Run Python with these arguments to its end and return the exit code; its words go to log and speed.log.

        Raises MeasurementFailed if it had to be ended because the time was over.
        """
        process = start_process(command, log, cwd=cwd, **env)
        self.running.append(process)
        try:
            return process.wait(max(1.0, self.left_s()))
        except subprocess.TimeoutExpired:
            raise MeasurementFailed("ended, the time was over") from None
        finally:
            end_processes([process])
            self.running.remove(process)
            with self.lock, (self.args.out / "speed.log").open("ab") as whole:
                whole.write(f"--- {shlex.join(command)}\n".encode() + log.read_bytes())

    def write(self) -> None:
        """Write reports and table, whole."""
        with self.lock:
            found = {tree.name: self.join(tree) for tree in self.trees}
            for name, report in found.items():
                file = "speed.json" if name == "now" else f"speed_{name}.json"
                write_whole(self.args.out / file, json.dumps(report, indent=1) + "\n")
            write_whole(self.args.out / "speed.txt", as_text(found["now"], found.get("before")))

    def join(self, tree: Tree) -> dict[str, Any]:
        """Return all that was measured of a tree as one report."""
        whole = self.new_report(tree)
        for row in ROWS:
            report = self.reports.get((tree.name, row.name))
            if report is not None:
                whole.environment |= report.environment
                for name, figure in list(report.figures.items()):
                    whole.figures[f"{row.name}: {name}"] = type(figure)(
                        f"{row.name}: {name}", figure.unit, figure.wanted, figure.samples
                    )
                for note in list(report.notes):
                    whole.note(f"{row.name}: {note}")
        hashes = {
            report.environment.get("code_hash") for (name, _), report in self.reports.items() if name == tree.name
        }
        if len(hashes - {None}) > 1:
            whole.note(f"rows of different sources: {', '.join(sorted(map(str, hashes - {None})))}")
        for text in self.failures:
            whole.note(text)
        return whole.as_json()

    def new_report(self, tree: Tree) -> Report:
        """Return an empty report of a tree."""
        command = shlex.join(["python", "-m", "tests.gpu_speed", *self.args.given])
        settings = {
            "command": command, "tree": tree.name, "preset": self.args.preset, "repeats": self.args.repeats,
            "gpu_parts": self.args.gpu_parts, "took_s": round(time.monotonic() - self.begun, 1),
        }  # fmt: skip
        named = {"git_commit": tree.commit or "unknown", "git_dirty": None, "code_hash": None}  # the hash comes later
        is_ours = tree.name == "now" and not tree.commit
        return Report("speed", settings, self.environment | ({} if is_ours else named))


def write_whole(path: Path, text: str) -> None:
    """Replace a file."""
    with replace_file(path) as file:
        file.write(text.encode())


def work_off(session: Session, gpu: str | None) -> None:
    """Take one row after the other to a GPU, until none is left that would end in time."""
    while (row := session.next_row()) is not None:
        try:
            measure_row(session, row, gpu)
        except Exception as error:  # the other rows are to be measured whatever happens in this one
            session.fail(f"{row.name}: {type(error).__name__}: {error}")
        session.write()


def measure_row(session: Session, row: Row, gpu: str | None) -> None:
    """Run a row's processes, the trees in turns."""
    row = settle_share(session, row)
    repeats = session.args.repeats if row.repeats > 1 else 1
    for number in range(repeats):
        for tree in session.trees:
            if session.left_s() < session.took.get((tree.name, row.name), row.guess_s):
                session.fail(f"{row.name}, {tree.name}: {number} of {repeats} processes, the time was over")
                continue
            began = time.monotonic()
            session.say(f"{row.name}, {tree.name}, process {number + 1} of {repeats}, GPU {gpu or '-'}")
            try:
                measure_once(session, row, tree, number, gpu)
            except (MeasurementFailed, ValueError, OSError, KeyError) as error:
                session.fail(f"{row.name}, {tree.name}: {error}")
            key = (tree.name, row.name)
            session.took[key] = max(session.took.get(key, 0.0), time.monotonic() - began)
            session.write()


def settle_share(session: Session, row: Row) -> Row:
    """Return the row with the documents of a rank's share that there is time for, the same for both trees."""
    if row.name != "share":
        return row
    is_whole = session.left_s() >= SHARE_WHOLE_S * len(session.trees)
    count = session.args.share_documents or (None if is_whole else SHARE_PART)  # None: all
    guess_s = SHARE_WHOLE_S if is_whole else row.guess_s
    return row._replace(guess_s=guess_s, options={"share_documents": count})


def measure_once(session: Session, row: Row, tree: Tree, number: int, gpu: str | None) -> None:
    """Run one process of a row and keep its samples. Raises MeasurementFailed, with its last words, if it failed."""
    folder = Path(tempfile.mkdtemp(prefix=f"{row.name}-{tree.name}-", dir=session.folder))
    shutil.copy(TASKS, folder)  # not the folder it is from, whose modules would hide others of their names
    report = session.reports.setdefault((tree.name, row.name), Report("speed", {}, {}))
    pinned = {} if gpu is None else {VISIBLE: gpu, "OMP_NUM_THREADS": str(usable_cpus() // session.args.gpu_parts)}
    if row.name == "outside":
        measure_outside(session, tree, report, folder, pinned)
        return
    args, data = session.args, data_section(session.args.corpus)
    options = {
        "folder": str(folder), "preset": args.preset, **data, "val_tokens": args.val_tokens, "weights": "",
        "attention": args.attention, "documents": args.documents, "tree": str(tree.root),
    }  # fmt: skip
    bench = LimitedBench(report, folder, session.args.repeats, options, session)
    env = {**pinned, "PYTHONPATH": search_path(tree.root, folder)}
    task = f"{TASKS.stem}:{row.task}"
    process = row.options.get("process", number if tree.name == "now" else number + 1)  # 0 compares with float32
    more = {name: value for name, value in row.options.items() if name != "process"}
    try:
        bench.measure(task, process=process, env=env, **more)
    except MeasurementFailed as error:
        raise MeasurementFailed(f"{error}: {last_words(folder / LOG)}") from error


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command's arguments, paths absolute."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--corpus", type=Path, help="folder of shards and one tokenizer")
    parser.add_argument("--git_commit", default="", help="of these sources, where git is not at hand")
    parser.add_argument("--baseline", type=Path, metavar="TREE", help="other sources, measured in turns with these")
    parser.add_argument("--baseline_commit", default="", metavar="SHA")
    parser.add_argument("--budget_s", type=float, default=420.0, help="all is over after this")
    parser.add_argument("--rows", nargs="+", choices=[row.name for row in ROWS], default=[row.name for row in ROWS])
    parser.add_argument("--gpu_parts", type=int, default=1, metavar="N", help="GPUs of this machine to use")
    parser.add_argument("--join", type=Path, nargs="+", metavar="DIR", help="measure nothing: join what parts left")
    parser.add_argument("--repeats", type=int, default=3, help="processes that train, of each tree")
    parser.add_argument("--preset", default="bench_500")
    parser.add_argument("--attention", default="triton", help="one kernel for all rows; auto: a stopwatch chooses")
    parser.add_argument("--val_tokens", type=int, default=851_969, help="of plain evaluation and the sample")
    parser.add_argument("--documents", type=int, default=192, help="in the sample")
    parser.add_argument("--share_documents", type=int, metavar="N", help=f"default: all, or {SHARE_PART} if time lacks")
    parser.add_argument("--steps", type=int, default=30, help="of the seeds of row outside")
    parser.add_argument("--seed_documents", type=int, default=96, help="of the validation text of row outside")
    parser.add_argument("--cpus", type=int, default=8, help="of the gang of row outside")
    parser.add_argument("--local", action="store_true", help="row outside without Ray")
    args = parser.parse_args(argv)
    args.given = list(sys.argv[1:] if argv is None else argv)
    for name in ("out", "corpus", "baseline"):
        if getattr(args, name) is not None:
            setattr(args, name, getattr(args, name).resolve())
    return args


def choose_gpus(args: argparse.Namespace) -> list[str | None]:
    """Return which GPU each part works on, None where there is none. Raises ValueError where there are too few."""
    names = list_gpus()
    if args.gpu_parts < 1 or (names and args.gpu_parts > len(names)):
        raise ValueError(f"--gpu_parts {args.gpu_parts} must be from 1 to {len(names)}, the GPUs that are here")
    return list(names[: args.gpu_parts]) if names else [None] * args.gpu_parts


def list_trees(args: argparse.Namespace) -> list[Tree]:
    """Return the sources to measure. Raises ValueError where they cannot be."""
    trees = [Tree("now", ROOT, args.git_commit)]
    if args.baseline is not None:
        if not (args.baseline / "jobs" / "bench" / "child.py").is_file():
            raise ValueError(f"--baseline {args.baseline} is no tree of these sources: jobs/bench/child.py is missing")
        trees.append(Tree("before", args.baseline, args.baseline_commit))
    return trees


def join_parts(args: argparse.Namespace) -> None:
    """Write the reports and the table of parts that were called apart. Raises ValueError where they do not fit."""
    joined = {}
    for file in ("speed.json", "speed_before.json"):
        found = [json.loads((folder / file).read_text()) for folder in args.join if (folder / file).is_file()]
        if found:
            joined[file] = join_reports(found)
            write_whole(args.out / file, json.dumps(joined[file], indent=1) + "\n")
    if "speed.json" not in joined:
        raise ValueError(f"--join {' '.join(map(str, args.join))}: no folder has a speed.json")
    table = as_text(joined["speed.json"], joined.get("speed_before.json"))
    write_whole(args.out / "speed.txt", table)
    print(table, flush=True)


def measure_all(args: argparse.Namespace) -> int:
    """Measure every row. Raises ValueError for what is wrong with the arguments or this machine."""
    if args.corpus is None:
        raise ValueError("--corpus FOLDER is missing")
    data_section(args.corpus)
    gpus, trees = choose_gpus(args), list_trees(args)
    with tempfile.TemporaryDirectory(prefix="gpu-speed-") as folder:
        session = Session(args, trees, Path(folder), waiting=[row for row in ROWS if row.name in args.rows])
        threads = [threading.Thread(target=work_off, args=(session, gpu)) for gpu in gpus]
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # on the way out what runs is ended
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            args.budget_s = 0.0  # where this is the way out of an error, no other process begins
            end_processes(list(session.running))
            for thread in filter(threading.Thread.is_alive, threads):
                thread.join()
            signal.signal(signal.SIGTERM, before)
            session.write()
    print((args.out / "speed.txt").read_text(), flush=True)
    return 1 if session.failures else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or join."""
    args = parse_arguments(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.join:
            join_parts(args)
            return 0
        return measure_all(args)
    except (ValueError, OSError) as error:
        print(f"tests.gpu_speed: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
