"""Probe of self-containment (R1): the program and the artifact score again in a fresh process with nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from model.audit import child as audit_child
from model.audit.finished_run import RunFiles
from model.audit.verdicts import FAIL, PASS, Result, not_run
from model.bundle.program import PACKED_NAME
from model.files.plain import read_json_if_any

RULE = "R1"
SCORES = ("pre_ttt", "ttt_lr0", "post_ttt")
NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount", "--net")
KEPT_VARIABLES = ("PATH", "LANG", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
TIMEOUT_S = 24 * 3600.0
FLOAT32_LIMIT_BPB = 1e-5  # another number of ranks or another CPU rounds sums elsewhere
BFLOAT16_LIMIT_BPB = 1e-3


class Fresh(NamedTuple):
    """What came out of the fresh process: its report, its scores ({} where it left none) and the end of its output."""

    report: dict[str, Any]
    scores: dict[str, Any]
    output: str
    namespace_problem: str


def probe_reload(files: RunFiles, validation_shards: Sequence[Path], tokenizer: Path) -> list[Result]:
    """Score the artifact with the counted program in a sandbox; return the results of reload and network_block."""
    program = files.workdir / PACKED_NAME
    if not program.is_file():
        why = f"{program} is missing: the run is of a version that left no program of its own"
        return [not_run("reload", RULE, why), not_run("network_block", RULE, why)]
    fresh = run_fresh(program, files, validation_shards, tokenizer)
    return [judge_scores(files, fresh), judge_network(fresh)]


def run_fresh(program: Path, files: RunFiles, validation_shards: Sequence[Path], tokenizer: Path) -> Fresh:
    """Copy program, artifact, tokenizer and validation shards into a new folder and run the program's --eval there."""
    with tempfile.TemporaryDirectory(prefix="seedsweep-audit-") as name:
        box = Path(name).resolve()
        for folder in ("val", "tmp", "home"):
            (box / folder).mkdir()
        shutil.copy(files.artifact, box / "model.ssq")
        shutil.copy(program, box / "train_gpt.py")
        shutil.copy(tokenizer, box / "tokenizer.model")
        for number, shard in enumerate(validation_shards):
            shutil.copy(shard, box / "val" / f"{number:06d}-{shard.name}")
        problem = namespace_problem()
        hidden = [*files.train_shards, *(p for p in files.workdir.glob("*.safetensors"))]
        spec = {
            "hidden": [str(path.resolve()) for path in hidden],
            "is_isolated": not problem,
            "allowed": [str(box)],
            "program": str(box / "train_gpt.py"),
            "arguments": ["--eval", str(box / "model.ssq"), "--tokenizer", str(box / "tokenizer.model"),
                          "--val", str(box / "val" / "*"), "--json", str(box / "scores.json")],
            "report": str(box / "report.json"),
        }  # fmt: skip
        (box / "spec.json").write_text(json.dumps(spec))
        child = shutil.copy(audit_child.__file__, box / "audit_child.py")
        command = [*(NAMESPACE if not problem else ()), sys.executable, "-I", str(child), str(box / "spec.json")]
        done = subprocess.run(
            command, cwd=box, env=make_environment(box), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        report, scores = (read_json_if_any(box / f"{part}.json") for part in ("report", "scores"))
        return Fresh(report, scores, (done.stderr or done.stdout).strip()[-500:], problem)


def make_environment(box: Path) -> dict[str, str]:
    """Return the few variables a program needs, with every cache and temporary folder inside the sandbox."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    inside = {
        "HOME": "home",
        "TMPDIR": "tmp",
        "TRITON_CACHE_DIR": "tmp/triton",
        "TORCHINDUCTOR_CACHE_DIR": "tmp/inductor",
    }
    return {**kept, **{name: str(box / folder) for name, folder in inside.items()}}


def namespace_problem() -> str:
    """Return why this system gives a process no mount and network namespace of its own, or an empty string."""
    try:
        done = subprocess.run([*NAMESPACE, "true"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unshare cannot be run ({error})"
    return (
        ""
        if done.returncode == 0
        else done.stderr.strip().splitlines()[-1]
        if done.stderr.strip()
        else "unshare failed"
    )


def judge_scores(files: RunFiles, fresh: Fresh) -> Result:
    """Compare the fresh scores with the run's; anything that was refused or still within reach is a fail."""
    metrics, scores = files.metrics, fresh.scores
    faults = [f"tried to use {what}" for what in fresh.report.get("refused", [])]
    if not fresh.namespace_problem:
        faults += [fresh.report["cover_problem"]] if fresh.report.get("cover_problem") else []
        faults += [f"{path} was still readable" for path in fresh.report.get("readable", [])]
    missing = [name for name in SCORES if f"{name}_bpb" not in scores]
    if missing and not faults:
        faults.append(
            f"the fresh process left no {', '.join(missing)} (exit {fresh.report.get('exit')}): {fresh.output}"
        )
    gaps = {name: abs(scores[f"{name}_bpb"] - metrics[f"{name}_bpb"]) for name in SCORES if name not in missing}
    measured = max(gaps.values()) if gaps else float("inf")
    limit = FLOAT32_LIMIT_BPB if files.run.get("device") == "cpu" else BFLOAT16_LIMIT_BPB
    is_same = not missing and all(scores[f"{name}_nats"] == metrics[f"{name}_nats"] for name in SCORES)
    hidden = "covered by a mount namespace and refused by an audit hook"
    if fresh.namespace_problem:
        hidden = f"refused by an audit hook only (no mount namespace: {fresh.namespace_problem})"
    detail = f"{'bit-identical' if is_same else 'not bit-identical'} nats; training data and weights were {hidden}"
    return Result(
        probe="reload", rule=RULE, result=FAIL if faults or not measured <= limit else PASS,
        measured=measured if gaps else "no score",
        limit=limit, unit="bpb, largest difference", sample_size=int(metrics["post_ttt_tokens"]),
        sample_of="validation targets (all), plain, learning rate 0 and adapted",
        detail="; ".join(faults) or detail,
        not_checked="reads by C code, where only the audit hook stood guard" if fresh.namespace_problem
        else "other readable files of this machine are kept from Python code only",
    )  # fmt: skip


def judge_network(fresh: Fresh) -> Result:
    """Say whether the fresh process had any way out."""
    facts: dict[str, Any] = {
        "sample_size": 1,
        "sample_of": "fresh process",
        "unit": "network interfaces besides loopback",
    }
    if fresh.namespace_problem:
        why = f"this system gives no network namespace ({fresh.namespace_problem}); only Python's sockets were refused"
        return not_run("network_block", RULE, why, **facts)
    ways = [name for name in fresh.report.get("interfaces", ["?"]) if name != "lo"]
    return Result(
        probe="network_block", rule=RULE, result=FAIL if ways else PASS, measured=len(ways), limit=0,
        detail=", ".join(ways) or "the process had the loopback interface only, and that was down", **facts,
    )  # fmt: skip
