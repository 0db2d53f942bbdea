"""The frontier's ablation on the GPUs of one machine, within a time limit: python -m tests.gpu_frontier DATA OUT.

DATA holds the shards (*_train_*.bin, *_val_*.bin) and one tokenizer (*.model). Two sweeps of the same spec: the `final`
one trains base and whole recipe at the spec's length and adds the variants that share their training or
artifact; the `screening` one trains each single part for one epoch. Each job is one seed of some variants, run by
`seedsweep run --local` on a GPU of its own; the most valuable job that will end within the limit begins first.
After each job OUT gets all rows again, in one archive that is always whole: a call that is killed leaves what was done.
At the end come the tables. Exit code 1 if a job failed or was left out.
`--gpus 0 --slots 2 --preset tiny` rehearses it on CPUs.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from runner.spec.read import parse_spec
from runner.spec.sweep import Variant
from tests.gpu_kit import ROOT, data_section, end_processes, list_gpus, start_process, write_archive

WHOLE = ("base", "all")  # trained at full length, for every seed
SWEEPS = ("final", "screening")
TABLES = ("documents", "steps", "stages", "runs")  # runs last, as in a commit
POLL_S = 0.25


@dataclass(frozen=True)
class Job:
    """One seed of some variants of a sweep, in a run directory that the jobs of one training share."""

    sweep: str
    seed: int
    group: str  # the variant that trains
    variants: tuple[str, ...]
    kind: str  # jobs of one kind take about as long
    needs: str = ""  # the name of a job that must be done; its run directory is copied, for two may build on it at once
    part: str = ""

    @property
    def name(self) -> str:
        """The job in file names, and its run directory."""
        return f"{self.sweep}-{self.group}-{self.seed}" + (f"-{self.part}" if self.part else "")


@dataclass
class Running:
    """A job at work."""

    job: Job
    slot: int
    process: subprocess.Popen[bytes]
    begun: float


@dataclass
class Campaign:
    """What is left to do, what runs, and how long each kind of job took."""

    jobs: list[Job]
    guesses: dict[str, float]
    num_slots: int
    limit_s: float
    running: list[Running] = field(default_factory=list)
    ended: dict[str, int] = field(default_factory=dict)  # exit codes by name
    took: dict[str, list[float]] = field(default_factory=dict)

    def expected_s(self, job: Job) -> float:
        """Return how long a job takes: the longest of its kind so far, else the guess."""
        return max(self.took.get(job.kind, [self.guesses[job.kind]]))

    def next_job(self, now: float) -> Job | None:
        """Return the first job that may begin and will end within the limit; drop those whose need failed."""
        self.jobs = [job for job in self.jobs if self.ended.get(job.needs, 0) == 0]
        for job in self.jobs:
            is_ready = not job.needs or job.needs in self.ended
            if is_ready and now + self.expected_s(job) <= self.limit_s:
                self.jobs.remove(job)
                return job
        return None

    def free_slots(self) -> list[int]:
        """Return the places that no job holds."""
        held = {running.slot for running in self.running}
        return [slot for slot in range(self.num_slots) if slot not in held]

    def take_ended(self, now: float) -> list[Running]:
        """Return the jobs that have ended since the last look."""
        over = [running for running in self.running if running.process.poll() is not None]
        self.running = [running for running in self.running if running not in over]
        for running in over:
            self.ended[running.job.name] = running.process.returncode
            if running.process.returncode == 0:
                self.took.setdefault(running.job.kind, []).append(now - running.begun)
        return over


def read_ablation(path: Path) -> tuple[dict[str, Any], dict[str, Variant]]:
    """Return a spec's plain values and its checked variants by name."""
    plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    return plain, {variant.name: variant for variant in parse_spec(plain).variants}


def make_jobs(
    variants: dict[str, Variant], seeds: Sequence[int], sweeps: Sequence[str] = SWEEPS, wholes: Sequence[str] = WHOLE
) -> list[Job]:
    """Return every job of the sweeps, the most valuable first: whole trainings, what builds on them, single parts.

    What shares a training is two jobs: other roundings, and other adaptations of the same artifact. Without the final
    sweep those of the base build on its screening. wholes: the trainings of the final sweep.
    """
    trainings = {name: (variant.config.model, variant.config.train) for name, variant in variants.items()}
    groups = {whole: tuple(name for name in variants if trainings[name] == trainings[whole]) for whole in WHOLE}
    shared = {name for members in groups.values() for name in members}
    jobs = []
    if "final" in sweeps:
        jobs += [Job("final", seed, whole, (whole,), "train") for whole in wholes for seed in seeds]
        jobs += share_trainings("final", variants, {whole: groups[whole] for whole in wholes}, seeds)
    if "screening" in sweeps:
        single = ["base", *(name for name in variants if name not in shared)]
        screenings = [Job("screening", seed, name, (name,), "screen") for name in single for seed in seeds]
        builds = [] if "final" in sweeps else share_trainings("screening", variants, {"base": groups["base"]}, seeds)
        jobs += [*screenings[: len(seeds)], *builds, *screenings[len(seeds) :]]
    return jobs


