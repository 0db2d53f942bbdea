"""model/kernels/graphs.py: what a recording that fails leaves behind, told from the calls it makes of PyTorch."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from model import gpt
from model.gpt import fits_row_graphs
from model.kernels.graphs import MOST_FAILURES, Recorder, Recording

CPU = torch.device("cpu")


class FakeCuda:
    """Stands in for torch.cuda: a stream is recording or not, a pool is being served or not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.is_recording = self.is_void = self.is_serving = False
        self.free, self.num_pools = 1 << 30, 0
        fakes: dict[str, Any] = {
            "CUDAGraph": lambda: FakeGraph(self), "Stream": FakeStream, "current_stream": FakeStream,
            "stream": lambda _stream: contextlib.nullcontext(), "graph_pool_handle": self.new_pool,
            "mem_get_info": lambda: (self.free, 1 << 31), "memory_reserved": lambda: 0, "current_device": lambda: 0,
            "synchronize": lambda: self.note("synchronize"), "empty_cache": lambda: self.note("empty_cache"),
            "get_device_properties": lambda _device: types.SimpleNamespace(total_memory=1 << 31),
        }  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_serving, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda *_: self.note("release"), raising=False)

    def note(self, call: str) -> None:
        assert not self.is_recording, f"{call} while the stream is recording"
        self.calls.append(call)

    def new_pool(self) -> tuple[int, int]:
        self.num_pools += 1
        return 0, self.num_pools

    def end_serving(self, _device: int, _pool: tuple[int, int]) -> None:
        if not self.is_serving:
            raise RuntimeError("not currently recording to mempool_id")
        self.is_serving = False
        self.note("end")


class FakeStream:
    """A stream."""

    def wait_stream(self, other: FakeStream) -> None:
        """Do nothing."""


class FakeGraph:
    """A graph as PyTorch has it: the end of a void recording raises before the allocator is told."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def capture_begin(self, pool: tuple[int, int], capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        assert not self.cuda.is_serving
        self.cuda.is_recording = self.cuda.is_serving = True
        self.cuda.is_void = False

    def capture_end(self) -> None:
        if not self.cuda.is_recording:
            raise RuntimeError("the stream is not recording")
        self.cuda.is_recording = False
        if self.cuda.is_void:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.cuda.is_serving = False

    def reset(self) -> None:
        self.cuda.calls.append("reset")

    def replay(self) -> None:
        self.cuda.calls.append("replay")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def waits_for_the_host(cuda: FakeCuda) -> Callable[[Tensor], Tensor]:
    """Return work that reads a number back, which a recording forbids."""

    def call(x: Tensor) -> Tensor:
        if cuda.is_recording:
            cuda.is_void = True
            raise RuntimeError("operation not permitted when stream is capturing")
        return x * sum(x.tolist())

    return call


@contextlib.contextmanager
def sane_after(cuda: FakeCuda) -> Iterator[None]:
    """Check that the block leaves no stream recording and no pool served."""
    yield
    assert not cuda.is_recording
    assert not cuda.is_serving


def test_work_that_cannot_be_recorded_runs_and_leaves_the_device_sane(
    cuda: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    recorder, x = Recorder(), torch.tensor([1.0, 2.0])
    for _ in range(3):
        with sane_after(cuda):
            y = recorder.run("a", waits_for_the_host(cuda), x, device=CPU)
        assert y.tolist() == [3.0, 6.0]
    assert cuda.calls == ["end", "release", "reset", "synchronize", "empty_cache"]
    assert caplog.text.count("size=a runs operation by operation") == 1
    assert recorder.pool is None


def test_an_error_of_python_alone_ends_the_recording_too(cuda: FakeCuda) -> None:
    def call(x: Tensor) -> Tensor:
        if cuda.is_recording:
            raise NotImplementedError("nothing for the device to complain of")
        return x + 1

    with sane_after(cuda):
        assert Recorder().run("a", call, torch.zeros(1), device=CPU).item() == 1
    assert cuda.calls == ["reset", "synchronize", "empty_cache"]


def test_an_error_of_the_work_itself_is_raised(cuda: FakeCuda) -> None:
    def call(_x: Tensor) -> Tensor:
        raise ValueError("ill work")

    with sane_after(cuda), pytest.raises(ValueError, match="ill work"):
        Recorder().run("a", call, torch.zeros(1), device=CPU)


def test_an_interruption_ends_the_recording_and_is_passed_on(cuda: FakeCuda) -> None:
    def call(_x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with sane_after(cuda), pytest.raises(KeyboardInterrupt):
        Recorder().run("a", call, torch.zeros(1), device=CPU)


def test_other_sizes_are_recorded_after_a_failure_but_not_after_many(cuda: FakeCuda) -> None:
    recorder, x = Recorder(), torch.zeros(1)
    recorder.run("good", lambda x: x + 1, x, device=CPU)
    recorder.run("bad", waits_for_the_host(cuda), x, device=CPU)
    assert not recorder.recorded  # it shared the failed one's memory
    recorder.run("good", lambda x: x + 1, x, device=CPU)
    assert list(recorder.recorded) == ["good"]
    for number in range(MOST_FAILURES):
        recorder.run(number, waits_for_the_host(cuda), x, device=CPU)
    assert len(recorder.failed) == MOST_FAILURES
    assert recorder.run("good", lambda x: x + 1, x, device=CPU).item() == 1
    assert not recorder.recorded


def test_recordings_are_bounded_in_number_the_least_used_goes(cuda: FakeCuda) -> None:
    recorder, x = Recorder(most_recordings=2), torch.zeros(1)
    for key in ("a", "b", "a", "c"):
        recorder.run(key, lambda x: x + 1, x, device=CPU)
    assert list(recorder.recorded) == ["a", "c"]
    assert cuda.calls == ["replay"] * 4


def test_recordings_are_bounded_in_memory(cuda: FakeCuda) -> None:
    recorder, x = Recorder(limit_bytes=1000), torch.zeros(1)

    def call(x: Tensor) -> Tensor:
        cuda.free -= 400  # the graph's own
        return x + 1

    for key in range(5):
        recorder.run(key, call, x, device=CPU)
    assert list(recorder.recorded) == [3, 4]
    assert isinstance(recorder.recorded[4], Recording)


def test_a_pool_is_not_used_again_after_its_last_recording(cuda: FakeCuda) -> None:
    recorder, x = Recorder(most_recordings=1), torch.zeros(1)
    for key in range(3):
        recorder.run(key, lambda x: x + 1, x, device=CPU)
    assert cuda.num_pools == 3


@pytest.mark.parametrize(("backend", "fits"), [("auto", True), ("varlen", True), ("sdpa", False)])
def test_rows_whose_segments_are_laid_out_on_the_host_are_not_recorded(
    backend: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpt, "fits_graphs", lambda _model: True)
    assert fits_row_graphs(types.SimpleNamespace(attention_backend=backend)) is fits  # type: ignore[arg-type]
