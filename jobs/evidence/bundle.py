"""`seedsweep bundle RUN -o FOLDER`: an artifact and the one file that scores it, or trains it again."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.evidence.programs import refuse_program
from runner.errors import EXIT_OK

if TYPE_CHECKING:
    from model.pipeline.records import StageRecord

ARTIFACT, SCORES = "model.ssq", "scores.json"
SCORED = ("pre_ttt", "ttt_lr0", "post_ttt")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory of a sweep, or of one of its seeds")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="the folder to write")
    parser.add_argument("--seed", type=int, help="which seed of a sweep (default: the first that has an artifact)")
    parser.add_argument("--repeat", type=int, default=0, help="which repeat of that seed (default 0)")
    parser.add_argument("--variant", metavar="V", help="which variant, of a sweep that has several")


def execute(args: argparse.Namespace) -> int:
    """Write the folder and say what was counted and how to run it."""
    refuse_program(args.run, "its artifact and its code are what it left, in seeds/.../program of the sweep")
    workdir = find_workdir(args.run, args.seed, args.repeat, args.variant)
    facts = write_bundle(workdir, args.output)
    print(f"from {workdir}")
    for path in sorted(args.output.iterdir()):
        print(f"{path}  {path.stat().st_size:,} bytes")
    print(
        f"code: {facts['code_bytes']:,} bytes as counted ({facts['code_bytes_convention']}), "
        f"{facts['code_bytes_readable']:,} as committed (train_gpt.py)\n"
        f"total: {facts['artifact_bytes']:,} bytes as counted, "
        f"{facts['model_bytes'] + facts['code_bytes_readable']:,} with the readable file\n"
        "score it: python train_gpt.py --eval model.ssq --tokenizer T --val 'SHARDS'"
    )
    return EXIT_OK


def find_workdir(run: Path, seed: int | None, repeat: int, variant: str | None = None) -> Path:
    """Return the run directory of one seed, given itself or its sweep's.

    Raises FileNotFoundError when there is none with an artifact, ValueError when it is not clear which
    variant is meant.
    """
    if (run / "run.json").is_file():
        return run
    prefix = find_prefix(run, variant)
    seeds = [f"seed={seed}-repeat={repeat}"] if seed is not None else list_announced(run)
    names = [f"{prefix}{name}" for name in seeds]
    for name in names:
        if (run / "seeds" / name / "stages" / "quantize.json").is_file():
            return run / "seeds" / name
    what = f"seed={seed} repeat={repeat}" if seed is not None else "any seed"
    raise FileNotFoundError(f"{run}: no artifact of {what} here; give a sweep's run directory, or one of a seed")


def find_prefix(run: Path, variant: str | None) -> str:
    """Return what the folder names of one variant's runs begin with; nothing in a sweep that names none."""
    from results.schema import BASE
    from results.store.announced import announced_variants, choose_variant, order_variants
    from results.store.names import parse_run_name

    runs = [found for path in (run / "seeds").glob("*") if (found := parse_run_name(path.name))]
    if not runs:
        return ""
    names = order_variants((name or BASE for name, _, _ in runs), announced_variants(run))
    fix = "name one with --variant, such as --variant "
    chosen = choose_variant(names, variant, shown=str(run), fix=fix)
    return f"variant={chosen}-" if any(name == chosen for name, _, _ in runs) else ""


def list_announced(run: Path) -> list[str]:
    """Return the names of a sweep's runs without their variant, in the order they were announced."""
    try:
        spec = json.loads((run / "sweep.json").read_text())["spec"]
        return [f"seed={seed}-repeat=0" for seed in spec["seeds"]]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return sorted({path.name[path.name.rfind("seed=") :] for path in (run / "seeds").glob("*seed=*")})


def write_bundle(workdir: Path, folder: Path) -> dict[str, Any]:
    """Copy program and artifact of a run into folder, and the figures that scoring must give; return the size metrics.

    Raises ValueError when folder is not empty, or a file is not what the run left.
    """
    from model.bundle.program import PACKED_NAME, READABLE_NAME
    from model.pipeline.records import read_records

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder={folder} is not empty; name a new one")
    records = read_records(workdir)
    record = records["quantize"]
    for name in (READABLE_NAME, PACKED_NAME, ARTIFACT):
        check_output(workdir, record, name)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (READABLE_NAME, PACKED_NAME, ARTIFACT):
        shutil.copyfile(workdir / name, folder / name)
    metrics = {name: value for found in records.values() for name, value in found.metrics.items()}
    run = json.loads((workdir / "run.json").read_text())
    scores = {
        f"{stage}_{name}": metrics.get(f"{stage}_{name}") for stage in SCORED for name in ("bpb", "nats", "tokens")
    }
    known = {name: value for name, value in scores.items() if value is not None}
    facts = {name: run.get(name) for name in ("seed", "num_threads", "device", "versions", "data_hash")}
    (folder / SCORES).write_text(json.dumps({**facts, "scores": known}, indent=1, sort_keys=True) + "\n")
    return dict(record.metrics)


def check_output(workdir: Path, record: StageRecord, name: str) -> None:
    """Raise ValueError unless a file is what the stage left."""
    from model.files.atomic import file_sha256

    path = workdir / name
    facts = record.outputs.get(name)
    if facts is None or not path.is_file():
        raise ValueError(f"{workdir} has no {name}: it was made by an older version; run its quantize stage again")
    if file_sha256(path) != facts.sha256:
        raise ValueError(f"{path} is not what the quantize stage left (sha256 differs); run that stage again")
