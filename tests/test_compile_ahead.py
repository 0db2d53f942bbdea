"""Kernels compiled ahead: each kind once, apart from the process that launches them, and all that the stages launch."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.data.loader import inputs_and_targets
from model.data.packing import pack_row
from model.distributed import Dist
from model.files.ledger import Ledger, covered_s
from model.gpt import GPT
from model.kernels import compile_ahead as launching
from model.kernels.compile_ahead import compiling_ahead
from model.kernels.launch import launch, listeners
from model.pipeline import rehearsal as compile_ahead
from model.pipeline.compile_clock import noting_compilation
from model.pipeline.rehearsal import compile_kernels
from model.pipeline.run import Run
from model.presets import bench_500
from model.score.plain import RowScorer, evaluate_plain
from model.ttt.documents import score_documents
from tests.micro_model import ignore, micro_bytes, micro_run, micro_validation

CPU = torch.device("cpu")


class FakeKernel:
    """A kernel whose compiler's cache is a folder: it notes which process compiled, loaded and launched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, _grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.launched.append((args, options))

    def warmup(self, *args: Any, grid: tuple[int, ...], **options: Any) -> Any:
        """Compile unless that is done."""
        assert grid == (3,)
        name = "-".join(str(x.dtype) if isinstance(x, Tensor) else str(x) for x in (*args, *options.values()))
        path = self.folder / name
        if not path.exists():
            if options.get("BLOCK") == "broken":
                raise RuntimeError("no such instruction")
            if options.get("BLOCK") == "dying" and os.getpid() != self.parent:
                os.kill(os.getpid(), signal.SIGKILL)
            if options.get("BLOCK") == "hanging" and os.getpid() != self.parent:
                (self.folder / "hanging").write_text(str(os.getpid()))
                time.sleep(60)
            path.write_text(str(os.getpid()))
        return {grid: None}

    parent = os.getpid()
    cache_key = "source"


class FakeCache:
    """Triton's cache on disk: a folder by the name of a hash."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get_file(self, name: str) -> str | None:
        """Return where a file is, if it is there."""
        path = self.folder / name
        return str(path) if path.exists() else None

    def put(self, data: bytes, name: str) -> None:
        """Write a file."""
        self.folder.mkdir(parents=True)
        (self.folder / name).write_bytes(data)


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKernel]:
    """A kernel, and as much of Triton as compiling ahead touches."""
    driver = types.SimpleNamespace(active=types.SimpleNamespace(get_current_target=lambda: "hopper"))
    driver.set_active = lambda helper: setattr(driver, "active", helper)
    runtime = types.ModuleType("triton.runtime")
    runtime.driver = driver  # type: ignore[attr-defined]
    triton, cache = types.ModuleType("triton"), types.ModuleType("triton.runtime.cache")
    triton.__version__ = "3"  # type: ignore[attr-defined]
    cache.get_cache_manager = lambda key: FakeCache(tmp_path / "marks" / key)  # type: ignore[attr-defined]
    for module in (triton, runtime, cache):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _device: None)
    yield FakeKernel(tmp_path)
    assert not listeners
    assert not launching._inherited


def compiled_by(kernel: FakeKernel) -> dict[str, int]:
    """Return the process that compiled each kind."""
    found = {path.name: int(path.read_text()) for path in kernel.folder.iterdir() if path.is_file()}
    found.pop("hanging", None)
    return found


def test_a_launch_is_a_launch(kernel: FakeKernel) -> None:
    launch(kernel, (3,), 1, 2.0, BLOCK=64)
    assert kernel.launched == [((1, 2.0), {"BLOCK": 64})]
    assert not compiled_by(kernel)


def test_ahead_each_kind_is_compiled_once_and_elsewhere(kernel: FakeKernel) -> None:
    x, narrow = torch.zeros(8), torch.zeros(8, dtype=torch.bfloat16)
    with compiling_ahead(CPU, 2):
        launch(kernel, (3,), x, 32, BLOCK=64)
        launch(kernel, (3,), x, 160, BLOCK=64)  # a multiple of 16 as well
        launch(kernel, (3,), x, 33, BLOCK=64)
        launch(kernel, (3,), x, 1, BLOCK=64)
        launch(kernel, (3,), x, 32, BLOCK=128)
        launch(kernel, (3,), narrow, 32, BLOCK=64)
        launch(kernel, (3,), x[1:], 32, BLOCK=64)  # not aligned to 16 bytes; one file with the first
    found = compiled_by(kernel)
    assert sorted(found) == sorted([
        "torch.float32-32-64", "torch.float32-33-64", "torch.float32-1-64", "torch.float32-32-128",
        "torch.bfloat16-32-64",
    ])  # fmt: skip
    assert os.getpid() not in found.values()
    assert not kernel.launched


def test_what_is_known_to_be_compiled_is_only_loaded(kernel: FakeKernel) -> None:
    for _ in range(2):
        with compiling_ahead(CPU, 2):
            launch(kernel, (3,), 32, BLOCK=64)
        assert os.getpid() not in compiled_by(kernel).values()
    (kernel.folder / "32-64").unlink()  # a cache that lost a file
    with compiling_ahead(CPU, 2):
        launch(kernel, (3,), 32, BLOCK=64)
    assert compiled_by(kernel) == {"32-64": os.getpid()}
    with compiling_ahead(CPU, 2):
        launch(kernel, (3,), 32, BLOCK=128)  # another set of calls
    assert compiled_by(kernel)["32-128"] != os.getpid()


def test_launches_of_other_threads_are_heard(kernel: FakeKernel) -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(_ctx: Any, *grads: Tensor) -> Tensor:
            launch(kernel, (3,), grads[0], BLOCK=64)
            return 2 * grads[0]

    with compiling_ahead(CPU, 2):
        Double.apply(torch.ones(4, requires_grad=True)).sum().backward()
    assert list(compiled_by(kernel)) == ["torch.float32-64"]


def test_what_does_not_compile_is_an_error_here(kernel: FakeKernel) -> None:
    with pytest.raises(RuntimeError, match="no such instruction"), compiling_ahead(CPU, 2):
        launch(kernel, (3,), 16, BLOCK="broken")


def test_a_helper_that_hangs_is_ended(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "HANG_S", 0.5)
    started = time.monotonic()
    with compiling_ahead(CPU, 2):
        launch(kernel, (3,), 16, BLOCK="hanging")
    assert time.monotonic() - started < 30
    assert compiled_by(kernel) == {"16-hanging": os.getpid()}


def test_a_helper_that_dies_costs_no_time(kernel: FakeKernel) -> None:
    started = time.monotonic()
    for _ in range(2):  # no mark was left
        with compiling_ahead(CPU, 2):
            launch(kernel, (3,), 16, BLOCK="dying")
            launch(kernel, (3,), 16, BLOCK=64)
    assert time.monotonic() - started < 30
    assert compiled_by(kernel)["16-dying"] == os.getpid() != compiled_by(kernel)["16-64"]


def test_a_cache_that_cannot_be_written_is_no_error(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_cache: FakeCache, _data: bytes, _name: str) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(FakeCache, "put", refuse)
    with compiling_ahead(CPU, 2):
        launch(kernel, (3,), 16, BLOCK=64)
    assert list(compiled_by(kernel)) == ["16-64"]


def test_helpers_end_whatever_the_parent_does_with_signals(kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "HANG_S", 0.5)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with compiling_ahead(CPU, 2):
            launch(kernel, (3,), 16, BLOCK="hanging")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert compiled_by(kernel) == {"16-hanging": os.getpid()}


def test_helpers_do_not_outlive_a_killed_parent(kernel: FakeKernel) -> None:
    parent = os.fork()
    if parent == 0:
        try:
            FakeKernel.parent = os.getpid()
            with compiling_ahead(CPU, 2):
                launch(kernel, (3,), 16, BLOCK="hanging")
        finally:
            os._exit(1)
    helper = int(wait_for(lambda: (kernel.folder / "hanging").read_text()))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    wait_for(lambda: has_ended(helper))


def has_ended(pid: int) -> bool:
    """Return whether a process is gone, or waits only for somebody to ask how it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_for(find: Callable[[], Any]) -> Any:
    """Return the first result that counts as true, of at most twenty seconds."""
    for _ in range(200):
        with contextlib.suppress(FileNotFoundError):
            if found := find():
                return found
        time.sleep(0.1)
    raise TimeoutError("nothing came")


