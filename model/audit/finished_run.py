"""A finished run as an audit reads it: its records, ledgers and rows, without any tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from model.config import RunConfig, config_from_plain
from model.data.shards import list_shards
from model.files.plain import read_arrays, read_json
from model.report import STAGES
from model.ttt.ledger_reading import read_events
from model.ttt.score_ledger import Events

LEDGERS = ("prepare", *STAGES)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """What one run directory says about its run."""

    workdir: Path
    run: Mapping[str, Any]  # run.json
    config: RunConfig
    records: Mapping[str, Mapping[str, Any]]  # stages/<stage>.json by stage
    ledgers: Mapping[str, Mapping[str, Any]]  # ledger/<stage>.json by stage, "prepare" first
    events: Events
    nll: np.ndarray  # (N,) post-TTT, of every target
    plain: Mapping[str, np.ndarray]  # evaluate.npz
    adapted: Mapping[str, np.ndarray]  # ttt.npz
    train_shards: list[Path] = field(default_factory=list)

    @property
    def artifact(self) -> Path:
        """The model file."""
        return self.workdir / "model.ssq"

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics of all stages."""
        return {name: value for record in self.records.values() for name, value in record["metrics"].items()}


def load_run(workdir: Path) -> RunFiles:
    """Read a finished run directory.

    Raises FileNotFoundError or ValueError naming the file that is missing or damaged.
    """
    run = read_parts(workdir / "run.json", data=dict, config=dict)
    try:
        config = config_from_plain(run["config"])
    except (KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{workdir / 'run.json'} holds no configuration of this version ({error})") from error
    scores = read_arrays(workdir / "ttt_scores.npz")
    if "nll" not in scores:
        raise ValueError(f"{workdir / 'ttt_scores.npz'} has no nll; run the ttt stage again")
    return RunFiles(
        workdir=workdir,
        run=run,
        config=config,
        records={
            stage: read_parts(workdir / "stages" / f"{stage}.json", metrics=dict, outputs=dict) for stage in STAGES
        },
        ledgers={stage: read_parts(workdir / "ledger" / f"{stage}.json", spans=list, reads=list) for stage in LEDGERS},
        events=read_events(scores),
        nll=scores["nll"],
        plain=read_arrays(workdir / "evaluate.npz"),
        adapted=read_arrays(workdir / "ttt.npz"),
        train_shards=list_shards(config.data.train, field="data.train"),
    )


def find_runs(out: Path, *, seed: int | None = None) -> list[Path]:
    """Return the run directories of a sweep, or out itself if it is one; only those of a seed where one is given.

    Raises FileNotFoundError if there is none.
    """
    if (out / "run.json").is_file():
        return [out]
    pattern = "seed=*-repeat=*" if seed is None else f"seed={seed}-repeat=*"
    found = sorted(path.parent for path in (out / "seeds").glob(f"{pattern}/run.json"))
    if not found:
        what = "run" if seed is None else f"run of seed {seed}"
        raise FileNotFoundError(f"{out} holds no {what} (seeds/seed=S-repeat=R/run.json); give a sweep's --out folder")
    return found


def is_finished(workdir: Path) -> bool:
    """Return whether a run has come through its last stage."""
    return (workdir / "stages" / f"{STAGES[-1]}.json").is_file()


def read_parts(path: Path, **parts: type) -> dict[str, Any]:
    """Return a JSON mapping that has the named parts. Raises FileNotFoundError or ValueError naming path."""
    content = read_json(path)
    for name, kind in parts.items():
        if not isinstance(content.get(name), kind):
            raise ValueError(f"{path} is damaged: it has no {name}")
    return content
