"""model/gpt.py: one forward for packs, windows and adapters, and what the initial weights are."""

import hashlib
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from model.banks import num_skips, visit_plan
from model.data.packing import Packing, pack_row
from model.gpt import GPT
from model.lora import GOLDEN, Adapters, Layout, adapter_widths, initial_a, mix_
from model.presets import published
from tests.micro_model import VOCAB_SIZE, micro_model, random_model

ADAPTED = ("q", "k", "v", "o", "mlp", "head")


def documents(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [
        torch.cat((torch.ones(1, dtype=torch.int64), torch.randint(4, VOCAB_SIZE, (n - 1,), generator=generator)))
        for n in lengths
    ]


def pack(parts: Iterable[Tensor]) -> tuple[Tensor, Packing]:
    row = torch.cat(list(parts))
    return row.unsqueeze(0), pack_row(row, max_segment=64)


def make_rows(model: GPT, slots: int, *, zero: bool = False) -> tuple[Layout, Tensor]:
    """Return random adapters of some documents, B zero where asked for, as rows of numbers with their layout."""
    generator = torch.Generator().manual_seed(11)
    layout = Layout(model.config, visit_plan(model.config, is_looped=True).num_visits, 2, ADAPTED)
    rows = torch.zeros(slots, layout.num_parameters, dtype=model.qo_bank.dtype)
    views = layout.view(rows)
    for tensors, scale in ((views.a, 0.2), (views.b, 0.0 if zero else 0.2)):
        for value in tensors.values():
            value.copy_(scale * torch.randn(value.shape, generator=generator))
    return layout, rows


def make_adapters(model: GPT, slots: int, *, zero: bool = False) -> Adapters:
    layout, rows = make_rows(model, slots, zero=zero)
    return layout.view(rows)


@pytest.mark.parametrize("is_looped", [False, True])
def test_a_documents_logits_do_not_depend_on_its_neighbors_or_its_place(is_looped: bool) -> None:
    model = random_model(dtype=torch.float64)
    parts = documents(9, 1, 17, 30)
    alone = [model(part.unsqueeze(0), is_looped=is_looped)[0] for part in parts]
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3]):
        row, packing = pack(parts[index] for index in order)
        logits = model(row, is_looped=is_looped, packing=packing)[0]
        expected = torch.cat([alone[index] for index in order])
        assert torch.allclose(logits, expected, rtol=0, atol=1e-12)


def test_packed_positions_as_published_agree_with_positions_per_segment() -> None:
    row, packing = pack(documents(9, 17, 30))
    by_segment = random_model(micro_model(), dtype=torch.float64)(row, is_looped=True, packing=packing)
    by_row = random_model(micro_model(rotary_positions="packed"), dtype=torch.float64)
    assert torch.allclose(by_row(row, is_looped=True, packing=packing), by_segment, rtol=0, atol=1e-12)


def test_a_later_token_changes_no_earlier_logits() -> None:
    model, (row,) = random_model(dtype=torch.float64), documents(20)
    other = row.clone()
    other[13] = 4 + (other[13] - 3) % (VOCAB_SIZE - 4)
    before, after = (model(tokens.unsqueeze(0), is_looped=True)[0] for tokens in (row, other))
    assert torch.equal(before[:13], after[:13])
    assert float((before[13:] - after[13:]).detach().abs().amax(dim=-1).min()) > 1e-6


@pytest.mark.parametrize("parallel_start_layer", [3, 4, 9])
@pytest.mark.parametrize("num_scored", [1, 5, 16])
def test_scoring_the_last_positions_equals_the_full_pass(num_scored: int, parallel_start_layer: int) -> None:
    model = random_model(micro_model(parallel_start_layer=parallel_start_layer))
    tokens = torch.stack(documents(16, 16, 16))
    targets = tokens.roll(-1, dims=1)
    with torch.no_grad():
        full = model(tokens, targets, is_looped=True, reduction="none")
        part = model(tokens, targets[:, -num_scored:], is_looped=True, num_scored=num_scored, reduction="none")
    assert torch.allclose(part, full[:, -num_scored:], rtol=0, atol=1e-5)


