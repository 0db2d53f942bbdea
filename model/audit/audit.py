"""Compliance audit of a finished run: every probe of the rules, run on its artifact, its ledgers and its text.

A probe answers pass, fail or could-not-run with the figure, its limit, the sample and what it did not look at. How the
probes are known to work: model/controls/systems.py breaks the system in a way that each must catch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from model.audit import (
    causality as audit_causality,
)
from model.audit import (
    dependence as audit_dependence,
)
from model.audit import (
    distribution as audit_distribution,
)
from model.audit import (
    forward as audit_forward,
)
from model.audit import (
    records as audit_records,
)
from model.audit import (
    updates as audit_updates,
)
from model.audit.byte_table import probe_bytes
from model.audit.configuration import probe_configuration
from model.audit.files import probe_records
from model.audit.finished_run import RunFiles, load_run
from model.audit.reload import probe_reload
from model.audit.system import System
from model.audit.verdicts import FAIL, Result, worst
from model.data.shards import list_shards
from model.data.tokenizer import Tokenizer, load_tokenizer
from model.data.validation import ValidationSet, load_validation
from model.distributed import Dist, pick_device
from model.files.checkpoint import write_json
from model.gpt import build_model
from model.quant.artifact import load_artifact
from model.quant.quantized import dequantize
from model.report import Report

AUDIT_NAME = "audit.json"
FORMAT = 1
DEFAULT_SAMPLE = 8


@dataclass
class Audit:
    """One run under audit; the model and the text are loaded when a probe first asks for them."""

    out: Path  # the sweep, or the run itself
    runs: Sequence[Path]  # every run of the sweep
    files: RunFiles
    sample: int = DEFAULT_SAMPLE

    @cached_property
    def validation_shards(self) -> list[Path]:
        """The validation shards, as the configuration names them."""
        return list_shards(self.files.config.data.val, field="data.val")

    @cached_property
    def validation(self) -> ValidationSet:
        """The validation stream, cut as the run cut it."""
        data = self.files.config.data
        return load_validation(
            self.validation_shards,
            vocab_size=self.files.config.model.vocab_size,
            val_documents=data.val_documents,
            val_tokens=data.val_tokens,
        )

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the run."""
        config = self.files.config
        return load_tokenizer(Path(config.data.tokenizer), vocab_size=config.model.vocab_size)

    @cached_property
    def system(self) -> System:
        """The artifact's model, ready to score."""
        config = self.files.config
        model_config, state = load_artifact(self.files.artifact)
        dist = Dist.single(pick_device(config.runtime.device))
        model = build_model(
            model_config, dist.device, embedding_dtype=config.train.embedding_dtype, attention=config.runtime.attention
        )
        model.load_state_dict(dequantize(state))
        return System(model.requires_grad_(False), self.validation, self.tokenizer, config, self.sample)


def _bytes(audit: Audit) -> Result:
    stated = audit.files.adapted["bytes"].tolist()
    return probe_bytes(audit.tokenizer, audit.tokenizer.byte_table, audit.validation, stated)


