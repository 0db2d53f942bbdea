"""Muon for the weight banks, AdamW for the rest.

Source: Muon (Jordan et al., 2024) with row normalisation; parameter-golf PR #1536.
"""

# N matrices of a bank, r rows, c columns

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from model.banks import BANKS, EMBEDDING_PARAMETER
from model.config import TrainConfig
from model.distributed import Dist, Pending
from model.train.gradients import collect_gradients

# (a, b, c) of each round's odd polynomial a x + b x^3 + c x^5 on the singular values; later rounds repeat the last.
COEFFICIENTS: dict[str, tuple[tuple[float, float, float], ...]] = {
    # one polynomial that lifts small values fast: 5 rounds bring them near 1 (0.7 to 1.2), and that does
    "newton_schulz": ((3.4445, -4.775, 2.0315),),
    # the best polynomial for what each round before it leaves: after 5 rounds 0.86 to 1.14 (parameter-golf PR #1344)
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}


def newton_schulz(
    G: Tensor, *, steps: int = 5, dtype: torch.dtype = torch.bfloat16, coefficients: str = "newton_schulz"
) -> Tensor:
    """Push the singular values of each matrix of G (..., r, c) towards 1; returned in dtype.

    coefficients is a key of COEFFICIENTS. Every product is taken in dtype, on the orientation with rows <= columns,
    after division by the Frobenius norm + 1e-7. Zero in gives zero out.
    """
    rounds = COEFFICIENTS[coefficients]
    X = G.to(dtype)
    is_tall = X.size(-2) > X.size(-1)
    if is_tall:
        X = X.mT  # X X^T is then the smaller of the two squares
    shape = X.shape
    X = X.reshape(-1, *shape[-2:])
    # no singular value is above the Frobenius norm: all start within 0..1, where the polynomial converges
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for step in range(steps):
        a, b, c = rounds[min(step, len(rounds) - 1)]
        A = X @ X.mT
        B = b * A + c * (A @ A)  # rounded term by term, as published: fused multiply-adds end up 2e-2 away in bf16
        X = a * X + B @ X
    X = X.view(shape)
    return X.mT if is_tall else X


def muon_update(
    grad: Tensor,
    buffer: Tensor,
    *,
    momentum: float,
    steps: int = 5,
    is_nesterov: bool = True,
    normalize_rows: bool = True,
    coefficients: str = "newton_schulz",
) -> Tensor:
    """Advance buffer (N, r, c) by grad in place and return the orthogonalised update, both in buffer's type."""
    grad = grad.to(buffer.dtype)
    buffer.mul_(momentum).add_(grad)
    # Nesterov: the gradient once more on top of the momentum that has it already
    update = grad.add(buffer, alpha=momentum) if is_nesterov else buffer.clone()
    if normalize_rows:
        at_least_float32 = torch.promote_types(update.dtype, torch.float32)
        norms = update.to(at_least_float32).norm(dim=-1, keepdim=True).clamp_min(1e-7)
        update = update / norms.to(update.dtype)
    return newton_schulz(update, steps=steps, dtype=buffer.dtype, coefficients=coefficients)


def muon_scale(rows: int, columns: int) -> float:
    """Return sqrt(max(1, rows / columns)), the step's factor for a bank of (rows, columns) matrices.

    An orthogonal update of a tall matrix has smaller entries; the factor makes up for it.
    """
    return math.sqrt(max(1.0, rows / columns))


