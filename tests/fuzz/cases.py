"""What is fuzzed: for each loader a valid file, a way to damage it, the load, and what must hold if it still loads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from model.banks import EMBEDDING, parameter_shapes, tensor_shapes
from model.config import ModelConfig
from model.corpus.shard_file import shard_header
from model.corpus.vocabulary import train_vocabulary
from model.data.manifest import MANIFEST_NAME, read_manifest, scan_shard
from model.data.shards import HEADER_BYTES, find_documents, open_shard
from model.data.tokenizer import load_tokenizer
from model.files.checkpoint import CheckpointStore
from model.files.tensors import load_tensors, save_tensors
from model.quant.artifact import load_artifact, pack_artifact
from model.quant.low_rank import LowRank
from model.quant.quantized import QuantizedState, QuantizedWeight
from results.store.reader import read_attempt, read_runs
from results.store.writer import commit_attempt
from runner.spec.read import load_spec
from runner.spec.sweep import SweepSpec
from tests.fuzz.mutations import mutate_artifact, mutate_bytes, odd_json

SHARD_VALUES = (0, 1, -1, 2, 255, 2**15, 2**31 - 1, -(2**31), 20240520)
SMALL = ModelConfig(
    vocab_size=24, num_layers=2, model_dim=16, num_heads=2, num_kv_heads=1, mlp_mult=2.0, rope_dims=4, xsa_last_n=2,
    loop_start=0, loop_end=0, num_loops=1, parallel_start_layer=1,
)  # fmt: skip
SPEC = """\
name: fuzz
preset: tiny
overrides: {train: {max_steps: 3, matrix_lr: 1e-3}, ttt: {adapter_kinds: [q, mlp], lora_rank: 4}}
data: {train: a_train_*.bin, val: a_val_*.bin, tokenizer: a.model, val_documents: 8}
seeds: [42, 0, 1337]
repeats: 2
gang: {gpus: 0, cpus: 1}
limits: {attempts: 3, seed_s: 60.0}
out: runs/fuzz
"""
SPEC_PIECES = (
    "!!python/object/apply:os.system ['touch fuzz-was-here']", "!!python/name:os.system", "&a [*a, *a]", "*a", "<<: *a",
    "!!binary aGk=", "2001-01-01", "0x7fffffffffffffff", "1e999", ".nan", "[" * 300, "{" * 300, "? x", "- " * 200,
    "&b [" + "*a, " * 20 + "*a]", "9" * 5000, "'\\0'", "\t", "---", "...", "%YAML 9.9", "!!timestamp x", "~", "|", ">-",
)  # fmt: skip


class Case:
    """One loader with its valid files in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.prepare()

    def prepare(self) -> None:
        """Write the valid files, or remember their bytes."""

    def mutated(self, rng: random.Random) -> tuple[Path, bytes]:
        """Return the path of the damaged file and its content, not yet written."""
        raise NotImplementedError

    def load(self, path: Path, content: bytes) -> None:
        """Load the written file and assert that what loads is right."""
        raise NotImplementedError

    def run(self, seed: int) -> str:
        """Damage, write and load; returns the one-line refusal, or "" if it loaded. Anything else goes through."""
        path, content = self.mutated(random.Random(seed))
        return self.run_content(path, content)

    def run_content(self, path: Path, content: bytes) -> str:
        """Write and load one content; as run."""
        path.write_bytes(content)
        try:
            self.load(path, content)
        except (ValueError, OSError) as error:
            line = str(error)
            assert line, "refused without a word"
            assert "\n" not in line, f"refused in several lines: {line[:200]!r}"
            return line
        return ""