def test_scoring_the_last_positions_gives_adapters_the_full_pass_gradients() -> None:
    model = random_model(dtype=torch.float64).requires_grad_(False)
    tokens = torch.stack(documents(16, 16))
    targets = tokens.roll(-1, dims=1)
    gradients = []
    for num_scored in (None, 6):
        layout, rows = make_rows(model, 2)
        adapters = layout.view(rows.requires_grad_())
        columns = targets if num_scored is None else targets[:, -num_scored:]
        nll = model(tokens, columns, is_looped=True, adapters=adapters, num_scored=num_scored, reduction="none")
        gradients.append(layout.view(torch.autograd.grad(nll[:, -6:].mean(), rows)[0]).tensors())
    for full, part in zip(*gradients):
        assert float(full.abs().max()) > 0
        assert torch.allclose(part, full, rtol=0, atol=1e-13)


@pytest.mark.parametrize("num_scored", [None, 4])
def test_left_padding_changes_nothing(num_scored: int | None) -> None:
    model = random_model(dtype=torch.float64)
    parts, length = documents(7, 16, 11), 16
    rows = torch.stack([torch.cat((torch.zeros(length - part.numel(), dtype=torch.int64), part)) for part in parts])
    padding = torch.tensor([length - part.numel() for part in parts])
    layout, sets = make_rows(model, len(parts))
    logits = model(rows, is_looped=True, left_padding=padding, adapters=layout.view(sets), num_scored=num_scored)
    for slot, part in enumerate(parts):
        alone = model(part.unsqueeze(0), is_looped=True, adapters=layout.view(sets[slot : slot + 1]))[0]
        count = num_scored or part.numel()
        assert torch.allclose(logits[slot, -count:], alone[-count:], rtol=0, atol=1e-12)


def test_a_pack_with_padding_or_a_part_of_a_pack_is_a_programming_error() -> None:
    model, (row, packing) = random_model(), pack(documents(5, 6))
    with pytest.raises(AssertionError, match="a pack is scored whole"):
        model(row, is_looped=True, packing=packing, num_scored=3)


def test_zero_adapters_change_nothing() -> None:
    model = random_model()
    tokens = torch.stack(documents(12, 12))
    with torch.no_grad():
        plain = model(tokens, is_looped=True)
        adapted = model(tokens, is_looped=True, adapters=make_adapters(model, 2, zero=True))
    assert torch.equal(plain, adapted)


@pytest.mark.parametrize("kind", ADAPTED)
def test_every_kind_of_adapter_acts_and_on_its_own_document_only(kind: str) -> None:
    model = random_model(dtype=torch.float64)
    tokens = torch.stack(documents(10, 10))
    adapters = make_adapters(model, 2, zero=True)
    adapters.b[kind][1] = 0.3
    with torch.no_grad():
        change = model(tokens, is_looped=True, adapters=adapters) - model(tokens, is_looped=True)
    assert float(change[0].abs().max()) < 1e-13
    assert float(change[1].abs().max()) > 1e-4


def test_a_bf16_forward_keeps_activations_in_bf16_and_losses_in_float32() -> None:
    model = random_model(dtype=torch.float32)
    model.compute_dtype = torch.bfloat16
    seen: dict[str, torch.dtype] = {}
    for name, module in model.projections.items():
        module.register_forward_pre_hook(lambda _module, inputs, name=name: seen.__setitem__(name, inputs[0].dtype))
    row, packing = pack(documents(9, 12))
    loss = model(row, row, is_looped=True, packing=packing)
    assert len(seen) == 4 * 5 + 1
    assert set(seen.values()) == {torch.bfloat16}
    assert loss.dtype == torch.float32
    full = random_model()(row, row, is_looped=True, packing=packing)
    assert float(loss.detach()) == pytest.approx(float(full.detach()), rel=0.05)


def test_reductions_agree_and_calibration_hears_every_projection() -> None:
    model, (row, packing) = random_model(), pack(documents(9, 12))
    heard: list[str] = []
    for name, module in model.projections.items():
        module.register_forward_pre_hook(lambda _module, _inputs, name=name: heard.append(name))
    with torch.no_grad():
        model.visit(row, is_looped=True, packing=packing)
        visits = [f"layers_{i}_{kind}" for i in (0, 1, 2, 1, 2, 3, 4) for kind in ("qkv", "o", "up", "down")]
        assert sorted(heard) == sorted([*visits, "head"])
        nll, mean, total = (
            model(row, row, is_looped=True, packing=packing, reduction=how) for how in ("none", "mean", "sum")
        )
    assert nll.shape == (1, 21)
    assert float(mean) == pytest.approx(float(nll.mean()), rel=1e-6)
    assert float(total) == pytest.approx(float(nll.sum()), rel=1e-6)


