"""What changes during training as functions of schedule fraction or step: learning rate, looping, momentum, average."""

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


def muon_momentum(step: int, frac: float, config: TrainConfig) -> float:
    """Return Muon's momentum at step (from 0): a straight line over the warm-up, then constant.

    The warm-up is muon_momentum_warmup_frac of the schedule where that is set, else muon_momentum_warmup_steps.
    """
    reached, whole = float(step), float(config.muon_momentum_warmup_steps)
    if config.muon_momentum_warmup_frac is not None:
        reached, whole = frac, config.muon_momentum_warmup_frac
    share = min(reached / whole, 1.0) if whole > 0 else 1.0
    return (1 - share) * config.muon_momentum_start + share * config.muon_momentum


def ema_decay(frac: float, last_frac: float, config: TrainConfig) -> float:
    """Return what the average keeps at a step that began at frac, the one before it at last_frac.

    With ema_horizon_frac a step replaces its own part of the schedule over the horizon, so that what is left of old
    weights depends on how much of the schedule has gone since, not on the number of steps. A schedule in steps gives
    1 - 1 / (ema_horizon_frac * max_steps). With a budget nobody knows how long this step will take: it counts like
    the one before it, and the first one not at all.
    """
    if config.ema_horizon_frac is None:
        return config.ema_decay
    if config.budget_s is None:
        return 1 - 1 / max(config.ema_horizon_frac * config.max_steps, 1.0)
    return 1 - min((frac - last_frac) / config.ema_horizon_frac, 1.0)


def is_looping(frac: float, config: TrainConfig) -> bool:
    """Return whether the repeated layers are visited again at this point of the schedule."""
    return frac >= config.loop_start_frac