def share_trainings(
    sweep: str, variants: dict[str, Variant], groups: dict[str, tuple[str, ...]], seeds: Sequence[int]
) -> list[Job]:
    """Return the jobs that build on a whole training of a sweep."""
    jobs = []
    for part, whole in ((part, whole) for part in ("roundings", "adaptations") for whole in groups):
        rounding = variants[whole].config.quant
        rest = [name for name in groups[whole] if name != whole]
        rest = [name for name in rest if (variants[name].config.quant != rounding) == (part == "roundings")]
        if rest:
            kind = f"{part} of {whole}"
            jobs += [Job(sweep, seed, whole, (whole, *rest), kind, f"{sweep}-{whole}-{seed}", part) for seed in seeds]
    return jobs


def spec_of(job: Job, plain: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Return the spec of one job as plain values."""
    overrides = {name: dict(section) for name, section in (plain.get("overrides") or {}).items()}
    is_screening = job.sweep == "screening"
    if is_screening:
        overrides.setdefault("train", {})["max_steps"] = args.screen_steps
    if args.gpus:  # one kernel by name, for seeds to be comparable; no time for checkpoints
        overrides["runtime"] = {"device": "cuda", "attention": "triton", "checkpoint_every_s": 0.0}
    if args.steps and not is_screening:
        overrides.setdefault("train", {})["max_steps"] = args.steps
    return {
        "name": f"{plain['name']}_{job.sweep}",
        "preset": args.preset or plain["preset"],
        "overrides": overrides,
        "variants": {name: plain["variants"][name] for name in job.variants},
        "data": data_section(args.data, val_documents=args.screen_documents if is_screening else args.documents),
        "seeds": [job.seed],
        "gang": {"gpus": 1, "cpus": args.cpus} if args.gpus else {"gpus": 0, "cpus": 1},
        "limits": {"attempts": 2, "backoff_s": 2.0},
        "out": str(args.work / job.name),
    }


def begin(job: Job, slot: int, plain: dict[str, Any], args: argparse.Namespace) -> subprocess.Popen[bytes]:
    """Start a job on its GPU."""
    file, log = args.work / f"{job.name}.yaml", args.work / f"{job.name}.log"
    if job.needs:
        shutil.copytree(args.work / job.needs, args.work / job.name)
    file.write_text(yaml.safe_dump(spec_of(job, plain, args), sort_keys=False), encoding="utf-8")
    command = ["-m", "seedsweep", "run", str(file), "--local", "--progress", "plain"]
    if args.git_commit:
        command += ["--git-commit", args.git_commit, "--git-dirty", "no"]
    return start_process(command, log, CUDA_VISIBLE_DEVICES=list_gpus()[slot] if args.gpus else "")


def collect(sweep: str, work: Path, order: Sequence[str], target: Path) -> None:
    """Join the committed rows of a sweep's run directories into one results folder, and what they announced."""
    hashes: dict[str, str] = {}
    for folder in sorted(work.glob(f"{sweep}-*-*/")):
        record = json.loads((folder / "sweep.json").read_text()) if (folder / "sweep.json").is_file() else {}
        hashes |= record.get("variants", {})
        for table in reversed(TABLES):  # runs first: what is committed later is whole at the next call
            for file in sorted((folder / "results" / table).glob("*.parquet")):
                if table == "runs" or (target / "results" / "runs" / file.name).is_file():
                    place = target / "results" / table / file.name
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(file.read_bytes())
        if (folder / "results" / "SHA256SUMS").is_file():
            place = target / "jobs" / folder.name
            place.mkdir(parents=True, exist_ok=True)
            for name in ("sweep.json", "events.jsonl"):
                (place / name).write_bytes((folder / name).read_bytes())
    if (target / "results").is_dir():
        paths = sorted(work.glob(f"{sweep}-*-*/results/SHA256SUMS"))
        sums = dict.fromkeys(line for path in paths for line in path.read_text().splitlines(keepends=True))
        (target / "results" / "SHA256SUMS").write_text("".join(sums))
        names = [name for name in order if name in hashes]
        content = {"format": 1, "sweep": sweep, "variants": {name: hashes[name] for name in names}}
        (target / "sweep.json").write_text(json.dumps(content, indent=1))


def keep(args: argparse.Namespace, order: Sequence[str], campaign: Campaign) -> None:
    """Write all rows, specs and logs so far into one archive in OUT, replacing the one before at once."""
    rows = args.work / "rows"
    for sweep in SWEEPS:
        collect(sweep, args.work, order, rows / sweep)
    summary = {"ended": campaign.ended, "took_s": campaign.took, "not_begun": [job.name for job in campaign.jobs]}
    (args.work / "summary.json").write_text(json.dumps(summary, indent=1))
    paths = [rows, *args.work.glob("*.yaml"), *args.work.glob("*.log"), args.work / "summary.json"]
    write_archive(args.out / "rows.tar.xz", [(path, path.name) for path in paths], args.work)


def show(args: argparse.Namespace) -> None:
    """Print the tables and leave them in OUT; reports are made of the same rows wherever they are needed."""
    for sweep in SWEEPS:
        rows = args.work / "rows" / sweep
        if (rows / "results").is_dir():
            command = [sys.executable, "-m", "seedsweep", "table", str(rows)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
            (args.out / f"table_{sweep}.txt").write_text(done.stdout + done.stderr)
            print(done.stdout, flush=True)


def drive(campaign: Campaign, plain: dict[str, Any], args: argparse.Namespace) -> None:
    """Run jobs until none is left that would end in time."""
    begun, order = time.monotonic(), list(plain["variants"])
    while time.monotonic() - begun < args.limit_s:
        now = time.monotonic() - begun
        over = campaign.take_ended(now)
        for running in over:
            took = now - running.begun
            print(f"t={now:.0f} ended {running.job.name} rc={running.process.returncode} s={took:.1f}", flush=True)
            if running.process.returncode:
                print((args.work / f"{running.job.name}.log").read_text(errors="replace")[-800:], flush=True)
        for slot in campaign.free_slots():
            job = campaign.next_job(now)
            if job is not None:
                print(f"t={now:.0f} begins {job.name} on {slot}", flush=True)
                campaign.running.append(Running(job, slot, begin(job, slot, plain, args), now))
        if over:
            keep(args, order, campaign)
        if not campaign.running:
            break
        time.sleep(POLL_S)
    end_processes(running.process for running in campaign.running)
    keep(args, order, campaign)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path, help="what is to be kept: few files, always whole")
    parser.add_argument("--work", type=Path, default=Path("/tmp/gpu_frontier"), help="run directories; must be new")
    parser.add_argument("--spec", type=Path, default=ROOT / "jobs" / "specs" / "ablation_frontier.yaml")
    parser.add_argument("--limit_s", type=float, default=400.0, help="begin no job that would not end within this")
    parser.add_argument("--gpus", type=int, help="default: all of this machine; 0: CPUs")
    parser.add_argument("--slots", type=int, default=2, help="jobs at once where there is no GPU")
    parser.add_argument("--cpus", type=int, default=8, help="of each job on a GPU")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 0, 1337])
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--wholes", nargs="+", choices=WHOLE, default=list(WHOLE), help="trainings of the final sweep")
    parser.add_argument("--preset", help="in place of the spec's")
    parser.add_argument("--steps", type=int, help="of the final trainings, in place of the preset's")
    parser.add_argument("--screen_steps", type=int, default=160, help="one epoch of 31.8 M tokens in steps of 196,608")
    parser.add_argument("--documents", type=int, default=192)
    parser.add_argument("--screen_documents", type=int, default=96)
    parser.add_argument("--guess_s", type=float, nargs=3, default=[165.0, 35.0, 75.0], metavar="S",
                        help="a training with its scores; each variant that shares it; a screening")  # fmt: skip
    parser.add_argument("--git_commit", default="", help="commit to record, where git is not at hand")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign."""
    args = parse_arguments(argv)
    args.data, args.out, args.work = args.data.resolve(), args.out.resolve(), args.work.resolve()
    if args.gpus is None:
        from runner.machine.gpus import count_gpus

        args.gpus = count_gpus()
    if args.work.exists():
        print(f"tests.gpu_frontier: error: --work {args.work} exists; name a new folder", file=sys.stderr)
        return 2
    try:
        data_section(args.data)
    except ValueError as error:
        print(f"tests.gpu_frontier: error: {error}", file=sys.stderr)
        return 2
    args.work.mkdir(parents=True)
    plain, variants = read_ablation(args.spec)
    train_s, more_s, screen_s = args.guess_s
    jobs = make_jobs(variants, args.seeds, args.sweeps, args.wholes)
    guesses = {job.kind: more_s * (len(job.variants) - 1) for job in jobs} | {"train": train_s, "screen": screen_s}
    campaign = Campaign(jobs, guesses, args.gpus or args.slots, args.limit_s)
    wanted = len(campaign.jobs)
    drive(campaign, plain, args)
    show(args)
    well = sum(code == 0 for code in campaign.ended.values())
    cut, not_begun = ([item.job.name for item in campaign.running], [job.name for job in campaign.jobs])
    print(json.dumps({"jobs": wanted, "well": well, "cut": cut, "not_begun": not_begun}), flush=True)
    return 0 if well == wanted else 1


if __name__ == "__main__":
    sys.exit(main())