# name -> (what it does, in a few words; the probe); the order is that of the report
PROBES: Mapping[str, tuple[str, Callable[[Audit], Result | list[Result]]]] = {
    "records": ("files and figures against their records", lambda a: probe_records(a.files)),
    "size": ("model and code bytes on disk", lambda a: audit_records.probe_size(a.files)),
    "reload": (
        "a fresh process with artifact, program, tokenizer and validation text only",
        lambda a: probe_reload(a.files, a.validation_shards, Path(a.files.config.data.tokenizer)),
    ),
    "timing": ("spans against 600 s and 600 s", lambda a: audit_records.probe_timing(a.files)),
    "separation": (
        "which files were read in which phase",
        lambda a: audit_records.probe_separation(a.files, a.validation_shards),
    ),
    "overlap": (
        "validation documents among the training documents",
        lambda a: audit_records.probe_overlap(a.files, a.validation),
    ),
    "causality": ("later tokens changed, plain", lambda a: audit_causality.probe_causality(a.system)),
    "chunk_borders": ("later tokens changed at chunk borders", lambda a: audit_causality.probe_chunk_borders(a.system)),
    "ttt_causality": ("later tokens changed, adapting", lambda a: audit_causality.probe_ttt_causality(a.system)),
    "across_documents": ("other documents changed", lambda a: audit_causality.probe_across_documents(a.system)),
    "independence": ("the document before replaced", lambda a: audit_causality.probe_independence(a.system)),
    "dependencies": (
        "the graph of documents: which moves which other one's score",
        lambda a: audit_dependence.probe_dependencies(a.system),
    ),
    "normalization": ("probabilities added up", lambda a: audit_distribution.probe_normalization(a.system)),
    "gold_swap": ("the realized token swapped", lambda a: audit_distribution.probe_gold_swap(a.system)),
    "target_gate": (
        "tokens that a gate would look at swapped in, scored as the run scores",
        lambda a: audit_forward.probe_target_gate(a.system),
    ),
    "two_forwards": (
        "learning rate 0 from zero adapters against plain evaluation",
        lambda a: audit_forward.probe_two_forwards(a.system),
    ),
    "score_ledger": ("the chain of scores and updates", lambda a: audit_records.probe_score_ledger(a.files)),
    "adapter_states": ("hashes of what each score read", lambda a: audit_updates.probe_adapter_states(a.system)),
    "poisoned_update": ("update k spoiled", lambda a: audit_updates.probe_poisoned_update(a.system)),
    "lr0_after_k": ("learning rate 0 after update k", lambda a: audit_updates.probe_frozen_updates(a.system)),
    "exactly_once": (
        "how often each target was scored",
        lambda a: audit_records.probe_exactly_once(a.files, a.validation),
    ),
    "order": (
        "documents rescored in stream order",
        lambda a: audit_updates.probe_order(a.system, a.files.events, a.files.nll),
    ),
    "bytes": ("the byte table against decoded text", _bytes),
    "one_configuration": ("all runs of the sweep compared", lambda a: probe_configuration(a.out, a.runs)),
}


def use_threads(count: int) -> None:
    """Let this process compute with so many threads."""
    torch.set_num_threads(count)


def choose_probes(names: str | None) -> list[str]:
    """Return the probes of a comma-separated list, all of them for None. Raises ValueError naming an unknown one."""
    chosen = list(PROBES) if names is None else [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in chosen if name not in PROBES]
    if unknown or not chosen:
        raise ValueError(f"--probes {','.join(unknown)!r} is not known; choose from {', '.join(PROBES)}")
    return [name for name in PROBES if name in chosen]


def run_probes(audit: Audit, probes: Sequence[str], report: Report) -> list[Result]:
    """Run the named probes in order and return their results."""
    results: list[Result] = []
    for number, name in enumerate(probes):
        report("audit", number, len(probes), {"probe": name})
        found = PROBES[name][1](audit)
        results += found if isinstance(found, list) else [found]
    report("audit", len(probes), len(probes), {})
    return results


def audit_run(
    out: Path, runs: Sequence[Path], workdir: Path, *, probes: Sequence[str], sample: int, report: Report
) -> dict[str, Any]:
    """Audit one run, write its audit.json and return what that says.

    Raises FileNotFoundError or ValueError naming a file that is missing or damaged.
    """
    started = time.monotonic()
    audit = Audit(out, runs, load_run(workdir), sample)
    try:
        results = run_probes(audit, probes, report)
    except (KeyError, TypeError, IndexError) as error:  # a record without the figures that a probe needs
        raise ValueError(f"{workdir} is damaged, or of an earlier version: {error!r}") from error
    content = {
        "format": FORMAT,
        "seed": audit.files.config.seed,
        "run": workdir.name,
        **{name: audit.files.run.get(name) for name in ("config_hash", "data_hash", "code_hash")},
        "result": worst(results),
        "sample": sample,
        "seconds": round(time.monotonic() - started, 1),
        "probes": [result.as_json() for result in results],
    }
    write_json(workdir / AUDIT_NAME, json.loads(json.dumps(content).replace("Infinity", '"infinite"')))
    return content


def has_failed(contents: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether any audited run failed a probe."""
    return any(content["result"] == FAIL for content in contents)
