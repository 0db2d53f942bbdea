"""Specs, folders and cluster pieces that the runner's tests share."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner import sweep
from runner.spec.gang import Gang, Limits
from runner.spec.read import parse_spec
from runner.spec.sweep import SweepSpec

QUICK = Limits(backoff_s=0.05, backoff_max_s=0.1, attempts=3, start_s=120.0, stall_s=60.0, heartbeat_s=60.0)


def make_spec(out: Path, *, gang: Gang | None = None, limits: Limits = QUICK, **changes: Any) -> SweepSpec:
    """Return a tiny sweep whose data is never read (tests that read it name their own)."""
    plain = {
        "name": "test", "preset": "tiny", "seeds": [42, 0, 1337], "out": str(out),
        "overrides": {"runtime": {"device": "cpu"}},
        "data": {"train": "none_train_*.bin", "val": "none_val_*.bin", "tokenizer": "none.model"}, **changes,
    }  # fmt: skip
    return replace(parse_spec(plain), gang=gang or Gang(cpus=1), limits=limits)


def write_faults(out: Path, *faults: dict[str, Any]) -> None:
    """Tell the stub work what goes wrong where."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "faults.json").write_text(json.dumps(faults))


def grow_old(out: Path) -> None:
    """Make a dead driver's heartbeat a minute older: its folder is taken without a look whether the heartbeat moves."""
    path = out / "heartbeat.json"
    beat = json.loads(path.read_text())
    path.write_text(json.dumps({**beat, "beat": beat["beat"] - 61.0}))


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give every sweep the same data hash without reading any data."""
    monkeypatch.setattr(sweep, "data_hash", lambda _data, **_more: "d" * 64)


def state_of(out: Path) -> dict[int, str]:
    """Return seed -> state as state.json has it."""
    return {run["seed"]: run["state"] for run in json.loads((out / "state.json").read_text())["runs"]}


def scores_of(out: Path) -> dict[int, float]:
    """Return seed -> post-TTT bpb of every finished attempt in the Parquet files; a seed that came twice fails."""
    from results.store.reader import read_runs

    frame = read_runs(out).frame
    done = frame[frame["state"] == "DONE"]
    assert done["seed"].is_unique
    return dict(zip(done["seed"].astype(int), done["post_ttt_bpb"]))
