"""The four parts of tests.gpu_eight: each starts its commands as processes, watches them, and leaves rows."""

from __future__ import annotations

import json
import re
import subprocess
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from tests.gpu_eight_gangs import ORDER, Order, measure_speed, read_killed
from tests.gpu_eight_rows import PASSES, SLOWER_PERCENT, STAGES, waves
from tests.gpu_kit import (
    data_section,
    describe_samples,
    end_processes,
    list_gpus,
    rates_by_loop,
    read_fates,
    start_process,
)

if TYPE_CHECKING:
    from tests.gpu_eight import Session

POLL_S = 0.5
SAY_EVERY_S = 20.0
SEED, OTHER_SEED = 42, 0  # in part `gangs` seed 42 loses a rank
WARM_STEPS = 20  # of the whole run, left out of its rates
KILL_FRAC, WARM_FRAC = 0.25, 0.08  # of --gang_s on the training clock: the kill, and what is left out before
WAVE_S = 25.0  # below which no measurement of `scale` is begun
# NVLink multicast needs a service that not every machine runs, and a gang that asks for it there hangs.
QUIET = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


def lay_over(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by section with others laid over them."""
    return {name: {**below.get(name, {}), **above.get(name, {})} for name in [*below, *above]}


def make_spec(args: Namespace, name: str, gpus: int, **more: Any) -> dict[str, Any]:
    """Return a spec on gangs of so many GPUs, or CPU ranks; more: sections that replace what all have alike."""
    is_cuda = args.device == "cuda"
    runtime = {"device": args.device, "attention": args.attention if is_cuda else "auto", "checkpoint_every_s": 0.0}
    overrides = lay_over(more.pop("overrides"), {"runtime": runtime})
    overrides = lay_over(overrides, {name: part for name, part in args.overrides.items() if name != "train"})
    overrides["train"] = {**args.overrides.get("train", {}), **overrides["train"]}
    return {
        "name": f"gpu-eight-{name}",
        "preset": args.preset,
        "overrides": overrides,
        "gang": {"gpus": gpus, "cpus": args.cpus} if is_cuda else {"gpus": 0, "ranks": gpus, "cpus": args.cpus},
        "out": str(args.work / name),
        **more,
    }


def published_spec(args: Namespace) -> dict[str, Any]:
    """Return the spec of the whole recipe on one gang of all GPUs."""
    return make_spec(
        args, "published", args.gpus, seeds=[SEED], data=data_section(args.corpus, val_documents=args.documents),
        overrides={"train": {"budget_s": args.budget_s}},
        limits={"attempts": 1, "start_s": 200, "stall_s": 200, "stop_grace_s": 4},
    )  # fmt: skip


def gangs_spec(args: Namespace) -> dict[str, Any]:
    """Return the spec of two gangs of half the GPUs: training by the clock without loops, then little of the rest."""
    train = {"budget_s": args.gang_s, "reserve_s": 0.0, "max_steps": 1_000_000, "loop_start_frac": 1.0}
    return make_spec(
        args, "gangs", args.gpus // 2, seeds=[SEED, OTHER_SEED], data=data_section(args.corpus, val_documents=16),
        overrides={"train": train, "runtime": {"report_every_s": 0.25}, "quant": {"num_calibration_batches": 8}},
        limits={"attempts": 2, "backoff_s": 0.5, "start_s": 200, "stall_s": 200, "stop_grace_s": 4},
    )  # fmt: skip


def write_spec(args: Namespace, spec: dict[str, Any]) -> str:
    """Write a spec beside the run directories and return its path."""
    path = args.work / f"{Path(spec['out']).name}.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False), encoding="utf-8")
    return str(path)


def start(args: Namespace, command: list[str], log: str, **env: str) -> subprocess.Popen[bytes]:
    """Start Python with these arguments on the machine's GPUs, or without any."""
    hidden = {} if args.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    return start_process(command, args.work / f"{log}.log", **{**QUIET, **env, **hidden})


def wait_for(
    session: Session, processes: list[subprocess.Popen[bytes]], until: float, look: Callable[[], object] = int
) -> bool:
    """Wait until all processes have ended, looking every half second; return whether they had to be ended at `until`.

    Whatever happens here, none of them is left.
    """
    is_cut = False
    try:
        while not is_cut and any(process.poll() is None for process in processes):
            look()
            time.sleep(POLL_S)
            is_cut = session.now() >= until
    finally:
        end_processes(processes)
    look()
    return is_cut


class Watch:
    """Looks at a run directory while a sweep is at work: how far it is, and how much memory of each GPU is in use."""

    def __init__(self, session: Session, out: Path) -> None:
        self.session, self.out = session, out
        self.said_at = time.monotonic()
        self.used: list[int] = []

    def look(self) -> None:
        """Look once."""
        if self.session.args.device == "cuda":
            from runner.machine.gpus import query_gpus

            used = [gpu.used_bytes for gpu in query_gpus(list_gpus()[: self.session.args.gpus])]
            self.used = [max(pair) for pair in zip(used, self.used or used)]
        if time.monotonic() - self.said_at >= SAY_EVERY_S and (self.out / "state.json").exists():
            self.said_at = time.monotonic()
            runs = json.loads((self.out / "state.json").read_text())["runs"]
            self.session.say(
                "; ".join(f"seed {run['seed']} {run['state']} {run['phase']} {run['step']}" for run in runs)
            )


def run_published(session: Session, until: float) -> bool:
    """Run the whole recipe; a row as soon as the ranks work, one for each stage, one at the end."""
    args, begun = session.args, session.now()
    spec = published_spec(args)
    command = ["-m", "seedsweep", "run", write_spec(args, spec), "--progress", "plain"]
    if args.git_commit:
        command += ["--git-commit", args.git_commit, "--git-dirty", "no"]
    out = Path(spec["out"])
    folder, watch = out / "seeds" / f"seed={SEED}-repeat=0", Watch(session, out)
    told: set[str] = set()

    def look() -> None:
        watch.look()
        if "start" not in told and (folder / "attempt.json").exists():
            told.add("start")
            session.add("published", "start", **read_start(folder, session.now() - begun))
        for stage in STAGES:
            if stage not in told and (folder / "stages" / f"{stage}.json").exists():
                told.add(stage)
                session.add("published", stage, gpus=args.gpus, **read_stage(folder, stage))

    process = start(args, command, "published")
    is_cut = wait_for(session, [process], until, look)
    fate = read_fates(out)[SEED] if (out / "state.json").exists() else {}
    session.add(
        "published", "end", seconds=session.now() - begun, exit_code=process.returncode, cut=is_cut,
        gpu_used_bytes=watch.used, **fate,
    )  # fmt: skip
    return process.returncode == 0 and told == {"start", *STAGES}


def read_start(folder: Path, seconds: float) -> dict[str, Any]:
    """Return what the preflight found, and how long it took to come so far."""
    hardware = json.loads((folder / "attempt.json").read_text())["hardware"]
    return {"seconds": seconds, "all_reduce_bytes_per_s": hardware.get("all_reduce_bytes_per_s"), "hardware": hardware}


def read_stage(folder: Path, stage: str) -> dict[str, Any]:
    """Return the figures of a finished stage; of training its rates, clocks and power too."""
    record = json.loads((folder / "stages" / f"{stage}.json").read_text())
    metrics = record["metrics"]
    row: dict[str, Any] = {
        "stage_s": record["seconds"], "peak_memory_bytes": metrics["peak_memory_bytes"],
        "compile_s": metrics[f"{stage}_compile_s"],
    }  # fmt: skip
    if stage == "train":
        return {**row, **read_training(folder, metrics)}
    if stage == "quantize":
        names = ("artifact_bytes", "model_bytes", "within_limit", "quantize_s", "hessian_s", "solve_s", "compress_s")
        return {**row, **{name: metrics[name] for name in names}}
    row["passes_s"] = {name: metrics[f"{name}_s"] for name in PASSES if f"{name}_s" in metrics}
    row["bpb"] = {name: metrics[f"{name}_bpb"] for name in row["passes_s"]}
    if stage == "ttt":
        evaluated = json.loads((folder / "stages" / "evaluate.json").read_text())["metrics"]
        row |= {"documents": evaluated["val_documents"], "tokens": metrics["post_ttt_tokens"]}
    return row


def read_training(folder: Path, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return what training measured."""
    names = ("steps", "train_s", "train_tokens", "tokens_per_s", "train_loss_last", "warmup_s")
    with np.load(folder / "steps.npz", allow_pickle=False) as steps:
        rates = rates_by_loop(steps, skip=min(WARM_STEPS, metrics["steps"] // 4))
    clocks: dict[str, Any] = {"gpu_clock_mhz": None, "gpu_power_w": None, "gpu_throttle_bits": None}
    if (folder / "gpu.npz").exists():
        with np.load(folder / "gpu.npz", allow_pickle=False) as samples:
            clocks |= {name: describe_samples(samples[name]) for name in ("gpu_clock_mhz", "gpu_power_w")}
            clocks["gpu_throttle_bits"] = int(np.bitwise_or.reduce(samples["gpu_throttle_bits"].astype(np.int64)))
    batch_tokens = metrics["train_tokens"] // metrics["steps"]
    return {
        **{name: metrics[name] for name in names}, "batch_tokens": batch_tokens, "rates": rates, **clocks,
        "attention": metrics["attention_backend"],
    }  # fmt: skip


def run_scale(session: Session, until: float) -> bool:
    """Measure whole training steps on 1, 2, 4, ... GPUs by `seedsweep bench train`; a row for each number."""
    is_well = True
    for wave in waves(session.args.gpus):
        left = max(0.0, until - session.now())
        if left < WAVE_S:
            session.add("scale", "none", left_out=f"{' + '.join(map(str, wave))} GPUs: {left:.0f} s were left")
            return False
        is_well &= run_wave(session, wave, until)
    return is_well


def run_wave(session: Session, wave: list[int], until: float) -> bool:
    """Measure these numbers of GPUs at once, each on GPUs of its own; return whether all were."""
    args, begun, told = session.args, session.now(), set()
    processes: dict[int, subprocess.Popen[bytes]] = {}
    names = list_gpus() if args.device == "cuda" else [""] * args.gpus
    for gpus in wave:
        first = sum(processes)
        visible = ",".join(names[first : first + gpus])
        processes[gpus] = start(args, bench_command(args, gpus), f"scale-{gpus}", CUDA_VISIBLE_DEVICES=visible)

    def look() -> None:
        for gpus, process in processes.items():
            report = args.work / f"scale-{gpus}.json"
            if gpus not in told and process.poll() is not None and report.exists():
                told.add(gpus)
                beside = [other for other in wave if other != gpus]
                figures = read_bench(report)
                session.add("scale", "rates", gpus=gpus, beside=beside, seconds=session.now() - begun, **figures)

    is_cut = wait_for(session, list(processes.values()), until, look)
    codes = {str(gpus): process.returncode for gpus, process in processes.items()}
    session.add("scale", "end", seconds=session.now() - begun, exit_codes=codes, cut=is_cut)
    return told == set(wave)


def bench_command(args: Namespace, gpus: int) -> list[str]:
    """Return the command that measures training on so many GPUs; on a CPU over made-up tokens, which fit any preset."""
    data = data_section(args.corpus)
    named = ["--train", data["train"], "--attention", args.attention] if args.device == "cuda" else []
    return [
        "-m", "seedsweep", "bench", "train", "--preset", args.preset, "--ranks", str(gpus), "--repeats", "1", *named,
        "--out", str(args.work / f"scale-{gpus}.json"),
    ]  # fmt: skip


def read_bench(path: Path) -> dict[str, Any]:
    """Return rates, largest peak and compilation while timed out of a report of `seedsweep bench train`."""
    report = json.loads(path.read_text())
    figures = {figure["name"]: figure["samples"][0] for figure in report["figures"]}
    labels = sorted(
        (match[1] for name in figures if (match := re.fullmatch(r"(\d+ (?:layers|visits)): rate", name))),
        key=lambda label: label.endswith("visits"),
    )
    visits = dict(zip(("plain", "looped"), labels, strict=True))
    return {
        "rates": {loop: describe_samples(figures[f"{label}: rate"]) for loop, label in visits.items()},
        "visits": visits,
        "peak_memory_gib": max(figures[f"{label}: peak memory"][0] for label in labels),
        "compiled_while_timed_s": sum(figures[f"{label}: compiled while timed"][0] for label in labels),
        "attention": report["environment"].get("attention_backend"),
        "took_s": report["settings"]["took_s"],
    }


def run_gangs(session: Session, until: float) -> bool:
    """Run two gangs at once and kill one rank; a row once the other gang has trained, one at the end."""
    args, begun = session.args, session.now()
    spec = gangs_spec(args)
    out = Path(spec["out"])
    out.mkdir()
    order = Order(seed=SEED, rank=args.gpus // 2 - 1, other=OTHER_SEED, at_s=KILL_FRAC * args.gang_s)
    (out / ORDER).write_text(json.dumps(order._asdict()))
    watch = Watch(session, out)
    process = start(args, ["-m", "tests.gpu_eight_gangs", write_spec(args, spec)], "gangs")
    speed: dict[str, Any] | None = None

    def look() -> None:
        nonlocal speed
        watch.look()
        is_first, speed = speed is None, speed or measure_speed(out, warm_s=WARM_FRAC * args.gang_s)
        if is_first and speed is not None:
            session.add("gangs", "speed", gpus_each=args.gpus // 2, **speed)

    is_cut = wait_for(session, [process], until, look)
    if speed is not None:  # once more, with what came after the other gang's training
        speed = measure_speed(out, warm_s=WARM_FRAC * args.gang_s) or speed
        session.add("gangs", "speed", gpus_each=args.gpus // 2, **speed)
    killed, fates = read_killed(out), read_fates(out) if (out / "state.json").exists() else {}
    session.add("gangs", "fates", gpus_each=args.gpus // 2, killed=killed, fates=fates)
    session.add("gangs", "end", seconds=session.now() - begun, exit_code=process.returncode, cut=is_cut)
    return killed is not None and speed is not None and is_retried(fates) and is_unhurt(speed, args)


def is_retried(fates: Mapping[int, Mapping[str, Any]]) -> bool:
    """Return whether the gang that lost a rank was done at its second attempt and the other at its first."""
    ends = {seed: (fate["state"], fate["attempts"]) for seed, fate in fates.items()}
    return ends == {SEED: ("DONE", 2), OTHER_SEED: ("DONE", 1)}


def is_unhurt(speed: Mapping[str, Any], args: Namespace) -> bool:
    """Return whether the other gang kept its speed; CPU ranks share cores, so that their speed says nothing."""
    percents = [speed[f"{name}_slower_percent"] for name in ("gone", "both")]
    return args.device == "cpu" or all(percent is None or percent <= SLOWER_PERCENT for percent in percents)


def run_plan(session: Session, until: float) -> bool:
    """Ask `seedsweep plan` about both specs on this machine; a row for each."""
    args, codes = session.args, []
    for spec, gang in ((published_spec(args), args.gpus), (gangs_spec(args), args.gpus // 2)):
        if not gang:
            continue
        log, begun = f"plan-{gang}", session.now()
        fresh = str(args.work / "nothing-yet")
        process = start(args, ["-m", "seedsweep", "plan", write_spec(args, spec), "--out", fresh], log)
        wait_for(session, [process], until)
        lines = (args.work / f"{log}.log").read_text().splitlines()
        slots = next((line for line in lines if line.startswith("slots:")), "no slots named")
        nodes = [line for line in lines if line.startswith("node ")]
        estimate = next((line for line in lines if line.startswith("estimate:")), "")
        problems = [line for line in lines if "error: " in line]
        session.add(
            "plan", "plan", gang=gang, slots=slots, nodes=nodes, estimate=estimate, problems=problems,
            exit_code=process.returncode, seconds=session.now() - begun,
        )  # fmt: skip
        codes.append(process.returncode)
    return codes != [] and not any(codes)
