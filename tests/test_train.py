"""model/train/trainer.py: gradients, averages, the clock, and a resumed run that equals an undisturbed one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.config import RuntimeConfig, TrainConfig
from model.distributed import Dist
from model.files.checkpoint import CheckpointStore
from model.files.ledger import Ledger
from model.gpt import GPT
from model.report import Interrupted
from model.train.gradients import accumulate_gradients, clip_, collect_gradients
from model.train.resumable import Reached, ResumableTrainer
from model.train.trainer import Diverged, Ema, Trainer, TrainResult, seconds_between
from tests.micro_model import ignore, micro_loader, micro_train, random_model

EVERY_STEP = RuntimeConfig(device="cpu", checkpoint_every_s=1e-9, report_every_s=0.0)


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def start(folder: Path, config: TrainConfig, **options: Any) -> Trainer:
    """Return a trainer of a fresh micro model; the same call gives the same trainer."""
    model = GPT(random_model().config)
    model.init_weights(4)
    model.tok_emb.weight.data = model.tok_emb.weight.data.to(getattr(torch, config.embedding_dtype))
    report = options.pop("report", ignore)
    loader, store = micro_loader(folder, config=config), options.pop("checkpoints", None)
    return ResumableTrainer(model, loader, config, Dist.single(), report, checkpoints=store, **options)


def stop_after(steps: int) -> Callable[[], bool]:
    """Return a should_stop that says yes when it is asked before step number `steps` (from 0)."""
    asked = iter(range(1_000_000))
    return lambda: next(asked) >= steps


def outcome(trainer: Trainer, result: TrainResult) -> dict[str, Any]:
    live = {f"live/{name}": parameter.detach() for name, parameter in trainer.model.named_parameters()}
    return live | {f"ema/{name}": value for name, value in result.ema.items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


# ---- one step --------------------------------------------------------------------------------------------------------


def batches(folder: Path, count: int) -> list[Any]:
    loader = micro_loader(folder)
    return [loader.batch(index, max_segment=32) for index in range(count)]


def single_gradients(model: GPT, batch: Any) -> list[torch.Tensor]:
    model.zero_grad()
    model(batch.inputs, batch.targets, is_looped=True, packing=batch.packing).backward()
    return [grad.clone() for grad in collect_gradients(model.parameters())]


def test_per_micro_batch_clips_each_and_averages(tmp_path: Path) -> None:
    model, three = random_model(), batches(tmp_path, 3)
    each = [single_gradients(model, batch) for batch in three]
    norms = [float(clip_(grads, 0.3)) for grads in each]
    expected = [sum(parts) / 3 for parts in zip(*each)]
    model.zero_grad()
    _, norm = accumulate_gradients(
        model, three, is_looped=True, clip="per_micro_batch", max_norm=0.3, dist=Dist.single()
    )
    assert float(norm) == pytest.approx(np.mean(norms), rel=1e-5)
    for grad, wanted in zip(collect_gradients(model.parameters()), expected):
        assert torch.allclose(grad, wanted, atol=1e-7)


@pytest.mark.parametrize("clip", ["per_rank", "global"])
def test_per_rank_and_global_clip_the_mean(tmp_path: Path, clip: str) -> None:
    model, three = random_model(), batches(tmp_path, 3)
    expected = [sum(parts) / 3 for parts in zip(*(single_gradients(model, batch) for batch in three))]
    wanted_norm = float(clip_(expected, 0.3))
    model.zero_grad()
    loss, norm = accumulate_gradients(model, three, is_looped=True, clip=clip, max_norm=0.3, dist=Dist.single())
    losses = [model(b.inputs, b.targets, is_looped=True, packing=b.packing).item() for b in three]
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-6)
    assert float(norm) == pytest.approx(wanted_norm, rel=1e-5)
    for grad, wanted in zip(collect_gradients(model.parameters()), expected):
        assert torch.allclose(grad, wanted, atol=1e-7)


def test_the_average_starts_at_the_weights_and_follows_its_formula() -> None:
    model = random_model()
    model.tok_emb.weight.data = model.tok_emb.weight.data.bfloat16()
    ema, expected = Ema(model), {name: p.detach().float().clone() for name, p in model.named_parameters()}
    for step in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * (step + 1))
        ema.update(0.9)
        for name, parameter in model.named_parameters():
            expected[name] = 0.9 * expected[name] + 0.1 * parameter.detach().float()
    for name, value in ema.values.items():
        assert value.dtype == torch.float32
        assert torch.allclose(value, expected[name], atol=1e-5), name
    assert ema.cast()["tok_emb.weight"].dtype == torch.bfloat16


# ---- a whole run -----------------------------------------------------------------------------------------------------


def test_training_learns_and_its_table_has_a_row_a_step(tmp_path: Path) -> None:
    heard: list[tuple[int, int | None]] = []
    runtime = RuntimeConfig(device="cpu", report_every_s=0.0)
    trainer = start(
        tmp_path,
        micro_train(max_steps=12),
        runtime=runtime,
        report=lambda _p, step, total, _m: heard.append((step, total)),
    )
    result = trainer.run()
    assert result.steps["step"].tolist() == list(range(1, 13))
    assert result.steps["loss"][-1] < result.steps["loss"][0] - 0.3
    assert result.steps["is_looped"].tolist() == [step / 12 >= 0.35 for step in range(12)]
    assert result.metrics["steps"] == 12
    assert result.metrics["train_tokens"] == 12 * 256
    assert result.metrics["train_loss_last"] == result.steps["loss"][-1]
    assert heard == [*((step, 12) for step in range(1, 13)), (12, 12)]


def test_two_runs_are_bit_identical(tmp_path: Path) -> None:
    trainers = [start(tmp_path, micro_train(max_steps=4)) for _ in range(2)]
    first, second = (outcome(trainer, trainer.run()) for trainer in trainers)
    assert same(first, second)


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
def test_a_resumed_run_is_bit_identical_to_an_undisturbed_one(tmp_path: Path, dtypes: str) -> None:
    config = micro_train(max_steps=7, newton_schulz_dtype=dtypes, embedding_dtype=dtypes)
    undisturbed = start(tmp_path, config)
    expected = outcome(undisturbed, undisturbed.run())
    store = CheckpointStore(tmp_path / "checkpoints")
    with pytest.raises(Interrupted, match="stopped at step 3"):
        start(tmp_path, config, checkpoints=store, should_stop=stop_after(3)).run()
    with pytest.raises(Interrupted, match="stopped at step 5"):
        start(tmp_path, config, checkpoints=store, should_stop=stop_after(2)).run()
    resumed = start(tmp_path, config, checkpoints=store)
    result = resumed.run()
    assert same(outcome(resumed, result), expected)
    assert (result.metrics["num_resumes"], result.metrics["resumed_at_steps"]) == (2, [3, 5])
    assert result.metrics["lost_steps"] == 0
    assert result.steps["step"].tolist() == list(range(1, 8))


HORIZONS = {"ema_horizon_frac": 0.3, "muon_momentum_warmup_frac": 0.4, "orthogonalization": "polar_express"}


@pytest.mark.parametrize("budget_s", [None, 100.0])
def test_horizons_as_parts_of_the_schedule_survive_a_resume_bit_for_bit(tmp_path: Path, budget_s: float | None) -> None:
    config = micro_train(max_steps=9, budget_s=budget_s, reserve_s=12.0, **HORIZONS)
    undisturbed, _ = timed(tmp_path, config, seconds_per_step=10.0)
    expected = outcome(undisturbed, undisturbed.run())
    store = CheckpointStore(tmp_path / "checkpoints")
    for steps in (1, 3):
        stopped, _ = timed(tmp_path, config, seconds_per_step=10.0, checkpoints=store, should_stop=stop_after(steps))
        with pytest.raises(Interrupted):
            stopped.run()
    resumed, _ = timed(tmp_path, config, seconds_per_step=10.0, checkpoints=store)
    result = resumed.run()
    assert result.metrics["resumed_at_steps"] == [1, 4]
    assert same(outcome(resumed, result), expected)


def test_with_a_budget_the_average_and_the_momentum_follow_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets = {"budget_s": 100.0, "reserve_s": 0.0}
    config = micro_train(max_steps=1000, **budgets, ema_horizon_frac=0.25, muon_momentum_warmup_frac=0.4)
    trainer, _ = timed(tmp_path, config, seconds_per_step=5.0)
    decays: list[float] = []
    monkeypatch.setattr(Ema, "update", lambda _ema, decay: decays.append(decay))
    result = trainer.run()
    assert decays == pytest.approx([1.0] + [1 - 0.05 / 0.25] * 19)
    shares = [min(0.05 * step / 0.4, 1.0) for step in range(20)]
    assert result.steps["momentum"].tolist() == pytest.approx([0.92 + 0.05 * share for share in shares])


def test_a_truncated_newest_checkpoint_costs_its_steps_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = micro_train(max_steps=6)
    undisturbed = start(tmp_path, config)
    expected = outcome(undisturbed, undisturbed.run())
    store = CheckpointStore(tmp_path / "checkpoints")
    with pytest.raises(Interrupted):
        start(tmp_path, config, checkpoints=store, runtime=EVERY_STEP, should_stop=stop_after(4)).run()
    assert store.steps() == [3, 4]
    newest = tmp_path / "checkpoints" / "step-0000004.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    resumed = start(tmp_path, config, checkpoints=store, reached=Reached(4, 2))
    result = resumed.run()
    assert "checkpoint of step 4 ignored" in caplog.text
    assert same(outcome(resumed, result), expected)
    assert result.metrics["resumed_at_steps"] == [3]
    assert result.metrics["lost_steps"] == 3  # one now, two before


def test_without_a_checkpoint_everything_reached_is_lost(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    result = start(tmp_path, micro_train(max_steps=2), checkpoints=store, reached=Reached(5, 1)).run()
    assert (result.metrics["lost_steps"], result.metrics["num_resumes"]) == (6, 0)


def test_told_to_stop_before_the_first_step_it_still_leaves_a_checkpoint(tmp_path: Path) -> None:
    config, store = micro_train(max_steps=2), CheckpointStore(tmp_path / "checkpoints")
    with pytest.raises(Interrupted, match="step 0"):
        start(tmp_path, config, checkpoints=store, should_stop=lambda: True).run()
    assert store.steps() == [0]
    undisturbed, resumed = start(tmp_path, config), start(tmp_path, config, checkpoints=store)
    assert same(outcome(undisturbed, undisturbed.run()), outcome(resumed, resumed.run()))


@pytest.mark.parametrize("broken", ["learning rates", "one loss"])
def test_a_loss_that_is_no_number_ends_training_at_its_step(tmp_path: Path, broken: str) -> None:
    rates = {"matrix_lr": 1e6, "embedding_lr": 1e6, "vector_lr": 1e6} if broken == "learning rates" else {}
    store = CheckpointStore(tmp_path / "checkpoints")
    trainer = start(tmp_path, micro_train(max_steps=40, **rates), checkpoints=store, runtime=EVERY_STEP)
    if not rates:
        trainer.model.register_forward_hook(lambda *_: torch.tensor(torch.inf) if trainer.step == 3 else None)
        trainer.model.register_forward_hook(lambda _m, _i, loss: loss.requires_grad_())
    with pytest.raises(Diverged, match=r"training diverged: loss=(nan|inf) at step (\d+) .*lower the learning rates"):
        trainer.run()
    assert trainer.step < 20
    assert np.isfinite(trainer.log["loss"]).all()
    assert store.steps()[-1] <= trainer.step  # no checkpoint of what is broken
    assert issubclass(Diverged, ValueError)  # the runner tries no ValueError again


# ---- the wall clock --------------------------------------------------------------------------------------------------


def timed(folder: Path, config: TrainConfig, *, seconds_per_step: float, **options: Any) -> tuple[Trainer, Clock]:
    """Return a trainer whose every step takes that long on its own clock."""
    clock = Clock()
    trainer = start(folder, config, clock=clock, **options)
    share = seconds_per_step / config.micro_batches_per_step

    def pass_time(*_arguments: Any) -> None:
        clock.now += share

    trainer.model.register_forward_hook(pass_time)
    return trainer, clock


def test_the_budget_less_the_reserve_is_spent_and_the_stop_comes_after_a_step(tmp_path: Path) -> None:
    config = micro_train(max_steps=1000, budget_s=100.0, reserve_s=12.0)
    trainer, _ = timed(tmp_path, config, seconds_per_step=10.0)
    result = trainer.run()
    assert result.metrics["steps"] == 9  # 80 s are below 88, 90 are not
    assert result.metrics["train_s"] == pytest.approx(90.0)
    assert result.steps["elapsed_s"].tolist() == pytest.approx([10.0 * step for step in range(9)])
    assert result.steps["is_looped"].tolist() == [10 * step / 88 >= 0.35 for step in range(9)]
    factors = [min(1.0, (1 - 10 * step / 88) / 0.667) for step in range(9)]
    assert result.steps["lr_factor"].tolist() == pytest.approx(factors)
    assert result.steps["tokens_per_s"].tolist() == pytest.approx([25.6] * 9)


def test_the_speed_of_a_step_is_its_own_whatever_comes_between_steps(tmp_path: Path) -> None:
    config, store = micro_train(max_steps=6), CheckpointStore(tmp_path / "checkpoints")
    clock = Clock()

    def run(**options: Any) -> TrainResult:
        trainer = start(tmp_path, config, clock=clock, checkpoints=store, runtime=EVERY_STEP, **options)

        def pass_time(*_arguments: Any) -> None:
            clock.now += (trainer.step + 1) / config.micro_batches_per_step  # step n takes n seconds

        trainer.model.register_forward_hook(pass_time)
        return trainer.run()

    def take_long(_path: Path) -> None:
        clock.now += 500.0

    store.on_write = take_long
    with pytest.raises(Interrupted):
        run(should_stop=stop_after(3))
    result = run()
    assert result.steps["tokens_per_s"].tolist() == pytest.approx([256 / n for n in range(1, 7)])


class FakeEvent:
    """A place in a GPU's work, of which the time is known once somebody has waited for it."""

    def __init__(self, at_ms: float) -> None:
        self.at_ms, self.is_there = at_ms, False

    def synchronize(self) -> None:
        self.is_there = True

    def elapsed_time(self, later: FakeEvent) -> float:
        assert later.is_there
        return later.at_ms - self.at_ms