class ArtifactCase(Case):
    """Artifacts of both codecs, corrected and not; what loads has the shapes of the configuration that it announces."""

    def prepare(self) -> None:
        generator = torch.Generator().manual_seed(0)
        matrices, floats = {}, {}
        for name, shape in tensor_shapes(SMALL).items():
            if len(shape) == 2 and name not in parameter_shapes(SMALL):
                codes = (torch.randn(shape, generator=generator) * 2.4).round().clamp(-31, 31).to(torch.int8)
                matrices[name] = QuantizedWeight(codes, torch.rand(shape[0], generator=generator).half() + 0.01, 6)
            else:
                floats[name] = torch.randn(shape, generator=generator).half()
        state = QuantizedState(matrices=matrices, floats=floats)
        factors = (torch.ones(SMALL.vocab_size, 2).to(torch.int8), torch.ones(2, SMALL.model_dim).to(torch.int8))
        scales = torch.ones(1).half(), torch.ones(2 * SMALL.model_dim // 8).half()
        correction = LowRank(factors[0], scales[0], factors[1], scales[1])
        embedding = matrices[EMBEDDING]._replace(correction=correction)
        corrected = QuantizedState(matrices={**matrices, EMBEDDING: embedding}, floats=floats)
        self.valid = [
            pack_artifact(each, SMALL, {"seed": 7}, codec=codec)
            for each in (state, corrected)
            for codec in ("rans", "brotli")
        ]

    def mutated(self, rng: random.Random) -> tuple[Path, bytes]:
        return self.folder / "mutated.ssq", mutate_artifact(rng.choice(self.valid), rng)

    def load(self, path: Path, content: bytes) -> None:
        config, state = load_artifact(path)
        for name, shape in tensor_shapes(config).items():
            tensor = state.matrices[name].codes if name in state.matrices else state.floats[name]
            assert tuple(tensor.shape) == shape, name


class ShardCase(Case):
    """Shards of some twenty tokens; what loads agrees with the bytes on disk."""

    def mutated(self, rng: random.Random) -> tuple[Path, bytes]:
        ids = np.array([1, *(rng.randrange(1024) for _ in range(rng.randrange(1, 40)))], dtype="<u2")
        data = shard_header(ids.size) + ids.tobytes()
        if rng.random() < 0.5:
            header = np.frombuffer(data[:HEADER_BYTES], dtype="<i4").copy()
            value = rng.choice(SHARD_VALUES) if rng.random() < 0.7 else rng.randrange(-(2**31), 2**31)
            header[rng.randrange(4)] = value
            data = header.tobytes() + data[HEADER_BYTES:]
        else:
            data = mutate_bytes(data, rng, reach=rng.choice((12, HEADER_BYTES, len(data))))
        return self.folder / "fuzz_train_000000.bin", data

    def load(self, path: Path, content: bytes) -> None:
        tokens = open_shard(path)
        assert tokens.tobytes() == content[HEADER_BYTES:]
        facts = scan_shard(path)
        assert (facts.num_tokens, facts.num_documents) == (tokens.size, find_documents(tokens).size)


class ManifestCase(Case):
    """Manifests; every file name that loads stays inside the folder."""

    def mutated(self, rng: random.Random) -> tuple[Path, bytes]:
        entry = {"bytes": 1032, "documents": 1, "tokens": 4, "sha256": "0123456789abcdef" * 4}
        value = {
            "format": 1, "name": "toy", "tokenizer": "toy.model",
            "files": {"toy.model": entry, "toy_val_000000.bin": entry},
            "source": {"kind": "text", "inputs": ["a.jsonl"]},
        }  # fmt: skip
        if rng.random() < 0.5:
            data = json.dumps(odd_json(value, rng, "../../etc/passwd", "\x00", "/dev/zero", float("nan"))).encode()
        else:
            data = mutate_bytes(json.dumps(value).encode(), rng)
        return self.folder / MANIFEST_NAME, data

    def load(self, path: Path, content: bytes) -> None:
        manifest = read_manifest(self.folder)
        assert manifest is not None
        names = manifest.files
        assert all((self.folder / name).parent == self.folder and ".." not in name for name in names)


class CheckpointCase(Case):
    """Tensor files and checkpoint records; the store answers with an undamaged checkpoint or says there is none."""

    def prepare(self) -> None:
        self.store = CheckpointStore(self.folder / "checkpoints")
        self.tensors = {
            "live/w": torch.arange(12, dtype=torch.float32).reshape(3, 4), "ema/w": torch.ones(3, 4).bfloat16(),
            "rng": torch.arange(5, dtype=torch.uint8), "empty": torch.zeros(0, 3),
        }  # fmt: skip
        for step in (1, 2):
            self.store.save(step, self.tensors, {"elapsed_s": 1.5, "resumed_at": [], "lost_steps": 0})
        self.tensor_path, self.record_path = (
            self.folder / "checkpoints" / f"step-0000002{suffix}" for suffix in (".safetensors", ".json")
        )
        self.tensor_bytes, self.record_bytes = self.tensor_path.read_bytes(), self.record_path.read_bytes()
        save_tensors(self.folder / "alone.safetensors", self.tensors)

    def mutated(self, rng: random.Random) -> tuple[Path, bytes]:
        kind = rng.choice(("tensors", "header", "record"))
        if kind == "record":
            value = json.loads(self.record_bytes)
            data = (
                json.dumps(odd_json(value, rng)).encode()
                if rng.random() < 0.6
                else mutate_bytes(self.record_bytes, rng)
            )
            return self.record_path, data
        if kind == "tensors":
            return self.tensor_path, mutate_bytes(self.tensor_bytes, rng, reach=rng.choice((8, 200, None)))
        size = int.from_bytes(self.tensor_bytes[:8], "little")
        header = json.loads(self.tensor_bytes[8 : 8 + size])
        raw = json.dumps(odd_json(header, rng, "F32", "BF16", [0, 2**50], [2**62], [-1, 3], {"dtype": "F32"})).encode()
        return self.tensor_path, len(raw).to_bytes(8, "little") + raw + self.tensor_bytes[8 + size :]

    def load(self, path: Path, content: bytes) -> None:
        self.tensor_path.write_bytes(content if path == self.tensor_path else self.tensor_bytes)
        self.record_path.write_bytes(content if path == self.record_path else self.record_bytes)
        found = self.store.load_newest()
        assert found is not None, "the undamaged checkpoint before it was not found"
        tensors, meta = found
        assert meta["step"] in (1, 2)
        assert all(torch.equal(tensors[name], value) for name, value in self.tensors.items())
        if path == self.tensor_path:  # as a forger would: checksum right, content odd
            record = {**json.loads(self.record_bytes), "sha256": hashlib.sha256(content).hexdigest()}
            self.record_path.write_text(json.dumps(record))
            assert self.store.load_newest() is not None
            load_tensors(path)


class SpecCase(Case):
    """Sweep specs; what loads survives the way through sweep.json."""

    def prepare(self) -> None:
        load_spec(self._write(SPEC))

    def _write(self, text: str) -> Path:
        path = self.folder / "spec.yaml"
        path.write_text(text)
        return path

    def mutated(self, rng: random.Random) -> tuple[Path, bytes]:
        data = SPEC.encode()
        if rng.random() < 0.5:
            words = SPEC.split(" ")
            for _ in range(rng.choice((1, 1, 2, 5))):
                words[rng.randrange(len(words))] = rng.choice(
                    (*SPEC_PIECES, *words, str(rng.choice((0, -1, 2**40, 1e308))))
                )
            data = " ".join(words).encode()
        if rng.random() < 0.6:
            data = mutate_bytes(data, rng)
        return self.folder / "spec.yaml", data

    def load(self, path: Path, content: bytes) -> None:
        spec = load_spec(path)
        again = SweepSpec.from_json(json.loads(json.dumps(spec.to_json())))
        assert dataclasses.replace(again, fetch=None) == dataclasses.replace(spec, fetch=None)


class ParquetCase(Case):
    """Results files; a damaged one is named as a problem, or its rows are the ones that were written."""

    def prepare(self) -> None:
        documents = {"index": np.arange(3), "tokens": np.array([5, 6, 7]), "bytes": np.array([9, 9, 9])}
        run = {"seed": 42, "repeat": 0, "attempt": 1, "config_hash": "c" * 64, "state": "DONE", "sweep": "fuzz"}
        for seed in (1, 42):
            name = commit_attempt(self.folder, run={**run, "seed": seed, "post_ttt_bpb": 1.0}, documents=documents)
        self.paths = [self.folder / "results" / table / name for table in ("runs", "documents")]
        self.valid = [path.read_bytes() for path in self.paths]

    def mutated(self, rng: random.Random) -> tuple[Path, bytes]:
        which = rng.randrange(2)
        data = self.valid[which]
        footer = int.from_bytes(data[-8:-4], "little") + 8
        if rng.random() < 0.5:  # inside the footer, its length kept right
            inner = mutate_bytes(data[-footer:-8], rng)
            data = data[:-footer] + inner + len(inner).to_bytes(4, "little") + data[-4:]
        else:
            data = mutate_bytes(data, rng)
        return self.paths[which], data

    def load(self, path: Path, content: bytes) -> None:
        for place, valid in zip(self.paths, self.valid):
            place.write_bytes(content if place == path else valid)
        rows = read_runs(str(self.folder))
        assert all("\n" not in problem for problem in rows.problems)
        assert len(rows.frame) >= 1
        for _, run in rows.frame.iterrows():
            if run["seed"] in (1, 42) and run["repeat"] == 0 and run["attempt"] == 1:
                frame = read_attempt(str(self.folder), "documents", run, ["tokens", "bytes"])
                assert list(frame.columns) == ["tokens", "bytes"]
        if rows.problems:
            raise ValueError(rows.problems[0])


class TokenizerCase(Case):
    """SentencePiece models; what loads encodes and decodes without harm."""

    def prepare(self) -> None:
        words = ("seed", "sweep", "gang", "token", "shard", "loss", "rank", "step", "model", "score")
        rng = random.Random(0)
        texts = [" ".join(rng.choices(words, k=30)) + f" {number}" for number in range(200)]
        self.valid = train_vocabulary(texts, vocab_size=300)

    def mutated(self, rng: random.Random) -> tuple[Path, bytes]:
        return self.folder / "fuzz.model", mutate_bytes(self.valid, rng)

    def load(self, path: Path, content: bytes) -> None:
        tokenizer = load_tokenizer(path)
        rng = random.Random(len(content))
        text = "".join(chr(rng.choice((rng.randrange(1, 0x300), rng.randrange(0x2000, 0x3100)))) for _ in range(99))
        tokenizer.decode(tokenizer.encode_documents([text])[0])
        assert tokenizer.byte_table.base_bytes.size == tokenizer.vocab_size


CASES: dict[str, Callable[[Path], Case]] = {
    "artifact": ArtifactCase, "shard": ShardCase, "manifest": ManifestCase, "checkpoint": CheckpointCase,
    "spec": SpecCase, "parquet": ParquetCase, "tokenizer": TokenizerCase,
}  # fmt: skip


def make_case(name: str, folder: Path) -> Case:
    """Return the case of one loader."""
    return CASES[name](folder)
