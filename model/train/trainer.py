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
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.config import RuntimeConfig, TrainConfig
from model.data.loader import Batch, SpanLoader, prefetch_batches
from model.distributed import Dist
from model.gpt import GPT
from model.report import Interrupted, Report
from model.train.gradients import accumulate_gradients
from model.train.optim import Optimizers
from model.train.schedule import is_looping, lr_factor, muon_momentum, schedule_frac

if TYPE_CHECKING:  # the program of a run without checkpoints does without both
    from model.files.checkpoint import CheckpointStore
    from model.files.ledger import Ledger

Moment = float | torch.cuda.Event  # seconds on the host's clock, or a place in the work of a GPU
STEP_COLUMNS = ("step", "loss", "grad_norm", "lr_factor", "momentum", "is_looped", "elapsed_s", "tokens_per_s")
FINE = "fine"
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
    decay: float
    values: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.values = {name: p.detach().float().clone() for name, p in self.model.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Move every average by 1 - decay towards the present weight."""
        current = [p.detach().float() for p in self.model.parameters()]
        torch._foreach_lerp_(list(self.values.values()), current, 1 - self.decay)

    def cast(self) -> dict[str, Tensor]:
        """Return the averages in their parameters' types."""
        return {name: self.values[name].to(p.dtype) for name, p in self.model.named_parameters()}


class Reached(NamedTuple):
    """How far an earlier attempt came; steps behind its last checkpoint are lost, like those lost before."""

    step: int
    lost_steps: int


NOTHING_REACHED = Reached(0, 0)


class StepRow(NamedTuple):
    """One step whose loss and gradient norm may still be on their way from the device."""

    step: int
    values: Tensor  # (2,) loss, gradient norm
    frac: float
    elapsed_s: float
    began: Moment
    ended: Moment  # an event of a GPU once values are there


class Trainer:
    """State of one training run; run() is the loop."""

    def __init__(
        self,
        model: GPT,
        loader: SpanLoader,
        config: TrainConfig,
        dist: Dist,
        report: Report,
        *,
        runtime: RuntimeConfig | None = None,
        checkpoints: CheckpointStore | None = None,
        ledger: Ledger | None = None,
        reached: Reached = NOTHING_REACHED,
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
        self.checkpoints, self.should_stop, self.clock = checkpoints, should_stop, clock
        self.long_call = long_call  # around what may take long without a report
        self.ledger = ledger  # holds the spans of earlier attempts, which checkpoints carry on
        self.optimizers = Optimizers(model, config, dist)
        self.ema = Ema(model, config.ema_decay)
        self.parameters = list(model.parameters())
        self.step = 0  # steps done, and the number (from 0) of the next
        self.before_s = 0.0  # training seconds of earlier attempts
        self.paused_s = 0.0  # checkpoint writing since the loop began, not counted in the budget
        self.reached = reached
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
        every_s, elapsed = self.runtime.checkpoint_every_s, self.elapsed_s()
        is_due = self.checkpoints is not None and every_s > 0 and self.clock() - self.last_checkpoint >= every_s
        elapsed, stop, checkpoint = self.dist.broadcast_floats([elapsed, float(self.should_stop()), float(is_due)])
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
        self.optimizers.step(lr_factor=lr_factor(frac, self.config), momentum=muon_momentum(self.step, self.config))
        for parameter in self.parameters:
            parameter.grad = None  # not zeroed: the next backward then writes, and need not add
        self.ema.update()
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
            # pinned, so that the copy is one more entry in the device's queue and nobody waits
            host = torch.empty(2, dtype=torch.float32, pin_memory=True)
            values = host.copy_(values, non_blocking=True)
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
            muon_momentum(row.step, config),
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

    def _checkpoint(self) -> None:
        """Write everything a resumed run needs; the time it takes does not count in the budget."""
        self._drain()
        elapsed, paused = self.elapsed_s(), self.clock()
        attempts = self.ledger.attempts() if self.ledger is not None else []
        optimizer_state = self.optimizers.state_dict()  # all ranks: each holds a share of Muon's momentum
        if self.checkpoints is not None and self.dist.is_main:
            tensors = {f"optimizer/{name}": value for name, value in optimizer_state.items()}
            tensors |= {f"live/{name}": p.detach() for name, p in self.model.named_parameters()}
            tensors |= {f"ema/{name}": value for name, value in self.ema.values.items()}
            tensors |= {f"log/{name}": torch.tensor(column, dtype=torch.float64) for name, column in self.log.items()}
            tensors["rng"] = torch.get_rng_state()
            meta = {
                "elapsed_s": elapsed,
                "resumed_at": self.resumed_at,
                "attention": self.model.attention_backend,
                "attempts": attempts,
            }
            with self.long_call():
                self.checkpoints.save(self.step, tensors, meta)
        self.dist.barrier()  # so that waiting for rank 0's disk counts as a pause on every rank
        self.last_checkpoint = self.clock()
        self.paused_s += self.last_checkpoint - paused

    @torch.no_grad()
    def _resume(self) -> None:
        """Continue from the newest checkpoint that rank 0 finds undamaged, if there is one.

        Raises RuntimeError on every rank if another one cannot load that: going on from the one before, it would train
        other weights.
        """
        found = self._load_agreed()
        if found is None:
            self.lost_steps = self.reached.lost_steps + self.reached.step
            return
        tensors, meta = found
        for name, parameter in self.model.named_parameters():
            parameter.copy_(tensors[f"live/{name}"])
            self.ema.values[name].copy_(tensors[f"ema/{name}"])
        prefix = "optimizer/"
        self.optimizers.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        self.log = {name: tensors[f"log/{name}"].tolist() for name in STEP_COLUMNS}
        torch.set_rng_state(tensors["rng"])
        self.step, self.before_s = int(meta["step"]), float(meta["elapsed_s"])
        self.resumed_at = [*meta["resumed_at"], self.step]
        self.lost_steps = self.reached.lost_steps + max(0, self.reached.step - self.step)
        if self.ledger is not None:
            self.ledger.earlier = list(meta.get("attempts", []))
        if self.runtime.attention == "auto":  # whatever a stopwatch says today, a training stays with its kernel
            self.model.attention_backend = meta.get("attention", self.model.attention_backend)

    def _load_agreed(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return the checkpoint that rank 0 picked, on every rank; None where it has none."""
        if self.checkpoints is None:
            return None
        found = self.checkpoints.load_newest() if self.dist.is_main else None
        step = int(self.dist.broadcast_floats([-1.0 if found is None else float(found[1]["step"])])[0])
        if step < 0:
            return None
        problem = ""
        if not self.dist.is_main:
            try:
                found = self.checkpoints.load(step)
            except (ValueError, OSError, KeyError) as error:
                problem = f"rank {self.dist.rank} cannot load the checkpoint of step {step} as rank 0 did: {error!r}"
        problems = [text for text in self.dist.gather_text(problem or FINE) if text != FINE]
        if problems:
            raise RuntimeError(problem or f"a peer cannot go on: {problems[0]}")
        return found

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
