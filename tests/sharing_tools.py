"""Runs that take stages over from each other, and stages that only write a word: for the tests of sharing."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model.bundle.program import Program
from model.config import RunConfig
from model.controls.self_test import make_corpus, micro_config
from model.distributed import Dist
from model.files.atomic import replace_file
from model.pipeline import finished
from model.pipeline import seed as pipeline
from model.pipeline.inputs import ADAPTED, ARTIFACT, EVALUATED, STEPS, WEIGHTS
from model.pipeline.records import read_records, record_path
from model.pipeline.run import NO_ORDERS, Donor, Orders, Run
from model.pipeline.seed import SeedResult, run_seed
from model.pipeline.stage_quantize import write_program
from model.report import STAGES

OUTPUTS = {"train": (WEIGHTS, STEPS), "quantize": (ARTIFACT,), "evaluate": (EVALUATED,), "ttt": (ADAPTED,)}


class Killed(BaseException):
    """What a test raises in place of a signal."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return variant(micro_config(make_corpus(tmp_path_factory.mktemp("data") / "corpus")), "train", max_steps=3)


def variant(config: RunConfig, section: str, **changes: Any) -> RunConfig:
    return replace(config, **{section: replace(getattr(config, section), **changes)})


def donor(workdir: Path) -> Donor:
    return Donor(workdir.name, lambda name: (workdir / name).read_bytes(), workdir)


def donors(workdir: Path, *stages: str) -> Orders:
    return Orders(donors={stage: donor(workdir) for stage in stages or STAGES})


class Heard:
    """Listens to a run: the stages that it computed, and what it noted."""

    def __init__(self) -> None:
        self.computed: list[str] = []
        self.notes: list[str] = []

    def __call__(self, phase: str, step: int, total: int | None, metrics: Mapping[str, Any]) -> None:
        """Hear one report."""
        if (step, total) == (0, None) and phase in STAGES and phase not in self.computed:
            self.computed.append(phase)
        if "note" in metrics:
            self.notes.append(str(metrics["note"]))

    @property
    def refusals(self) -> list[str]:
        """What was not taken over, and why."""
        return [note for note in self.notes if "is not taken over" in note]


def run(config: RunConfig, workdir: Path, orders: Orders = NO_ORDERS, **options: Any) -> tuple[SeedResult, Heard]:
    heard = Heard()
    return run_seed(config, options.pop("dist", Dist.single()), workdir, heard, orders=orders, **options), heard


def hashes_of(workdir: Path, *, but: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the sha256 of every output but those with timings in them."""
    outputs = {name: o.sha256 for record in read_records(workdir).values() for name, o in record.outputs.items()}
    return {name: sha256 for name, sha256 in outputs.items() if not name.startswith("ledger/") and name not in but}


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each stage write what its settings decide, and the program one of its settings."""

    def program_of(config: RunConfig) -> Program:
        return Program(f"program of {config.ttt.lr}", str(config.ttt.lr).encode())

    def stub(stage: str) -> Callable[[Run, Any], tuple[dict[str, Any], list[str]]]:
        def run_stage(run: Run, _ledger: Any) -> tuple[dict[str, Any], list[str]]:
            names = list(OUTPUTS[stage])
            for name in names:
                with replace_file(run.workdir / name) as file:
                    file.write(f"{name} of {run.config.train.max_steps} {run.config.quant.matrix_bits}".encode())
            metrics: dict[str, Any] = {f"{stage}_s": 1.0, f"{stage}_attention_backend": "sdpa"}
            if stage == "quantize":
                program = program_of(run.config)
                metrics |= {"model_bytes": 1, "code_bytes": program.num_bytes}
                names += write_program(program, run.workdir)
            return metrics, names

        return run_stage

    for stage in STAGES:
        monkeypatch.setitem(pipeline.RUN_STAGE, stage, stub(stage))
    monkeypatch.setattr(finished, "code_program", program_of)


@pytest.fixture
def base(config: RunConfig, stubs: None, tmp_path: Path) -> Path:
    run(config, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def slow(config: RunConfig) -> RunConfig:
    return variant(config, "ttt", lr=1e-3)


def edit_record(workdir: Path, stage: str, **changes: Any) -> None:
    path = record_path(workdir, stage)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def killed_at(name: str) -> Callable[[Path], None]:
    """Return an on_write that ends the process when this file has been written."""

    def on_write(path: Path) -> None:
        if path.as_posix().endswith(f"/{name}"):
            raise Killed

    return on_write
