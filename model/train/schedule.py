"""What changes during training as functions of schedule fraction or step: learning rate, looping, momentum."""

from __future__ import annotations

from model.config import TrainConfig


def schedule_frac(step: int, elapsed_s: float, config: TrainConfig) -> float:
    """Return how much of the schedule is over: of the wall-clock budget less the reserve, or of max_steps."""
    if config.budget_s is None:
        return step / config.max_steps
    # what quantization needs later is part of the same budget: training ends that much earlier
    return elapsed_s / (config.budget_s - config.reserve_s)


def lr_factor(frac: float, config: TrainConfig) -> float:
    """Return the factor on every learning rate: 1, then a straight line down to min_lr_frac at frac 1 and beyond."""
    if config.warmdown_frac <= 0 or frac < 1 - config.warmdown_frac:
        return 1.0
    return max((1 - frac) / config.warmdown_frac, config.min_lr_frac)


def muon_momentum(step: int, config: TrainConfig) -> float:
    """Return Muon's momentum at step (from 0): a straight line over muon_momentum_warmup_steps, then constant."""
    share = min(step / config.muon_momentum_warmup_steps, 1.0) if config.muon_momentum_warmup_steps > 0 else 1.0
    return (1 - share) * config.muon_momentum_start + share * config.muon_momentum


def is_looping(frac: float, config: TrainConfig) -> bool:
    """Return whether the repeated layers are visited again at this point of the schedule."""
    return frac >= config.loop_start_frac
