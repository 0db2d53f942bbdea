"""The training stage: one loop over optimizer steps, the same on one CPU core and on eight GPUs.

The host never waits for the device inside a step: losses are read two steps late, and the clock that drives a
wall-clock schedule is rank 0's, handed to all ranks.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.config import RuntimeConfig, TrainConfig
from model.data.loader import Batch, SpanLoader, prefetch_batches
from model.distributed import Dist
from model.gpt import GPT
from model.kernels.pace import queue_to_host
from model.report import Interrupted, Report
from model.train.gradients import accumulate_gradients
from model.train.optim import Optimizers
from model.train.schedule import ema_decay, is_looping, lr_factor, muon_momentum, schedule_frac

Moment = float | torch.cuda.Event  # seconds on the host's clock, or a place in the work of a GPU
STEP_COLUMNS = ("step", "loss", "grad_norm", "lr_factor", "momentum", "is_looped", "elapsed_s", "tokens_per_s")
RUN_AHEAD = 2  # steps the host may be ahead of the device


class Diverged(ValueError):
    """The loss is not finite any more; the same run would diverge again."""


class TrainResult(NamedTuple):
    """What training leaves: the averaged weights (each in its parameter's type), the step table, flat metrics."""

    ema: dict[str, Tensor]
    steps: dict[str, np.ndarray]
    metrics: dict[str, Any]


@dataclass(slots=True)
class Ema:
    """An exponential average of the weights in float32, starting as a copy of them."""

    model: GPT
    values: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.values = {name: p.detach().float().clone() for name, p in self.model.named_parameters()}

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move every average by 1 - decay towards the present weight."""
        current = [p.detach().float() for p in self.model.parameters()]
        torch._foreach_lerp_(list(self.values.values()), current, 1 - decay)

    def cast(self) -> dict[str, Tensor]:
        """Return the averages in their parameters' types."""
        return {name: self.values[name].to(p.dtype) for name, p in self.model.named_parameters()}


class StepRow(NamedTuple):
    """One step whose loss and gradient norm may still be on their way from the device."""

    step: int
    values: Tensor  # (2,) loss, gradient norm
    frac: float
    elapsed_s: float
    began: Moment
    ended: Moment  # an event of a GPU once values are there


class Trainer:
    """State of one training run in memory; run() is the loop. ResumableTrainer keeps it on disk too."""

    def __init__(
        self,
        model: GPT,
        loader: SpanLoader,
        config: TrainConfig,
        dist: Dist,
        report: Report,
        *,
        runtime: RuntimeConfig | None = None,
        should_stop: Callable[[], bool] = lambda: False,
        long_call: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if config.micro_batches_per_step % dist.world_size:
            raise ValueError(
                f"world size {dist.world_size} must divide the {config.micro_batches_per_step} micro-batches of a step "
                f"(train.batch_tokens / train.micro_batch_tokens)"
            )
        self.model, self.loader, self.config, self.dist, self.report = model, loader, config, dist, report
        self.runtime = runtime or RuntimeConfig()
        self.should_stop, self.clock = should_stop, clock
        self.long_call = long_call  # around what may take long without a report
        self.optimizers = Optimizers(model, config, dist)
        self.ema = Ema(model)
        self.parameters = list(model.parameters())
        self.step = 0  # steps done, and the number (from 0) of the next
        self.last_frac: float | None = None  # of the schedule, where the step before the next began
        self.before_s = 0.0  # training seconds of earlier attempts
        self.paused_s = 0.0  # checkpoint writing since the loop began, not counted in the budget
        self.resumed_at: list[int] = []
        self.lost_steps = 0
        self.pending: deque[StepRow] = deque()  # steps whose figures the device may not have yet
        self.log: dict[str, list[float]] = {name: [] for name in STEP_COLUMNS}
        self.started = self.last_checkpoint = self.last_report = self.clock()

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one step on this rank."""
        return self.config.micro_batches_per_step // self.dist.world_size

    def elapsed_s(self) -> float:
        """Return seconds spent in training, those before a resume included."""
        return self.before_s + self.clock() - self.started - self.paused_s

    def run(self) -> TrainResult:
        """Train to the end of the schedule.

        Raises Interrupted when told to stop, and Diverged, on every rank alike, once a loss is no number: on a GPU two
        steps later, for the host reads losses so late.
        """
        with self.long_call():
            self._resume()
        self._compare_ranks()
        # The clock starts here: neither setting up nor resuming counts in the budget.
        self.started = self.last_checkpoint = self.last_report = self.clock()
        batches = prefetch_batches(self._make_batch, self._span_indices(), pin_memory=self.dist.device.type == "cuda")
        with contextlib.closing(batches):
            while True:
                elapsed, wants_stop, wants_checkpoint = self._agree()
                frac = schedule_frac(self.step, elapsed, self.config)
                # at least one step is made, however small the budget: averages and log must not be empty
                if self.step >= self.config.max_steps or (self.config.budget_s is not None and frac >= 1 and self.step):
                    break
                # before a step, so that the checkpoint holds whole steps only
                if wants_stop or wants_checkpoint:
                    self._checkpoint()
                if wants_stop:
                    raise Interrupted(f"training stopped at step {self.step}")
                self._one_step(batches, frac, elapsed)
        return self._finish()

    def _agree(self) -> tuple[float, bool, bool]:
        """Return rank 0's elapsed time and its wish to stop or to write a checkpoint, on every rank."""
        # Ranks' clocks differ; were each to follow its own, one would leave the loop while others wait for it.
        wishes = [self.elapsed_s(), float(self.should_stop()), float(self._is_checkpoint_due())]
        elapsed, stop, checkpoint = self.dist.broadcast_floats(wishes)
        return elapsed, bool(stop), bool(checkpoint)

    def _span_indices(self) -> Iterator[int]:
        """Yield this rank's global span numbers from the present step on."""
        for step in range(self.step, self.config.max_steps):
            for micro in range(self.micro_batches):
                # by micro-batch first, then by rank: a step sees the same spans on any number of ranks
                yield step * self.config.micro_batches_per_step + micro * self.dist.world_size + self.dist.rank

    def _make_batch(self, index: int) -> Batch:
        seq_len = self.config.seq_len
        # max_seqlen is the published constant; entries beyond the next 64 would double varlen attention's time
        return self.loader.batch(index, max_segment=seq_len, max_seqlen=seq_len)

    def _one_step(self, batches: Iterator[Batch], frac: float, elapsed: float) -> None:
        """Forward, backward, clip, update and average; the loss is noted, not read."""
        began = self._now()
        loss, norm = accumulate_gradients(
            self.model,
            [next(batches).to(self.dist.device) for _ in range(self.micro_batches)],
            is_looped=is_looping(frac, self.config),
            clip=self.config.clip,
            max_norm=self.config.grad_clip_norm,
            dist=self.dist,
        )
        momentum = muon_momentum(self.step, frac, self.config)
        self.optimizers.step(lr_factor=lr_factor(frac, self.config), momentum=momentum)
        for parameter in self.parameters:
            parameter.grad = None  # not zeroed: the next backward then writes, and need not add
        self.ema.update(ema_decay(frac, frac if self.last_frac is None else self.last_frac, self.config))
        self.last_frac = frac
        self._note(self.dist.mean_(torch.stack((loss, norm)).float()), frac, elapsed, began)
        self.step += 1

    def _now(self) -> Moment:
        """Return this moment of the device's work: an event in the queue of a GPU, the time on a CPU."""
        if self.dist.device.type != "cuda":
            return self.clock()
        # the host's clock would tell when a step was queued, which is up to RUN_AHEAD steps earlier
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _note(self, values: Tensor, frac: float, elapsed: float, began: Moment) -> None:
        """Queue this step's figures and log those that the device has finished."""
        if values.is_cuda:
            values = queue_to_host(values)
        self.pending.append(StepRow(self.step, values, frac, elapsed, began, self._now()))
        while len(self.pending) > (RUN_AHEAD if self.dist.device.type == "cuda" else 0):
            self._log_row(self.pending.popleft())

    def _log_row(self, row: StepRow) -> None:
        took_s = seconds_between(row.began, row.ended)
        loss, norm = row.values.tolist()
        if not math.isfinite(loss):  # the mean over all ranks, so that they end together
            raise Diverged(self._describe_divergence(row, loss, norm))
        config = self.config
        rate = config.batch_tokens / took_s if took_s > 0 else 0.0
        values = (
            row.step + 1,
            loss,
            norm,
            lr_factor(row.frac, config),
            muon_momentum(row.step, row.frac, config),
            is_looping(row.frac, config),
            row.elapsed_s,
            rate,
        )
        for name, value in zip(STEP_COLUMNS, values, strict=True):
            self.log[name].append(value)
        if self.clock() - self.last_report >= self.runtime.report_every_s or row.step == 0:
            self.last_report = self.clock()
            self._report(row, loss, rate)

    def _describe_divergence(self, row: StepRow, loss: float, norm: float) -> str:
        last = f"{self.log['loss'][-1]:.4g}" if self.log["loss"] else "none before"
        factor = lr_factor(row.frac, self.config)
        return (
            f"training diverged: loss={loss} at step {row.step + 1} (last loss {last}, gradient norm {norm:.3g}, "
            f"lr factor {factor:.3g}); lower the learning rates train.matrix_lr={self.config.matrix_lr:g}, "
            f"embedding_lr={self.config.embedding_lr:g}, vector_lr={self.config.vector_lr:g}"
        )

    def _report(self, row: StepRow, loss: float, rate: float) -> None:
        left = max(0.0, row.elapsed_s / row.frac - row.elapsed_s) if row.frac > 0 else 0.0
        # with a budget nobody knows the number of steps: guessed from the part that is over
        total = self.config.max_steps if self.config.budget_s is None else int((row.step + 1) / max(row.frac, 1e-9))
        metrics = {
            "loss": loss,
            "tokens_per_s": rate,
            "eta_s": left,
            "elapsed_s": row.elapsed_s,
            "lost_steps": self.lost_steps,
        }
        self.report("train", row.step + 1, max(total, row.step + 1), metrics)

    def _drain(self) -> None:
        while self.pending:
            self._log_row(self.pending.popleft())

    def _is_checkpoint_due(self) -> bool:
        """Return whether this rank would write a checkpoint now."""
        return False

    def _checkpoint(self) -> None:
        """Keep what a later attempt needs: nothing, for a run that lives in memory."""

    def _resume(self) -> None:
        """Go on where an earlier attempt stopped: at the start."""

    def _compare_ranks(self) -> None:
        """Raise RuntimeError if the ranks do not begin with the same weights and averages."""
        live = {f"live/{name}": parameter for name, parameter in self.model.named_parameters()}
        averages = {f"ema/{name}": value for name, value in self.ema.values.items()}
        since = f"after the checkpoint of step {self.step}" if self.resumed_at else "after initialization"
        self.dist.require_same(live | averages, f"the ranks' weights differ {since}")

    def _finish(self) -> TrainResult:
        if self.dist.device.type == "cuda":
            torch.cuda.synchronize(self.dist.device)
        self._drain()
        train_s = self.elapsed_s()
        steps = {name: np.array(column) for name, column in self.log.items()}
        metrics: dict[str, Any] = {
            "steps": self.step,
            "train_s": train_s,
            "train_tokens": self.step * self.config.batch_tokens,
            "tokens_per_s": self.step * self.config.batch_tokens / train_s if train_s > 0 else 0.0,
            "train_loss_last": self.log["loss"][-1],
            "num_resumes": len(self.resumed_at),
            "resumed_at_steps": self.resumed_at,
            "lost_steps": self.lost_steps,
        }
        last = {"loss": metrics["train_loss_last"], "eta_s": 0.0, "lost_steps": self.lost_steps}
        self.report("train", self.step, self.step, last)
        return TrainResult(self.ema.cast(), steps, metrics)


def seconds_between(began: Moment, ended: Moment) -> float:
    """Return the seconds between two moments of a device's work, waiting for a GPU to come to the later one."""
    if isinstance(began, int | float) and isinstance(ended, int | float):
        return ended - began
    assert not isinstance(began, int | float)
    assert not isinstance(ended, int | float)
    ended.synchronize()
    return began.elapsed_time(ended) / 1000  # milliseconds