class Muon:
    """Muon on banks, each rank orthogonalising an equal share of every bank's matrices.

    step reads parameter.grad (this rank's gradient), averages it over the ranks, and updates the whole parameter. Its
    three parts leave room for other work while the messages between them fly: start, orthogonalize, apply.
    The momentum buffers hold this rank's share only: (ceil(N / world_size), r, c) in the update's type.
    """

    def __init__(self, banks: dict[str, nn.Parameter], config: TrainConfig, dist: Dist) -> None:
        self.banks, self.config, self.dist = banks, config, dist
        self.dtype = getattr(torch, config.newton_schulz_dtype)
        self.buffers = {
            name: torch.zeros(self._share(bank), *bank.shape[1:], dtype=self.dtype, device=bank.device)
            for name, bank in banks.items()
        }

    def _share(self, bank: Tensor) -> int:
        return -(-bank.size(0) // self.dist.world_size)

    def step(self, *, lr: float, momentum: float) -> None:
        """Apply one update with weight decay lr * matrix_weight_decay."""
        self.apply(self.orthogonalize(self.start(), momentum=momentum), lr=lr)

    @torch.no_grad()
    def start(self) -> list[Pending]:
        """Start averaging every bank's gradient over the ranks: a share (ceil(N / world_size), r, c) each."""
        shares = []
        for name, bank in self.banks.items():
            assert bank.grad is not None, name
            grad = bank.grad.to(self.dtype)
            missing = self._share(bank) * self.dist.world_size - bank.size(0)
            if missing:  # zeros stay zeros through Muon, and apply drops what comes of them
                grad = torch.cat((grad, grad.new_zeros(missing, *bank.shape[1:])))
            shares.append(self.dist.start_reduce_scatter_mean(grad))
        return shares

    @torch.no_grad()
    def orthogonalize(self, shares: list[Pending], *, momentum: float) -> list[Pending]:
        """Make each share an update and start gathering it while the next one is worked on."""
        updates, steps, coefficients = [], self.config.newton_schulz_steps, self.config.orthogonalization
        for buffer, share in zip(self.buffers.values(), shares, strict=True):
            update = muon_update(share.wait(), buffer, momentum=momentum, steps=steps, coefficients=coefficients)
            updates.append(self.dist.start_all_gather(update))
        return updates

    @torch.no_grad()
    def apply(self, updates: list[Pending], *, lr: float) -> None:
        """Decay every bank by lr * matrix_weight_decay and move it by its gathered update."""
        for bank, pending in zip(self.banks.values(), updates, strict=True):
            update = pending.wait()[: bank.size(0)]
            # decoupled decay, by the scheduled rate: it fades out together with the steps
            bank.mul_(1 - lr * self.config.matrix_weight_decay)
            bank.add_(update.to(bank.dtype), alpha=-lr * muon_scale(bank.size(-2), bank.size(-1)))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the whole momentum of every bank (all ranks must call): (world_size * share, r, c)."""
        return {name: self.dist.all_gather(buffer) for name, buffer in self.buffers.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take this rank's share of the momentum that state_dict returned."""
        for name, buffer in self.buffers.items():
            start = self.dist.rank * buffer.size(0)
            buffer.copy_(state[name][start : start + buffer.size(0)])


def split_parameters(model: nn.Module) -> tuple[dict[str, nn.Parameter], nn.Parameter, dict[str, nn.Parameter]]:
    """Return (banks by name, the embedding, everything else by name): the three optimizer groups."""
    named = dict(model.named_parameters())
    banks = {name: named.pop(name) for name in BANKS}
    embedding = named.pop(EMBEDDING_PARAMETER)
    return banks, embedding, named


MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class AdamW:
    """torch.optim.AdamW in its fused form, to the bit, by the function that it calls.

    To make or to step one of torch's own optimizers imports PyTorch's compiler, two seconds before training can start.
    param_groups: "params", "lr" and "weight_decay" of each. state: by parameter, as torch keeps it; "step" () float32,
    "exp_avg" and "exp_avg_sq" like the parameter, all on its device.
    """

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> None:
        self.param_groups, self.betas, self.eps = groups, betas, eps
        self.state: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)  # empty before a first step

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            grads = [parameter.grad for parameter in params]
            states = [self._state_of(parameter) for parameter in params]
            means, squares, steps = ([state[name] for state in states] for name in MOMENTS)
            adamw(
                params, grads, means, squares, [], steps,
                lr=group["lr"], weight_decay=group["weight_decay"], beta1=self.betas[0], beta2=self.betas[1],
                eps=self.eps, fused=True, amsgrad=False, maximize=False,
            )  # fmt: skip

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        if not self.state[parameter]:
            self.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return self.state[parameter]


class Optimizers:
    """The three optimizers of a run, stepped together with one learning-rate factor."""

    def __init__(self, model: nn.Module, config: TrainConfig, dist: Dist) -> None:
        self.config, self.dist = config, dist
        banks, self.embedding, vectors = split_parameters(model)
        self.vectors = list(vectors.values())
        self.muon = Muon(banks, config, dist)
        betas = (config.adam_beta1, config.adam_beta2)
        groups = [
            {"params": [self.embedding], "lr": config.embedding_lr, "weight_decay": config.embedding_weight_decay},
            {"params": self.vectors, "lr": config.vector_lr, "weight_decay": config.vector_weight_decay},
        ]
        self.adamw = AdamW(groups, betas=betas, eps=config.adam_eps)
        # the schedule multiplies these: to multiply a group's own rate would build up from step to step
        self.base_lrs = [config.embedding_lr, config.vector_lr]

    def step(self, *, lr_factor: float, momentum: float) -> None:
        """Average the gradients over the ranks and update every parameter, working while messages fly.

        The backward pass can hide none of them: clipping scales a gradient by its norm over all parameters, so the
        first number to be sent is known when the last one has been computed.
        """
        shares = self.muon.start()  # large messages first: orthogonalizing the first bank hides the others
        means = [self.dist.start_mean_(*collect_gradients(group)) for group in ([self.embedding], self.vectors)]
        updates = self.muon.orthogonalize(shares, momentum=momentum)
        for mean in means:
            mean.wait()
        for group, base_lr in zip(self.adamw.param_groups, self.base_lrs, strict=True):
            group["lr"] = base_lr * lr_factor
        self.adamw.step()  # its gradients came before any update; here it hides the gathering of the last one
        self.muon.apply(updates, lr=self.config.matrix_lr * lr_factor)

    def state_dict(self) -> dict[str, Tensor]:
        """Return every optimizer tensor under a flat name (all ranks must call)."""
        # AdamW's state by place, not by name: it is kept by parameter
        state = {f"muon/{name}": buffer for name, buffer in self.muon.state_dict().items()}
        for index, parameter in enumerate((self.embedding, *self.vectors)):
            for key, value in self.adamw.state[parameter].items():
                state[f"adamw/{index}/{key}"] = value
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what state_dict returned."""
        self.muon.load_state_dict({name: state[f"muon/{name}"] for name in self.muon.buffers})
        for index, parameter in enumerate((self.embedding, *self.vectors)):
            prefix = f"adamw/{index}/"
            self.adamw.state[parameter] = {
                key.removeprefix(prefix): value.to(parameter.device).clone()
                for key, value in state.items()
                if key.startswith(prefix)
            }
