"""The audit's test of itself: a micro run that every probe passes, and a broken one for each that it must catch.

The run is made by the pipeline itself on synthetic text, in seconds on one CPU core.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from model.audit.audit import PROBES, Audit, run_probes
from model.audit.finished_run import load_run
from model.audit.verdicts import FAIL, PASS, Result
from model.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    QuantConfig,
    RunConfig,
    RuntimeConfig,
    TrainConfig,
    TTTConfig,
)
from model.controls.broken import CONTROLS
from model.corpus.vocabulary import train_vocabulary
from model.corpus.writer import CorpusWriter, save_tokenizer
from model.data.tokenizer import load_tokenizer
from model.distributed import Dist
from model.files.checkpoint import write_json
from model.pipeline.seed import run_seed

SEED = 7
VOCAB_SIZE = 320
NUM_DOCUMENTS = {"val": 6, "train": 40}
WORDS_OF_A_DOCUMENT = (30, 60)
SYLLABLES = ("ba", "ko", "li", "mu", "ne", "ra", "si", "to", "vé", "zu")
RARE = ("文", "\U0001f600", "ß", "100")  # some of it falls back to byte pieces
EXPECTED_COULD_NOT_RUN = ("timing", "network_block")  # on a CPU; where the system gives no namespaces


class Line(NamedTuple):
    """One control: what was broken, which probe looked, and whether it objected."""

    control: str
    broken: str
    probe: str
    is_caught: bool
    result: Result


@dataclass(frozen=True, slots=True)
class SelfTest:
    """The healthy run's results, and every control's."""

    healthy: Sequence[Result]
    lines: Sequence[Line]
    seconds: float

    @property
    def unproven(self) -> list[str]:
        """Probes that have no control which they caught."""
        proven = {line.probe for line in self.lines if line.is_caught}
        return sorted({result.probe for result in self.healthy} - proven)

    @property
    def false_alarms(self) -> list[Result]:
        """Results of the healthy run that are no pass, but for those that this machine cannot give."""
        return [
            r for r in self.healthy if r.result == FAIL or (r.result != PASS and r.probe not in EXPECTED_COULD_NOT_RUN)
        ]

    @property
    def is_sound(self) -> bool:
        """Whether every control was caught, every probe has one, and the healthy run passed."""
        return all(line.is_caught for line in self.lines) and not self.unproven and not self.false_alarms

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "result": PASS if self.is_sound else FAIL,
            "seconds": round(self.seconds, 1),
            "healthy": [result.as_json() for result in self.healthy],
            "controls": [
                {"control": line.control, "broken": line.broken, "probe": line.probe, "caught": line.is_caught,
                 "result": line.result.as_json()} for line in self.lines
            ],
            "unproven": self.unproven,
            "false_alarms": [result.probe for result in self.false_alarms],
        }  # fmt: skip


def examine(audit: Audit, report: Callable[[str, int, int | None, Mapping[str, Any]], None]) -> SelfTest:
    """Run every probe on a healthy run, and every control."""
    started = time.monotonic()
    healthy = run_probes(audit, list(PROBES), report)
    lines = []
    for number, control in enumerate(CONTROLS):
        report("controls", number, len(CONTROLS), {"probe": control.name})
        for result in control.run(audit):
            lines.append(Line(control.name, control.broken, result.probe, result.result == FAIL, result))
    return SelfTest(healthy, lines, time.monotonic() - started)


@contextlib.contextmanager
def micro_run() -> Iterator[Audit]:
    """Make a corpus and a finished sweep of one seed in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="seedsweep-self-test-") as name:
        folder = Path(name).resolve()
        config = micro_config(make_corpus(folder / "corpus"))
        out = folder / "out"
        workdir = out / "seeds" / f"seed={SEED}-repeat=0"
        run_seed(config, Dist.single(), workdir, _ignore)
        announced = {"time": "2000-01-01T00:00:00+00:00", "seeds": [SEED], "repeats": 1}
        write_json(out / "sweep.json", {"announcements": [announced]})
        yield Audit(out, [workdir], load_run(workdir), 3)


def make_corpus(folder: Path) -> Path:
    """Write made-up documents as shards with a tokenizer of their own, and return the tokenizer's path."""
    generator = np.random.Generator(np.random.PCG64(SEED))
    words = ["".join(generator.choice(SYLLABLES, generator.integers(1, 4))) for _ in range(80)] + list(RARE)
    shares = np.arange(len(words), 0, -1.0)

    def document() -> str:
        size = int(generator.integers(*WORDS_OF_A_DOCUMENT))
        return " ".join(generator.choice(words, size, p=shares / shares.sum()))

    texts = {split: [document() for _ in range(count)] for split, count in NUM_DOCUMENTS.items()}
    folder.mkdir(parents=True)
    path = save_tokenizer(folder, "micro", train_vocabulary(texts["train"], vocab_size=VOCAB_SIZE))
    with CorpusWriter(folder, "micro", load_tokenizer(path)) as writer:
        for split, documents in texts.items():
            writer.add(split, documents)
    writer.finish(path, {"kind": "self-test"})
    return path


def micro_config(tokenizer: Path) -> RunConfig:
    """Return a recipe of three layers and every part that a recipe can have, which runs all stages in seconds."""
    folder, vocab_size = tokenizer.parent, load_tokenizer(tokenizer).vocab_size
    return RunConfig(
        model=ModelConfig(
            vocab_size=vocab_size, num_layers=3, model_dim=32, num_heads=2, num_kv_heads=1, mlp_mult=2.0, rope_dims=8,
            xsa_last_n=3, loop_start=1, loop_end=1, num_loops=1, parallel_start_layer=2, lane_routing="full",
            attn_gate_width=8, smear_gate_width=8, leaky_slope=0.3, mlp_gate_width=8, pass_embeddings=True,
        ),
        train=TrainConfig(
            max_steps=8, budget_s=None, batch_tokens=512, micro_batch_tokens=256, seq_len=64, span_group=1,
            muon_momentum_warmup_steps=4, ema_decay=0.5, newton_schulz_dtype="float32", embedding_dtype="float32",
        ),
        quant=QuantConfig(
            num_calibration_batches=1, calibration_windows=4, calibration_seq_len=64, keep_float_numel=512
        ),
        evaluation=EvalConfig(row_tokens=1024, seq_len=64),
        ttt=TTTConfig(
            lora_rank=2, lr=1e-2, chunk_tokens=16, window_tokens=64, batch_documents=4, lora_alpha=3.0,
            chunk_by_length=((96, 12), (128, 14)),
        ),
        data=DataConfig(
            train=str(folder / "*_train_*.bin"), val=str(folder / "*_val_*.bin"), tokenizer=str(tokenizer)
        ),
        runtime=RuntimeConfig(device="cpu", checkpoint_every_s=0.0),
        seed=SEED,
    )  # fmt: skip


def _ignore(_phase: str, _step: int, _total: int | None, _metrics: Mapping[str, Any]) -> None:
    """Report nothing."""
