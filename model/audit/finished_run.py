"""A finished run as an audit reads it: its records, ledgers and rows, without any tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from model.config import RunConfig, config_from_plain
from model.data.shards import list_shards
from model.files.plain import read_arrays, read_json
from model.report import STAGES
from model.ttt.ledger_reading import read_events
from model.ttt.score_ledger import Events

LEDGERS = ("prepare", *STAGES)


class RunName(NamedTuple):
    """Which run of a sweep; variant is empty where the sweep names none."""

    variant: str
    seed: int
    repeat: int


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


def name_run(workdir: Path) -> RunName:
    """Return variant, seed and repeat that a run directory is named after. Raises ValueError for another name."""
    found = re.fullmatch(r"(?:variant=(.+)-)?seed=(-?\d+)-repeat=(\d+)", workdir.name)
    if found is None:
        raise ValueError(f"{workdir} is not named seed=S-repeat=R or variant=V-seed=S-repeat=R")
    return RunName(found[1] or "", int(found[2]), int(found[3]))


def find_runs(out: Path, *, seed: int | None = None, variant: str | None = None) -> list[Path]:
    """Return the run directories of a sweep, or out itself if it is one; only those of a seed or variant where given.

    Raises FileNotFoundError if there is none.
    """
    if (out / "run.json").is_file():
        return [out]
    every = sorted(path.parent for path in (out / "seeds").glob("*seed=*-repeat=*/run.json"))
    names = {path: name_run(path) for path in every}
    found = [path for path in every if seed is None or names[path].seed == seed]
    if variant is not None:
        found = [path for path in found if (names[path].variant or "base") == variant]
    if not found:
        what = f"run of {', '.join(_wanted(seed, variant))}" if (seed, variant) != (None, None) else "run"
        known = ", ".join(dict.fromkeys(name.variant for name in names.values() if name.variant))
        there = f" (its variants: {known})" if known else ""
        raise FileNotFoundError(
            f"{out} holds no {what}{there} (seeds/seed=S-repeat=R/run.json); give a sweep's --out folder"
        )
    return found


def _wanted(seed: int | None, variant: str | None) -> list[str]:
    named = [] if variant is None else [f"variant {variant}"]
    return named if seed is None else [*named, f"seed {seed}"]


def is_finished(workdir: Path) -> bool:
    """Return whether a run has come through all its stages."""
    return all((workdir / "stages" / f"{stage}.json").is_file() for stage in STAGES)


def read_parts(path: Path, **parts: type) -> dict[str, Any]:
    """Return a JSON mapping that has the named parts. Raises FileNotFoundError or ValueError naming path."""
    content = read_json(path)
    for name, kind in parts.items():
        if not isinstance(content.get(name), kind):
            raise ValueError(f"{path} is damaged: it has no {name}")
    return content