def test_on_a_gpu_a_step_lasts_from_event_to_event() -> None:
    began, ended = FakeEvent(1000.0), FakeEvent(1250.0)
    assert seconds_between(began, ended) == pytest.approx(0.25)  # type: ignore[arg-type]


def test_a_checkpoint_keeps_the_spans_of_every_attempt_before_it(tmp_path: Path) -> None:
    config, store = micro_train(max_steps=6), CheckpointStore(tmp_path / "checkpoints")
    for number, steps in enumerate((2, 2)):
        ledger = Ledger("train")
        with ledger.span("warm_up"):
            pass
        with pytest.raises(Interrupted), ledger.span("steps"):
            start(tmp_path, config, checkpoints=store, ledger=ledger, should_stop=stop_after(steps)).run()
        assert len(ledger.earlier) == number
    ledger = Ledger("train")
    with ledger.span("steps"):
        result = start(tmp_path, config, checkpoints=store, ledger=ledger).run()
    assert [[span["name"] for span in part["spans"]] for part in ledger.earlier] == [["warm_up", "steps"]] * 2
    spans = [span for part in [*ledger.earlier, ledger.as_json()] for span in part["spans"] if span["name"] == "steps"]
    assert sum(span["end_s"] - span["start_s"] for span in spans) >= result.metrics["train_s"]


