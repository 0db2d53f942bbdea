"""`seedsweep reproduce DIR --seed S`: run a seed again as recorded, and say how far each stage moved."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.evidence.programs import refuse_program

if TYPE_CHECKING:
    from model.audit.reproduction import StageVerdict
    from runner.spec.sweep import SweepSpec

HARDWARE = ("gpu_model", "num_gpus", "cuda_version", "cpu_model", "system")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("dir", type=Path, metavar="DIR", help="run directory of a sweep")
    parser.add_argument("--seed", type=int, required=True, help="the seed to run again")
    parser.add_argument("--repeat", type=int, default=0, help="which repeat of it to compare with (default 0)")
    parser.add_argument("--out", type=Path, help="where to run (default: DIR-reproduce-seed=S, beside DIR)")
    parser.add_argument(
        "--allow-differences", action="store_true", help="run although code, data or configuration are not as recorded"
    )
    parser.add_argument("--address", metavar="A", help="Ray cluster to use where a seed needs several ranks")
    parser.add_argument("--format", choices=("text", "json"), default="text")


def execute(args: argparse.Namespace) -> int:
    """Run the seed and print the verdicts; 1 when a stage is different, 3 when the rerun was interrupted."""
    from model.audit.reproduction import DIFFERENT, compare_runs
    from runner.sweep import run_sweep
    from runner.work import Options

    again = "run it with another --out, then: seedsweep compare NEW OLD --reproduces"
    refuse_program(args.dir, again)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    before = args.dir / "seeds" / f"seed={args.seed}-repeat={args.repeat}"
    run, attempt = read_record(before / "run.json"), read_record(before / "attempt.json")
    require_finished(before)
    out = args.out or args.dir.with_name(f"{args.dir.resolve().name}-reproduce-seed={args.seed}")
    spec = spec_of(args.dir, run, out)
    differences = hash_differences(run, spec)
    if differences and not args.allow_differences:
        raise ValueError(
            f"{before} cannot be reproduced: {'; '.join(differences)} (--allow-differences runs it anyway)"
        )
    surroundings = surroundings_differences(run, attempt)
    for line in [*differences, *surroundings]:
        print(f"difference: {line}")
    is_alone = spec.gang.world_size == 1
    code = run_sweep(spec, Options(is_local=is_alone, address=None if is_alone else args.address, progress="plain"))
    if code != 0:
        print(f"the rerun in {out} did not finish (exit code {code})")
        return code
    verdicts = compare_runs(before, out / "seeds" / f"seed={args.seed}-repeat=0", noise_of(args.dir, run))
    content = {"before": str(before), "after": str(out), "differences": differences, "surroundings": surroundings,
               "stages": [{**v._asdict(), "difference": v.difference} for v in verdicts]}  # fmt: skip
    (out / "reproduce.json").write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1) if args.format == "json" else render(verdicts, out, surroundings))
    return int(any(verdict.state == DIFFERENT for verdict in verdicts))


def read_record(path: Path) -> dict[str, Any]:
    """Return a JSON record of a run directory. FileNotFoundError or ValueError say what is wrong with it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; give a sweep's run directory and a seed that ran in it")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it holds no table")
    return content


def require_finished(workdir: Path) -> None:
    """Raise ValueError unless every stage of a run directory has its record."""
    from model.pipeline.records import read_records
    from model.report import STAGES

    missing = [stage for stage in STAGES if stage not in read_records(workdir)]
    if missing:
        raise ValueError(f"{workdir} has not finished {missing[0]}; finish it first: seedsweep run")


def spec_of(folder: Path, run: dict[str, Any], out: Path) -> SweepSpec:
    """Return the sweep of the one seed, under its recorded configuration, into another folder."""
    from model.config import config_from_plain
    from runner.spec.sweep import SweepSpec

    sweep = read_record(folder / "sweep.json")
    spec = SweepSpec.from_json(sweep["spec"])
    config = replace(config_from_plain(run["config"]), seed=0)
    return replace(spec, config=config, seeds=(int(run["seed"]),), repeats=1, out=str(out.absolute()))


def hash_differences(run: dict[str, Any], spec: SweepSpec) -> list[str]:
    """Return a line for each of configuration, data and code that is not what was recorded."""
    from runner.provenance import code_hash, data_hash

    now = {
        "config_hash": spec.config_hash,
        "data_hash": data_hash(spec.config.data, vocab_size=spec.config.model.vocab_size),
        "code_hash": code_hash(),
    }
    return [f"{name} was {run[name][:12]}, is {value[:12]}" for name, value in now.items() if run[name] != value]


def surroundings_differences(run: dict[str, Any], attempt: dict[str, Any]) -> list[str]:
    """Return a line for each library version and piece of hardware that differs from the recorded one."""
    from model.audit.reproduction import visible_gpus
    from model.pipeline.seed import library_versions
    from runner.provenance import machine

    gpus = visible_gpus()
    hardware: dict[str, Any] = {**machine(), **gpus}
    recorded, lines = attempt.get("hardware", {}), []
    for name, now in library_versions().items():
        before = run["versions"].get(name, "")
        if before != now:
            lines.append(f"{name} was {before or 'missing'}, is {now or 'missing'}")
    for name in HARDWARE:
        if recorded.get(name) != hardware.get(name) and (name in recorded or gpus):
            lines.append(f"{name} was {recorded.get(name, 'none')}, is {hardware.get(name, 'none')}")
    return lines


def noise_of(folder: Path, run: dict[str, Any]):  # type: ignore[no-untyped-def]
    """Return the function that says whether repeats of a seed in folder differ as much."""
    from results.compare.repeats import same_seed_noise

    def is_within_noise(metric: str, difference: float) -> bool | None:
        noise = same_seed_noise(str(folder), metric, config_hash=run["config_hash"])
        return noise.allows(difference) if noise.dof else None

    return is_within_noise


def render(verdicts: list[StageVerdict], out: Path, surroundings: list[str]) -> str:
    """Return the verdicts as text."""
    lines = [f"{'stage':<9} {'verdict':<23} {'figure':<13} {'before':>12} {'after':>12} {'difference':>11}  outputs"]
    for v in verdicts:
        before, after = ("-" if value is None else f"{value:.8f}" for value in (v.before, v.after))
        difference = "-" if v.difference is None else f"{v.difference:+.2e}"
        lines.append(f"{v.stage:<9} {v.state:<23} {v.metric:<13} {before:>12} {after:>12} {difference:>11}  {v.detail}")
    where = (
        f"{len(surroundings)} differences of libraries or hardware" if surroundings else "same libraries and hardware"
    )
    return "\n".join([*lines, f"rerun in {out}; {where}"])