# ---- the plan of visits ----------------------------------------------------------------------------------------------


def test_the_full_size_model_visits_17_layers_in_the_published_order() -> None:
    plan = visit_plan(published().model, is_looped=True)
    assert plan.encoder == (0, 1, 2, 3, 4, 5, 3, 4)
    assert plan.decoder == (5, 3, 4, 5, 6, 7, 8, 9, 10)
    assert (plan.num_visits, num_skips(published().model)) == (17, 8)
    plain = visit_plan(published().model, is_looped=False)
    assert (plain.encoder, plain.decoder) == ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9, 10))


def test_rows_of_skips_beyond_the_plain_plan_get_no_gradient() -> None:
    model, (row, packing) = random_model(), pack(documents(12))
    for is_looped, num_used in ((False, 2), (True, 3)):
        model.zero_grad()
        model(row, row, is_looped=is_looped, packing=packing).backward()
        assert model.skip_weights.grad is not None
        used = model.skip_weights.grad.abs().sum(dim=1) > 0
        assert used.tolist() == [True] * num_used + [False] * (model.skip_weights.size(0) - num_used)


def test_one_layer_alone_has_no_skip() -> None:
    config = micro_model(num_layers=1, xsa_last_n=1, loop_start=0, loop_end=0, num_loops=2, parallel_start_layer=0)
    model, (row, packing) = random_model(config, dtype=torch.float64), pack(documents(12))
    model(row, row, is_looped=False, packing=packing).backward()
    assert model.skip_weights.grad is None


# ---- initial weights -------------------------------------------------------------------------------------------------


