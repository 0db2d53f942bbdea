"""Comparing a seed with its rerun, stage by stage: bit-identical, within same-seed noise, or different."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from model.files.plain import read_arrays, read_json

if TYPE_CHECKING:
    import numpy as np

IDENTICAL, WITHIN_NOISE, DIFFERENT = "bit-identical", "within same-seed noise", "different"
CLOCKS = ("elapsed_s", "tokens_per_s")  # of steps.npz: not compared, for no run repeats them


class StageVerdict(NamedTuple):
    """How far one stage moved: its figure before and after, and what of its outputs is equal."""

    stage: str
    state: str
    metric: str
    before: float | None
    after: float | None
    detail: str

    @property
    def difference(self) -> float | None:
        """After minus before."""
        return None if self.before is None or self.after is None else self.after - self.before


# stage -> the figure that judges it: for weights, what they score
JUDGED_BY = {"train": "post_ema_bpb", "quantize": "pre_ttt_bpb", "evaluate": "pre_ttt_bpb", "ttt": "post_ttt_bpb"}


def compare_runs(before: Path, after: Path, is_within_noise: Callable[[str, float], bool | None]) -> list[StageVerdict]:
    """Return a verdict for every stage of two run directories of one seed.

    is_within_noise(metric, difference) says whether repeats of a seed differ as much; None where there are no repeats.
    """
    metrics = [_metrics(folder) for folder in (before, after)]
    verdicts = []
    for stage, compare in {
        "train": compare_weights, "quantize": compare_artifacts, "evaluate": compare_evaluations, "ttt": compare_ttt,
    }.items():  # fmt: skip
        is_equal, detail = compare(before, after)
        first, second = (found.get(JUDGED_BY[stage]) for found in metrics)
        state = IDENTICAL if is_equal else DIFFERENT
        if not is_equal and first is not None and second is not None:
            is_noise = is_within_noise(JUDGED_BY[stage], second - first)
            state = WITHIN_NOISE if is_noise else DIFFERENT
            if is_noise is None:
                detail += "; no repeats of a seed here, so noise is unknown"
        verdicts.append(StageVerdict(stage, state, JUDGED_BY[stage], first, second, detail))
    return verdicts


def _metrics(workdir: Path) -> dict[str, Any]:
    """Return every metric of a run directory's stage records."""
    found: dict[str, Any] = {}
    for path in sorted((workdir / "stages").glob("*.json")):
        found |= read_json(path)["metrics"]
    return found


def compare_weights(before: Path, after: Path) -> tuple[bool, str]:
    """Compare the trained weights, and the curve on the way there."""
    from model.files.tensors import load_tensors

    curves = [
        {name: values for name, values in read_arrays(folder / "steps.npz").items() if name not in CLOCKS}
        for folder in (before, after)
    ]
    paths = [folder / "train.safetensors" for folder in (before, after)]
    if not all(path.is_file() for path in paths):
        is_equal, detail = _same_arrays(*curves)
        return is_equal, f"weights are not kept; curve: {detail}"
    first, second = (load_tensors(path) for path in paths)
    if set(first) != set(second):
        return False, "other tensors"
    moved = {name: float((first[name].double() - second[name].double()).abs().max()) for name in first
             if first[name].numel() and not _equal_bits(first[name], second[name])}  # fmt: skip
    if not moved:
        is_equal, detail = _same_arrays(*curves)
        return is_equal, f"{len(first)} tensors equal; curve: {detail}"
    name = max(moved, key=lambda tensor: moved[tensor])
    return False, f"{len(moved)} of {len(first)} tensors differ, {name} by up to {moved[name]:.3g}"


def _equal_bits(first: Any, second: Any) -> bool:
    import torch

    return first.dtype == second.dtype and bool(torch.equal(first, second))


def _equal_corrections(first: Any, second: Any) -> bool:
    """Return whether two quantized matrices have the same low-rank correction, or none."""
    one, two = first.correction, second.correction
    if one is None or two is None:
        return one is two
    return all(_equal_bits(*pair) for pair in zip(one, two, strict=True))


def compare_artifacts(before: Path, after: Path) -> tuple[bool, str]:
    """Compare what the artifacts hold; their headers also name code and data, and may differ."""
    from model.quant.artifact import load_artifact

    (config, first), (other_config, second) = (load_artifact(folder / "model.ssq") for folder in (before, after))
    if config != other_config or set(first.matrices) != set(second.matrices) or set(first.floats) != set(second.floats):
        return False, "another model"
    differing = [name for name, value in first.floats.items() if not _equal_bits(value, second.floats[name])]
    moved = total = 0
    for name, matrix in first.matrices.items():
        other = second.matrices[name]
        moved += int((matrix.codes != other.codes).sum())
        total += matrix.codes.numel()
        if not _equal_bits(matrix.scales, other.scales) or not _equal_corrections(matrix, other):
            differing.append(name)
    if not moved and not differing:
        is_same_file = (before / "model.ssq").read_bytes() == (after / "model.ssq").read_bytes()
        return True, "same file" if is_same_file else "same codes, scales and floats; other header"
    return False, f"{moved} of {total} codes differ, {len(differing)} tensors have other scales, corrections or floats"


def compare_evaluations(before: Path, after: Path) -> tuple[bool, str]:
    """Compare the documents' scores under plain evaluation, and the sums of all three passes."""
    is_equal, detail = _same_arrays(*(read_arrays(folder / "evaluate.npz") for folder in (before, after)))
    first, second = (_metrics(folder) for folder in (before, after))
    sums = [f"{name}_nats" for name in ("live", "post_ema", "pre_ttt")]
    differing = [name for name in sums if first.get(name) != second.get(name)]
    if differing:
        return False, f"{detail}; {', '.join(differing)} differ"
    return is_equal, detail


def compare_ttt(before: Path, after: Path) -> tuple[bool, str]:
    """Compare the documents' scores with test-time training, and every target's loss."""
    first, second = (read_arrays(folder / "ttt.npz") for folder in (before, after))
    logs = [read_arrays(folder / "ttt_scores.npz") for folder in (before, after)]
    for arrays, log in zip((first, second), logs):
        arrays["nll"] = log["nll"]
    return _same_arrays(first, second)


def _same_arrays(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> tuple[bool, str]:
    """Return whether two sets of arrays are equal, and how many numbers are not."""
    import numpy as np

    if {name: values.shape for name, values in first.items()} != {n: values.shape for n, values in second.items()}:
        return False, "other documents or steps"
    moved = sum(int((values != second[name]).sum()) for name, values in first.items())
    total = sum(int(np.size(values)) for values in first.values())
    return moved == 0, "all equal" if not moved else f"{moved} of {total} numbers differ"


def visible_gpus() -> dict[str, Any]:
    """Return model, number and CUDA version of the GPUs that this process sees, {} where it sees none."""
    import torch

    if not torch.cuda.is_available():
        return {}
    return {
        "gpu_model": torch.cuda.get_device_name(0),
        "cuda_version": torch.version.cuda,
        "num_gpus": torch.cuda.device_count(),
    }
