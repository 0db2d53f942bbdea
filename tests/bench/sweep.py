"""How the runner scales, without any GPU: the decision loop on simulated slots, commands on a finished sweep of many
seeds, and what Ray costs one small seed.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.bench.figures import Probe
from jobs.bench.process import Bench
from tests.bench.results import time_command
from tests.smallest import smallest

if TYPE_CHECKING:
    from runner.spec.sweep import SweepSpec

NUM_SLOTS = 64
COMMIT_S = 0.01  # of one finished seed, about
CORPUS_MODULES = ("argparse", "inspect", "json", "statistics", "typing", "pathlib", "logging", "functools")
VOCAB_SIZE = 512
SMALL = smallest(vocab_size=VOCAB_SIZE)


def bench_ablation(bench: Bench, *, num_seeds: int, num_variants: int) -> None:
    """Measure the loop where runs wait for stages that others compute."""
    for number in range(bench.repeats):
        loop = str(bench.folder / f"loop{number}")
        bench.measure(
            "tests.bench.sweep:measure_loop", process=number, out=loop, num_seeds=num_seeds, num_variants=num_variants
        )
    bench.report.note(f"{num_variants} variants x {num_seeds} seeds on {NUM_SLOTS} simulated slots")


def bench_sweep(bench: Bench, *, num_seeds: int) -> None:
    """Measure the loop, the commands on its finished directory, and Ray beside --local."""
    out = bench.folder / "finished"
    for number in range(bench.repeats):
        loop = str(bench.folder / f"loop{number}")
        bench.measure("tests.bench.sweep:measure_loop", process=number, out=loop, num_seeds=num_seeds)
    bench.report.note(f"{NUM_SLOTS} simulated slots, a second of the simulated clock costs nothing")
    bench.say(f"directory of {num_seeds:,} finished seeds: about {num_seeds * COMMIT_S:.0f} s")
    bench.measure("tests.bench.sweep:make_finished", out=str(out), num_seeds=num_seeds)
    for name in ("status", "table"):
        for number in range(bench.repeats):
            time_command(bench, f"{name} of {num_seeds:,} finished seeds", [name, str(out)],
                         wanted="below 2", process=number)  # fmt: skip
    corpus = bench.folder / "corpus"
    bench.measure("tests.bench.sweep:make_corpus", out=str(corpus))
    for number in range(bench.repeats):
        _compare_with_ray(bench, corpus, number)
    bench.report.note("Ray's overhead: whole process of `seedsweep run` on Ray less that of `seedsweep run --local`")


def _compare_with_ray(bench: Bench, corpus: Path, number: int) -> None:
    """Run one small seed without Ray, then on Ray, each as a whole process."""
    plain = {
        "name": "bench", "preset": "tiny", "overrides": SMALL, "seeds": [42], "gang": {"gpus": 0, "cpus": 1},
        "data": {
            "train": str(corpus / "*_train_*.bin"), "val": str(corpus / "*_val_*.bin"),
            "tokenizer": str(corpus / "text.model"),
        },
        "out": str(bench.folder / "run"),
    }  # fmt: skip
    spec = bench.folder / "spec.yaml"
    spec.write_text(json.dumps(plain))  # JSON is YAML
    seconds = {}
    for name, flags in (("--local", ["--local"]), ("Ray", [])):
        bench.say(f"one small seed, {name} {number + 1}/{bench.repeats}")
        out = str(bench.folder / f"run-{name.strip('-')}-{number}")
        done = bench.run_command(["-m", "jobs.cli", "run", str(spec), "--out", out, "--progress", "plain", *flags])
        seconds[name] = done.seconds
        bench.report.add(f"one small seed, {name}", "s", [done.seconds])
    bench.report.add("Ray's overhead", "s", [seconds["Ray"] - seconds["--local"]], wanted="at most 15 + 1 %")


def measure_loop(request: dict[str, Any], probe: Probe) -> None:
    """Simulate a sweep, and half of it for the memory's slope."""
    from tests.simulate import ablate, measure_decisions

    out, num_seeds, num_variants = Path(request["out"]), int(request["num_seeds"]), int(request.get("num_variants", 0))
    whole, part = (simulated_spec(out, count) for count in (num_seeds, max(1, num_seeds // 2)))
    if num_variants:
        whole, part = ablate(whole, num_variants), ablate(part, num_variants)
    half = measure_decisions(part, out.with_name(f"{out.name}-half"), num_nodes=NUM_SLOTS)
    figures = measure_decisions(whole, out, num_nodes=NUM_SLOTS)
    probe.add("a decision", "ms", [figures.decision_ms], wanted="below 1")
    probe.add("decisions", "", [figures.decisions])
    limit, idle = (150, 3) if num_variants else (100, 2)
    probe.add("peak memory of loop and simulation", "MB", [figures.peak_bytes / 1e6], wanted=f"below {limit}")
    probe.add("peak memory with half the seeds", "MB", [half.peak_bytes / 1e6])
    probe.add("idle slots before the last wave", "%", [100 * figures.idle_frac], wanted=f"below {idle}")
    if num_variants:
        probe.add("trainings", "", [figures.trainings])
        probe.add("runs", "", [figures.runs])


def make_finished(request: dict[str, Any], probe: Probe) -> None:
    """Leave the directory of a finished sweep, every seed with its results."""
    from tests.simulate import fill_directory

    out, num_seeds = Path(request["out"]), int(request["num_seeds"])
    started = time.perf_counter()
    fill_directory(simulated_spec(out, num_seeds), out)
    probe.add("one commit of results", "ms", [1000 * (time.perf_counter() - started) / num_seeds])


def simulated_spec(out: Path, num_seeds: int) -> SweepSpec:
    """Return a sweep whose data nobody reads."""
    from runner.spec.read import parse_spec

    data = {"train": "none_train_*.bin", "val": "none_val_*.bin", "tokenizer": "none.model"}
    seeds = list(range(num_seeds))
    return parse_spec({"name": "simulated", "preset": "tiny", "seeds": seeds, "data": data, "out": str(out)})


def make_corpus(request: dict[str, Any], probe: Probe) -> None:
    """Write shards and a tokenizer of a few modules' docstrings."""
    import importlib.util

    from model.corpus.docstrings import read_docstrings
    from model.corpus.text import TextOptions, build_text

    out = Path(request["out"])
    texts: list[str] = []
    for name in CORPUS_MODULES:
        found = importlib.util.find_spec(name)
        assert found is not None, name
        texts += read_docstrings(Path(str(found.origin)), [])
    source = out.with_name("documents.jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    build_text([source], out, TextOptions(vocab_size=VOCAB_SIZE, val_documents=5), probe.report)