def test_an_error_in_the_rehearsal_compiles_nothing(kernel: FakeKernel) -> None:
    def rehearse() -> None:
        with compiling_ahead(CPU, 2):
            launch(kernel, (3,), 16, BLOCK=64)
            raise ValueError("wrong shape")

    with pytest.raises(ValueError, match="wrong shape"):
        rehearse()
    assert not compiled_by(kernel)


def test_a_cpu_compiles_nothing(tmp_path: Path) -> None:
    ledger = Ledger("train")
    compile_kernels(Run(micro_run(), Dist.single(), tmp_path, ignore), ledger)
    assert not ledger.spans


def test_spans_that_overlap_count_once() -> None:
    ledger = Ledger("train", origin=0.0)
    for start, end in ((1, 4), (2, 3), (3, 6), (8, 9)):
        ledger.add_span("compile", start, end)
    ledger.add_span("steps", 0, 100)
    assert ledger.seconds("compile") == 6
    assert covered_s([]) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("ttt", [{}, {"chunk_tokens": 48, "chunk_by_length": ((300, 16),), "lora_alpha": 144.0}])
def test_the_stages_launch_nothing_else(ttt: dict[str, Any], tmp_path: Path) -> None:
    config = replace(bench_500(), ttt=replace(bench_500().ttt, **ttt))
    run = Run(config, Dist.single("cuda:0"), tmp_path, ignore)
    compile_kernels(run, Ledger("ahead"))
    assert compile_ahead._compiled
    model = GPT(config.model, compute_dtype=torch.bfloat16).cuda()
    model.init_weights(0)
    model.tok_emb.weight.data = model.tok_emb.weight.data.bfloat16()
    validation, table = micro_validation(2100, 2300, 2100, 77, 30, 400), micro_bytes()
    ledger = Ledger("stages")
    with noting_compilation(ledger, run.dist.device):
        tokens = validation.tokens[:4097]
        packing = pack_row(tokens[:-1], max_segment=2048, max_seqlen=2048).to("cuda")
        for is_looped in (False, True):
            inputs, targets = (x.cuda() for x in inputs_and_targets(tokens))
            model(inputs, targets, is_looped=is_looped, packing=packing).backward()
        model.requires_grad_(False)
        model.visit(inputs.view(2, -1), is_looped=True)
        rows = replace(config.evaluation, row_tokens=1024, seq_len=512)
        evaluate_plain(model, validation, table, rows, run.dist, ignore, scorer=RowScorer(model))
        for is_adapting in (False, True):
            score_documents(model, validation, table, config.ttt, run.dist, ignore, seed=0, is_adapting=is_adapting)
    assert [span.get("kernel") for span in ledger.spans] == []