def test_a_resumed_training_keeps_its_attention_kernel(tmp_path: Path) -> None:
    config, store = micro_train(max_steps=4), CheckpointStore(tmp_path / "checkpoints")
    before = start(tmp_path, config, checkpoints=store, should_stop=stop_after(2))
    before.model.attention_backend = "sdpa"
    with pytest.raises(Interrupted):
        before.run()
    after = start(tmp_path, config, checkpoints=store)
    assert after.model.attention_backend == "auto"
    after.run()
    assert after.model.attention_backend == "sdpa"
    named = start(tmp_path, config, checkpoints=store, runtime=RuntimeConfig(device="cpu", attention="varlen"))
    named.model.attention_backend = "varlen"
    named._resume()
    assert named.model.attention_backend == "varlen"  # whoever names a kernel gets it


def test_at_least_one_step_is_made(tmp_path: Path) -> None:
    config = micro_train(max_steps=1000, budget_s=5.0, reserve_s=1.0)
    trainer, _ = timed(tmp_path, config, seconds_per_step=50.0)
    assert trainer.run().metrics["steps"] == 1


def test_writing_checkpoints_is_no_part_of_the_budget(tmp_path: Path) -> None:
    config = micro_train(max_steps=1000, budget_s=100.0, reserve_s=12.0)
    store = CheckpointStore(tmp_path / "checkpoints")
    runtime = replace(EVERY_STEP, checkpoint_every_s=15.0)
    trainer, clock = timed(tmp_path, config, seconds_per_step=10.0, checkpoints=store, runtime=runtime)
    written: list[str] = []

    def take_long(path: Path) -> None:
        clock.now += 500.0
        written.append(path.name)

    store.on_write = take_long
    result = trainer.run()
    assert result.metrics["steps"] == 9
    assert [name for name in written if name.endswith(".json")] == [f"step-000000{n}.json" for n in (2, 4, 6, 8)]


def test_a_resumed_run_goes_on_in_the_budget_where_it_stopped(tmp_path: Path) -> None:
    config = micro_train(max_steps=1000, budget_s=100.0, reserve_s=12.0)
    store = CheckpointStore(tmp_path / "checkpoints")
    stopped, _ = timed(tmp_path, config, seconds_per_step=10.0, checkpoints=store, should_stop=stop_after(4))
    with pytest.raises(Interrupted):
        stopped.run()
    resumed, _ = timed(tmp_path, config, seconds_per_step=10.0, checkpoints=store)
    result = resumed.run()
    assert result.metrics["steps"] == 9
    assert result.metrics["train_s"] == pytest.approx(90.0)
