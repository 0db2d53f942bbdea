"""model/distributed.py: real gangs of gloo processes give what one process gives."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from model.distributed import Dist, pick_device
from model.train.trainer import Trainer
from runner.errors import Failure, Kind
from runner.life.causes import is_consequence
from tests.gang_work import CLIPS, compute, run_gang
from tests.micro_model import ignore, micro_loader, micro_train, random_model

Figures = dict[str, np.ndarray]


class Gang(NamedTuple):
    """The same work by one process, and by the two ranks of a gang."""

    one: Figures
    two: list[Figures]


@pytest.fixture(scope="module")
def gang(tmp_path_factory: pytest.TempPathFactory) -> Gang:
    folder = tmp_path_factory.mktemp("gang")
    one = compute(Dist.single(), folder, "all")  # first, so that the shards are there
    return Gang(one, run_gang(2, folder, "all"))


@pytest.mark.parametrize("clip", ["per_micro_batch", "global"])
def test_two_ranks_train_as_one(gang: Gang, clip: str) -> None:
    losses = gang.one[f"{clip}/loss"]
    assert losses.shape == (20,)
    assert losses[-1] < losses[0] - 0.5  # it learns, so there is something to agree on
    assert np.abs(gang.two[0][f"{clip}/loss"] - losses).max() < 1e-4
    assert np.allclose(gang.two[0][f"{clip}/norm"], gang.one[f"{clip}/norm"], rtol=1e-3)
    for part in ("weights", "ema"):
        assert np.abs(gang.two[0][f"{clip}/{part}"] - gang.one[f"{clip}/{part}"]).max() < 2e-3


def test_clipping_per_rank_depends_on_the_number_of_ranks(gang: Gang) -> None:
    assert np.abs(gang.two[0]["per_rank/weights"] - gang.one["per_rank/weights"]).max() > 1e-3


@pytest.mark.parametrize("clip", CLIPS)
def test_all_ranks_hold_the_same_weights(gang: Gang, clip: str) -> None:
    assert np.array_equal(gang.two[0][f"{clip}/weights"], gang.two[1][f"{clip}/weights"])


def test_all_ranks_follow_rank_0s_clock_where_horizons_are_parts_of_a_budget(gang: Gang) -> None:
    expected = [0.92 + 0.05 * min(step / 10 / 0.5, 1.0) for step in range(10)]
    for rank in gang.two:
        assert rank["horizons/momentum"] == pytest.approx(expected)
        assert np.array_equal(rank["horizons/ema"], gang.two[0]["horizons/ema"])
    assert np.abs(gang.two[0]["horizons/ema"] - gang.one["horizons/ema"]).max() < 2e-3


def test_plain_evaluation_does_not_depend_on_the_number_of_ranks(gang: Gang) -> None:
    for rank in gang.two:
        assert np.array_equal(rank["plain"], gang.one["plain"])


@pytest.mark.parametrize("key", ["seed", "document"])
@pytest.mark.parametrize("is_adapting", [False, True])
def test_adaptation_does_not_depend_on_the_number_of_ranks(gang: Gang, key: str, is_adapting: bool) -> None:
    name = f"ttt/{key}/{is_adapting}"
    for rank in gang.two:
        assert np.abs(rank[name] - gang.one[name]).max() < 1e-12


def test_hessians_do_not_depend_on_the_number_of_ranks(gang: Gang) -> None:
    names = [name for name in gang.one if name.startswith("hessian/")]
    assert len(names) == 4 * 5 + 1
    for name in names:
        scale = np.abs(gang.one[name]).max()
        assert np.abs(gang.two[0][name] - gang.one[name]).max() < 1e-5 * scale, name


def test_every_collective_gives_every_rank_its_due(gang: Gang) -> None:
    table = np.arange(12, dtype=np.float32).reshape(4, 3) * 1.5  # the mean of factors 1 and 2
    for rank, figures in enumerate(gang.two):
        assert np.array_equal(figures["share"], table[2 * rank : 2 * rank + 2])
        assert figures["gathered"].tolist() == [[1, 1], [2, 2]]
        assert figures["sum"].tolist() == [3, 3]
        assert figures["mean"].tolist() == [1.5, 1.5]
        assert figures["floats"].tolist() == [1.0, 0.1]
        assert figures["rows"].tolist() == [[0, 0], [1, 1], [1, 1], [1, 1]]
        assert bool(figures["is_main"]) is (rank == 0)


def test_ranks_go_on_from_the_same_checkpoint(gang: Gang) -> None:
    for rank in gang.two:
        assert rank["calm/at"].tolist() == [4]
        assert np.array_equal(rank["calm/weights"], gang.two[0]["calm/weights"])
        assert rank["deaf 0/at"].tolist() == [3]  # rank 0 picks, and the others could read another one
        assert np.array_equal(rank["deaf 0/weights"], gang.two[0]["deaf 0/weights"])
    assert gang.one["deaf 0/at"].tolist() == [3]


def test_a_rank_that_cannot_read_rank_0s_checkpoint_ends_the_attempt_on_all(gang: Gang) -> None:
    own, other = (str(gang.two[rank]["deaf 1/error"]) for rank in (1, 0))
    assert own.startswith("rank 1 cannot load the checkpoint of step 4 as rank 0 did: OSError(5,")
    assert own in other
    failure = Failure(kind=Kind.RAISED, message=other, error_type="RuntimeError")
    assert is_consequence(failure)  # so that rank 1 is named


def test_ranks_that_hold_other_weights_are_told_so(gang: Gang) -> None:
    for rank in gang.two:
        assert rank["difference"] == "the ranks' weights differ: rank 1 holds other bits than rank 0 in other"


def test_a_gang_of_one_talks_to_nobody(gang: Gang) -> None:
    assert gang.one["share"].shape == (2, 3)
    assert gang.one["sum"].tolist() == [1, 1]
    assert gang.one["rows"].tolist() == [[0, 0]]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_eight_ranks_train_as_one(tmp_path: Path) -> None:
    one = compute(Dist.single(), tmp_path, "train")
    ranks = run_gang(8, tmp_path, "train")
    losses = one["per_micro_batch/loss"]
    for rank in ranks:
        assert np.abs(rank["per_micro_batch/loss"] - losses).max() < 1e-4
        assert np.array_equal(rank["per_micro_batch/weights"], ranks[0]["per_micro_batch/weights"])


def test_a_world_size_that_does_not_divide_the_micro_batches_is_refused(tmp_path: Path) -> None:
    dist = Dist(rank=0, world_size=3)
    with pytest.raises(ValueError, match="world size 3 must divide the 4 micro-batches"):
        Trainer(random_model(), micro_loader(tmp_path), micro_train(), dist, ignore)


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    dist = Dist.from_environment("cpu")
    assert (dist.rank, dist.world_size, dist.device) == (0, 1, torch.device("cpu"))


def test_a_cuda_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"runtime\.device='cuda' but no CUDA device is visible"):
        pick_device("cuda")
