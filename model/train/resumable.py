"""Training that goes on after a fault: its whole state in checkpoints, the newest sound one taken up by all ranks.

A module of its own, for the generated program trains in memory and does without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from model.files.checkpoint import CheckpointStore
from model.files.ledger import Ledger
from model.train.schedule import schedule_frac
from model.train.trainer import STEP_COLUMNS, Trainer

FINE = "fine"


class Reached(NamedTuple):
    """How far an earlier attempt came; steps behind its last checkpoint are lost, like those lost before."""

    step: int
    lost_steps: int


NOTHING_REACHED = Reached(0, 0)


class ResumableTrainer(Trainer):
    """A trainer that writes checkpoints and begins with the newest; without a store it only notes what was lost.

    ledger holds the spans of earlier attempts, which checkpoints carry on. bring(files) is called on all ranks
    with the sha256 of rank 0's files by their path: after it every host has them.
    """

    def __init__(
        self,
        *arguments: Any,
        checkpoints: CheckpointStore | None,
        ledger: Ledger | None = None,
        reached: Reached = NOTHING_REACHED,
        bring: Callable[[Mapping[Path, str]], None] = lambda _files: None,
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.checkpoints, self.ledger, self.reached = checkpoints, ledger, reached
        self.bring = bring

    def _is_checkpoint_due(self) -> bool:
        every_s = self.runtime.checkpoint_every_s
        return self.checkpoints is not None and every_s > 0 and self.clock() - self.last_checkpoint >= every_s

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
        # the budget goes on where the checkpoint was written: time behind it was lost with its steps
        self.step, self.before_s = int(meta["step"]), float(meta["elapsed_s"])
        if self.step:
            self.last_frac = schedule_frac(self.step - 1, self.log["elapsed_s"][-1], self.config)
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
        # Rank 0 alone picks: were each rank to take the newest that it can read, they could go on from different steps.
        found = self.checkpoints.load_newest() if self.dist.is_main else None
        step = int(self.dist.broadcast_floats([-1.0 if found is None else float(found[1]["step"])])[0])
        if step < 0:
            return None
        self.bring(self.checkpoints.hash_files(step) if self.dist.is_main else {})
        problem = ""
        if not self.dist.is_main:
            try:
                found = self.checkpoints.load(step)
            except (ValueError, OSError, KeyError) as error:
                problem = f"rank {self.dist.rank} cannot load the checkpoint of step {step} as rank 0 did: {error!r}"
        # Everyone hears of everyone's failure, so that all ranks raise instead of one leaving the others to wait.
        problems = [text for text in self.dist.gather_text(problem or FINE) if text != FINE]
        if problems:
            raise RuntimeError(problem or f"a peer cannot go on: {problems[0]}")
        return found
