"""What the parity checks share: reading golden files, keeping account of their keys, and the parameter names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig, TrainConfig
from model.gpt import GPT

Measure = Callable[[np.ndarray, np.ndarray], float]  # (ours, golden), same shape -> error


def largest_error(ours: np.ndarray, golden: np.ndarray) -> float:
    """Return the largest absolute difference."""
    return float(np.abs(ours.astype(np.float64) - golden.astype(np.float64)).max(initial=0.0))


def rms_error(ours: np.ndarray, golden: np.ndarray) -> float:
    """Return the root mean square of the differences."""
    return float(np.sqrt(np.mean(np.square(ours.astype(np.float64) - golden.astype(np.float64)))))


def error_of_largest_entry(ours: np.ndarray, golden: np.ndarray) -> float:
    """Return the largest absolute difference as a share of the largest absolute golden entry."""
    scale = float(np.abs(golden).max(initial=0.0))
    return largest_error(ours, golden) / scale if scale else largest_error(ours, golden)


def relative_error(ours: np.ndarray, golden: np.ndarray) -> float:
    """Return the largest of |ours - golden| / |golden|."""
    return float(np.max(np.abs(ours.astype(np.float64) - golden) / np.abs(golden)))


def num_different(ours: np.ndarray, golden: np.ndarray) -> float:
    """Return how many entries differ at all."""
    return float(np.count_nonzero(ours != golden))


@dataclass(frozen=True)
class Comparison:
    """One golden key held against ours; it passes if error <= tolerance."""

    key: str
    error: float
    tolerance: float

    @property
    def has_passed(self) -> bool:
        """True if the error is a number within the tolerance."""
        return self.error <= self.tolerance

    @property
    def severity(self) -> float:
        """Error in units of the tolerance; the worst comparison of a set is the one with the largest."""
        if self.tolerance > 0:
            return self.error / self.tolerance if self.error == self.error else float("inf")
        return 0.0 if self.error == 0 else float("inf")


@dataclass
class GoldenSet:
    """The files of one set, opened, and an account of what became of each key: read as input, compared, or neither."""

    directory: Path
    files: tuple[str, ...]
    borrowed: tuple[str, ...] = ()  # files of other sets that this one reads from; they account for their keys
    content: dict[str, dict[str, Any]] = field(default_factory=dict)
    inputs: set[str] = field(default_factory=set)
    comparisons: list[Comparison] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in (*self.files, *self.borrowed):
            self.content[name] = read_golden(self.directory / name)

    def keys(self, prefix: str = "", *, file: str | None = None) -> list[str]:
        """List the keys of one file (the set's first by default) that start with prefix, in the file's order."""
        return [key for key in self.content[file or self.files[0]] if key.startswith(prefix)]

    def read(self, key: str, *, file: str | None = None) -> Any:
        """Return the value of a key and count it as input."""
        name = file or self.files[0]
        if key not in self.content[name]:
            raise ValueError(f"{name} has no key {key!r}")
        self.inputs.add(self._full(name, key))
        return self.content[name][key]

    def settings(self, key: str) -> dict[str, Any]:
        """Return the JSON object stored as a string under key."""
        loaded: dict[str, Any] = json.loads(str(self.read(key)))
        return loaded

    def tensors(self, prefix: str, *, file: str | None = None) -> dict[str, np.ndarray]:
        """Return every array under prefix by the rest of its name, counted as input."""
        return {key[len(prefix) :]: self.read(key, file=file) for key in self.keys(prefix, file=file)}

    def compare(
        self, key: str, ours: Any, *, tolerance: float, measure: Measure = largest_error, file: str | None = None
    ) -> None:
        """Hold ours against the golden value of key; another shape is an infinite error.

        Several measures may look at one key; a tolerance of 0 asks for equality. A key that the file lacks is skipped,
        because a copy may leave out part of a set.
        """
        name = file or self.files[0]
        if key not in self.content[name]:
            return
        golden = np.asarray(self.content[name][key])
        ours = ours.detach().cpu() if isinstance(ours, Tensor) else ours
        array = np.asarray(ours.float() if isinstance(ours, Tensor) and ours.dtype == torch.bfloat16 else ours)
        error = measure(array, golden) if array.shape == golden.shape else float("inf")
        self.comparisons.append(Comparison(self._full(name, key), error, tolerance))

    def check(self, key: str, is_equal: bool, *, file: str | None = None) -> None:
        """Record an exact comparison of something that is not an array."""
        self.comparisons.append(Comparison(self._full(file or self.files[0], key), 0.0 if is_equal else 1.0, 0.0))

    def leave_out(self, key: str) -> None:
        """Name a part of a JSON value, written key/part, that has no stated tolerance."""
        self.left_out.append(self._full(self.files[0], key))

    def not_compared(self) -> list[str]:
        """List the keys that were neither read nor compared, and the parts that were left out."""
        seen = self.inputs | {item.key for item in self.comparisons} | set(self.left_out)
        seen |= {key.split("/")[0] for key in seen}  # a JSON value is compared part by part
        every = [self._full(name, key) for name in self.files for key in self.content[name]]
        return [key for key in every if key not in seen] + self.left_out

    def _full(self, file: str, key: str) -> str:
        return key if len(self.files) == 1 else f"{Path(file).stem}:{key}"


def read_golden(path: Path) -> dict[str, Any]:
    """Return the keys and values of a .npz or .json file; raises FileNotFoundError naming it."""
    if not path.is_file():
        raise FileNotFoundError(f"missing {path.name}")
    if path.suffix == ".json":
        loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return loaded
    with np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


# ---- settings and names ----------------------------------------------------------------------------------------------

FIXED_SETTINGS = {"ln_scale": True, "skip_gates_enabled": True, "tie_embeddings": True, "rope_yarn": False}


def model_config(settings: Mapping[str, Any]) -> ModelConfig:
    """Return our config of the published script's settings; raises ValueError for a variant that we do not have."""
    for name, value in FIXED_SETTINGS.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{name}={settings[name]} is a variant that the model does not have")
    if settings.get("embedding_dim", settings["model_dim"]) != settings["model_dim"]:
        raise ValueError(f"embedding_dim={settings['embedding_dim']} must equal model_dim={settings['model_dim']}")
    same = (
        "vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "mlp_mult", "rope_dims", "rope_base",
        "xsa_last_n", "loop_start", "loop_end", "num_loops", "parallel_start_layer", "logit_softcap",
    )  # fmt: skip
    return ModelConfig(
        **{name: settings[name] for name in same},
        q_gain_init=settings["qk_gain_init"],
        embedding_init_std=settings["tied_embed_init_std"],
    )


def train_config(settings: Mapping[str, Any], **changes: Any) -> TrainConfig:
    """Return our config of the published script's settings, those that are there, on a schedule counted in steps."""
    same = (
        "warmdown_frac",
        "matrix_lr",
        "muon_momentum",
        "muon_momentum_warmup_steps",
        "adam_eps",
        "grad_clip_norm",
        "ema_decay",
    )
    renamed = {
        "iterations": "max_steps", "train_seq_len": "seq_len", "min_lr": "min_lr_frac",
        "enable_looping_at": "loop_start_frac", "tied_embed_lr": "embedding_lr", "scalar_lr": "vector_lr",
        "muon_momentum_warmup_start": "muon_momentum_start", "muon_backend_steps": "newton_schulz_steps",
        "beta1": "adam_beta1", "beta2": "adam_beta2", "adam_wd": "vector_weight_decay",
        "muon_wd": "matrix_weight_decay", "embed_wd": "embedding_weight_decay",
        "train_batch_tokens": "batch_tokens",
    }  # fmt: skip
    if not settings.get("muon_row_normalize", True):
        raise ValueError("muon_row_normalize=false is a variant that the training loop does not have")
    found = {name: settings[name] for name in same if name in settings}
    found |= {ours: settings[theirs] for theirs, ours in renamed.items() if theirs in settings}
    if "train_batch_tokens" in settings and "grad_accum_steps" in settings:
        found["micro_batch_tokens"] = settings["train_batch_tokens"] // settings["grad_accum_steps"]
    return TrainConfig(**({"budget_s": None} | found | changes))


def our_place(golden_name: str) -> tuple[str, int | None]:
    """Return our parameter's name and, for a tensor that we stack over layers, the layer.

    blocks.3.attn.q_gain -> ("q_gain", 3); banks, skips, lane_merge and tok_emb.weight have the same name in both.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.(?:attn\.)?(\w+)", golden_name)
    return (match[2], int(match[1])) if match else (golden_name, None)


def stack_parameters(golden: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Return golden tensors under our names, the per-layer ones stacked along a first axis of layers."""
    whole: dict[str, Tensor] = {}
    layers: dict[str, dict[int, Tensor]] = {}
    for golden_name, array in golden.items():
        name, layer = our_place(golden_name)
        if layer is None:
            whole[name] = torch.from_numpy(np.array(array))
        else:
            layers.setdefault(name, {})[layer] = torch.from_numpy(np.array(array))
    stacked = {name: torch.stack([rows[i] for i in range(len(rows))]) for name, rows in layers.items()}
    return whole | stacked


def take_parameter(ours: Mapping[str, Tensor], golden_name: str) -> Tensor:
    """Return the part of our tensors that corresponds to a golden parameter."""
    name, layer = our_place(golden_name)
    return ours[name] if layer is None else ours[name][layer]


def build_model(
    config: ModelConfig, parameters: Mapping[str, np.ndarray], *, dtype: torch.dtype = torch.float32
) -> GPT:
    """Return a model that holds the golden parameters and computes in dtype; every parameter must be given."""
    model = GPT(config, compute_dtype=dtype)
    model.load_state_dict(stack_parameters(parameters), strict=True)
    return model.to(dtype)


def compare_all(
    golden: GoldenSet,
    prefix: str,
    ours: Mapping[str, Tensor],
    names: Iterable[str],
    *,
    tolerance: float,
    measure: Measure = largest_error,
    file: str | None = None,
) -> None:
    """Compare a tensor for each golden parameter name under prefix."""
    for name in names:
        golden.compare(prefix + name, take_parameter(ours, name), tolerance=tolerance, measure=measure, file=file)
