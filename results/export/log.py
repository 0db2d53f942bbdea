"""A training log with the lines that reviewers' tools read, rendered from the Parquet rows of one seed."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

MAX_CURVE_LINES = 200
STAGE_LABELS = {
    "post_ema": "pre-quantization post-ema",
    "pre_ttt": "quantized",
    "ttt_lr0": "diagnostic quantized_ttt_lr0",
    "post_ttt": "quantized_ttt_lora",
}


def train_log(run: pd.Series, steps: pd.DataFrame) -> str:
    """Return the log of one seed.

    run: its row of `runs`; steps: its rows of the steps table. The figures carry the decimals of the published logs.
    """
    config = json.loads(run["config_json"] or "{}")
    total = _number(config.get("train", {}).get("max_steps")) or int(run["steps"])
    lines = ["Hyperparameters:", *_hyperparameters(run, config)]
    if _has(run, "post_ttt_tokens"):
        lines.append(f"val_tokens: {int(run['post_ttt_tokens'])}")
    if _has(run, "val_bytes"):
        lines.append(f"val_bytes: {int(run['val_bytes'])}")
    if isinstance(run["val_documents_hash"], str):
        lines.append(f"val_documents_hash: {run['val_documents_hash']}")
    if _has(run, "num_params"):
        lines.append(f"model_params:{int(run['num_params'])}")
    lines += _curve(steps, total)
    lines += _stop(run, config, total)
    if _has(run, "peak_memory_bytes"):
        lines.append(f"peak memory allocated: {round(run['peak_memory_bytes'] / 2**20)} MiB")
    lines += _stage(run, "post_ema")
    if _has(run, "code_bytes"):
        if _has(run, "code_bytes_readable"):
            lines.append(f"Code size (uncompressed): {int(run['code_bytes_readable'])} bytes")
        lines.append(f"Code size (compressed): {int(run['code_bytes'])} bytes")
    if _has(run, "hessian_s"):
        lines.append(f"GPTQ:collected Hessians in {run['hessian_s']:.3f}s")
    if _has(run, "model_bytes"):
        lines.append(f"Serialized model quantized+brotli: {int(run['model_bytes'])} bytes")
    lines.append(f"Total submission size quantized+brotli: {int(run['artifact_bytes'])} bytes")
    lines += [line for stage in ("pre_ttt", "ttt_lr0", "post_ttt") for line in _stage(run, stage)]
    lines += _times(run)
    return "\n".join(lines) + "\n"


def _hyperparameters(run: pd.Series, config: dict[str, Any]) -> list[str]:
    """Return the resolved configuration, one setting a line, nested names joined."""
    settings = {"seed": run["seed"]}
    settings |= {name: int(run[name]) for name in ("world_size", "vocab_size") if _has(run, name)}
    for section, values in sorted(config.items()):
        if isinstance(values, dict) and section not in ("data", "runtime"):
            settings |= {f"{section}_{name}": value for name, value in sorted(values.items())}
    return [f"  {name}: {value}" for name, value in settings.items()]


def _curve(steps: pd.DataFrame, total: int) -> list[str]:
    """Return the loss curve, thinned to a readable length, and the step where looping turned on."""
    lines = []
    every = max(1, math.ceil(len(steps) / MAX_CURVE_LINES))
    looped = steps.loc[steps["is_looped"].eq(True), "step"]
    first_looped = int(looped.iloc[0]) if len(looped) else None
    for position, (_, row) in enumerate(steps.iterrows()):
        if first_looped is not None and int(row["step"]) == first_looped:
            lines.append(f"layer_loop:enabled step:{first_looped - 1}")
        if position < 5 or position % every == 0 or position == len(steps) - 1:
            line = f"step:{int(row['step'])}/{total} train_loss:{row['loss']:.6f}"
            if math.isfinite(row["elapsed_s"]):
                line += f" train_time:{1000 * row['elapsed_s']:.0f}ms"
            if math.isfinite(row["tokens_per_s"]):
                line += f" tok/s: {row['tokens_per_s']:.0f}"
            lines.append(line)
    return lines


def _stop(run: pd.Series, config: dict[str, Any], total: int) -> list[str]:
    """Return the last validation of the live weights and the line that says where training stopped."""
    lines = []
    if _has(run, "live_bpb") and _has(run, "live_nats_per_token"):
        lines.append(
            f"{int(run['steps'])}/{total} val_loss:{run['live_nats_per_token']:.8f} val_bpb:{run['live_bpb']:.8f}"
        )
    if config.get("train", {}).get("budget_s") is None and int(run["steps"]) >= total:
        lines.append("# all steps done without a time budget; the next line has the form that reviewers' tools read")
    stop = f"train_time: {1000 * run['train_s']:.0f}ms step: {int(run['steps'])}/{total}"
    return [*lines, f"stopping_early: wallclock_cap {stop}"]


def _stage(run: pd.Series, stage: str) -> list[str]:
    """Return the line of one scoring pass, none where it was not measured."""
    if not _has(run, f"{stage}_bpb") or not _has(run, f"{stage}_nats_per_token"):
        return []
    figures = f"val_loss:{run[f'{stage}_nats_per_token']:.8f} val_bpb:{run[f'{stage}_bpb']:.8f}"
    time = f" eval_time:{1000 * run[f'{stage}_s']:.0f}ms" if _has(run, f"{stage}_s") else ""
    return [f"{STAGE_LABELS[stage]} {figures}{time}"]


def _times(run: pd.Series) -> list[str]:
    """Return the seconds of the stages; total_eval_time is everything after the artifact was written."""
    names = {"quantize_s": "quantize_time", "evaluate_s": "plain_eval_time", "ttt_s": "ttt_time"}
    lines = [f"{label}:{run[name]:.3f}s" for name, label in names.items() if _has(run, name)]
    if _has(run, "evaluate_s") and _has(run, "ttt_s"):
        lines.append(f"total_eval_time:{run['evaluate_s'] + run['ttt_s']:.3f}s")
    if _has(run, "order0_bpb"):
        lines.append(f"order0_bpb:{run['order0_bpb']:.8f}")
    return lines


def _has(run: pd.Series, name: str) -> bool:
    value = run[name]
    return value is not None and value == value and abs(value) != math.inf


def _number(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) else None