def initial(seed: int) -> dict[str, Tensor]:
    model = GPT(micro_model())
    model.init_weights(seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_initial_matrices_are_orthogonal_and_outputs_are_zero() -> None:
    weights, eye = initial(42), torch.eye(32)
    for query in weights["qo_bank"][:5]:
        assert torch.allclose(query @ query.T, eye, atol=0.02)
    for matrix in weights["kv_bank"]:  # (16, 32)
        assert torch.allclose(matrix @ matrix.T, eye[:16, :16], atol=0.02)
    for matrix in weights["mlp_up_bank"]:  # (64, 32)
        assert torch.allclose(matrix.T @ matrix, eye, atol=0.02)
    assert not weights["qo_bank"][5:].any()
    assert not weights["mlp_down_bank"].any()


def test_initial_vectors_are_those_of_the_record() -> None:
    weights = initial(42)
    assert (weights["attn_scale"] == 1).all()
    assert (weights["mlp_scale"] == 1).all()
    assert (weights["resid_mix"][:, 0] == 1).all()
    assert (weights["resid_mix"][:, 1] == 0).all()
    assert (weights["q_gain"] == 5).all()
    assert (weights["skip_weights"] == 1).all()
    assert (weights["skip_gates"] == 0).all()
    assert float(weights["lane_merge"]) == 0.5


def test_initial_weights_are_rounded_to_bf16_once() -> None:
    for name, value in initial(42).items():
        assert torch.equal(value, value.bfloat16().float()), name


def test_the_seed_decides_every_drawn_tensor() -> None:
    first, again, other = initial(42), initial(42), initial(0)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
    for name in ("tok_emb.weight", "qo_bank", "kv_bank", "mlp_up_bank"):
        assert not torch.equal(first[name], other[name]), name


def test_the_number_of_threads_does_not_change_the_initial_weights() -> None:
    found = []
    for num_threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            model = GPT(published().model)  # small matrices are decomposed by one thread anyway
            model.init_weights(42)
            assert torch.get_num_threads() == num_threads
        finally:
            torch.set_num_threads(before)
        found.append(model.mlp_up_bank.detach())
    assert torch.equal(*found)


def test_the_loss_starts_at_the_entropy_of_a_uniform_guess() -> None:
    model = GPT(micro_model(embedding_init_std=0.005))
    model.init_weights(1)
    row, packing = pack(documents(30, 34))
    loss = model(row, row.roll(-1), is_looped=True, packing=packing)
    assert float(loss.detach()) == pytest.approx(torch.log(torch.tensor(float(VOCAB_SIZE))).item(), abs=0.02)


# ---- the adapters' starting values -----------------------------------------------------------------------------------


def test_starting_adapters_depend_on_seed_kind_visit_and_document_only() -> None:
    config = micro_model()

    def draw(seed: int = 1, document: int | None = None, kinds: tuple[str, ...] = ADAPTED) -> dict[str, Tensor]:
        return initial_a(config, num_visits=7, lora_rank=2, kinds=kinds, seed=seed, document=document)

    base = draw()
    assert all(torch.equal(value, draw(kinds=ADAPTED[::-1])[kind]) for kind, value in base.items())
    for other in (draw(seed=2), draw(document=0), draw(document=1)):
        assert not any(torch.equal(value, other[kind]) for kind, value in base.items())
    assert not torch.equal(base["q"][0], base["q"][1])
    assert max(float(value.abs().max()) for value in base.values()) <= config.model_dim**-0.5


def test_a_document_s_adapters_are_uniform_and_have_nothing_in_common() -> None:
    config = micro_model()

    def draw(document: int, seed: int = 1) -> Tensor:
        drawn = initial_a(config, num_visits=7, lora_rank=96, kinds=ADAPTED, seed=seed, document=document)
        return torch.cat([value.flatten() for value in drawn.values()]) * config.model_dim**0.5

    first = draw(0)
    assert float(first.mean()) == pytest.approx(0, abs=0.01)
    assert float(first.std()) == pytest.approx(3**-0.5, abs=0.01)
    assert float(first.abs().max()) <= 1
    assert first.unique().numel() > 0.99 * first.numel()
    for other in (draw(1), draw(2), draw(0, seed=2), first.roll(1), first.roll(96 * config.model_dim)):
        assert abs(float((first * other).mean())) < 0.01
        assert not (first == other).float().mean() > 0.001
    assert torch.equal(first, draw(0))


def test_a_document_s_numbers_are_those_of_splitmix64() -> None:
    key = 1234567  # the generator's published test sequence
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    states = torch.tensor([(key + i * GOLDEN) % (1 << 64) - (1 << 64) * ((key + i * GOLDEN) >> 63 & 1)
                           for i in range(1, 6)])  # fmt: skip
    assert [int(x) % (1 << 64) for x in mix_(states)] == wanted
    config, key = micro_model(), int.from_bytes(hashlib.sha256(b"adapter/1/document/5").digest()[:8], "big")
    drawn = initial_a(config, num_visits=7, lora_rank=2, kinds=("v", "q"), seed=1, document=5)
    for kind, place in (("q", 0), ("v", 2)):
        for visit, index in ((0, 0), (6, 63)):
            state = key + ((visit << 48) + (place << 32) + index + 1) * GOLDEN
            bits = int(mix_(torch.tensor([state % (1 << 64) - (1 << 64) * (state >> 63 & 1)]))[0]) % (1 << 64) >> 40
            value = (2 * bits / (1 << 24) - 1) * config.model_dim**-0.5
            assert float(drawn[kind][visit].flatten()[index]) == pytest.approx(value, abs=1e-7)


def test_adapters_of_the_seed_are_drawn_as_ever() -> None:
    drawn = initial_a(micro_model(), num_visits=7, lora_rank=2, kinds=("q", "head"), seed=1)
    name = b"adapter/1/q/3/"
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:7], "big"))
    bound = 32**-0.5
    assert torch.equal(drawn["q"][3], torch.rand(2, 32, generator=generator) * (2 * bound) - bound)
    assert drawn["head"].shape == (1, 2, 32)


def test_a_document_s_adapters_are_made_on_their_device_without_a_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("drawn one after the other on the CPU")

    monkeypatch.setattr(torch, "rand", refuse)
    drawn = initial_a(
        micro_model(), num_visits=7, lora_rank=2, kinds=ADAPTED, seed=1, document=5, device="meta"
    )  # a tensor that came from elsewhere could not be used there
    assert {value.device.type for value in drawn.values()} == {"meta"}


@pytest.mark.gpu
def test_a_document_s_adapters_are_the_same_bits_on_a_gpu() -> None:
    options = {"num_visits": 17, "lora_rank": 96, "kinds": ADAPTED, "seed": 1, "document": 7}
    config = published().model
    for kind, value in initial_a(config, **options, device="cuda").items():
        assert torch.equal(value.cpu(), initial_a(config, **options)[kind])


def test_adapters_have_the_widths_of_their_projections() -> None:
    config = micro_model()
    widths = {kind: adapter_widths(config, kind) for kind in ADAPTED}
    assert widths == {
        "q": (32, 32), "k": (32, 16), "v": (32, 16), "o": (32, 32), "mlp": (32, 32), "head": (32, VOCAB_SIZE),
    }  # fmt: skip
