"""Ablations as users run them: the whole pipeline at its smallest, on Ray and without, and drivers that are killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from tests.bench.sweep import SMALL, make_corpus
from tests.sweep_tools import grow_old
from tests.test_runner_ablation import begun, scores

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
DEMO: dict[str, Any] = yaml.safe_load((ROOT / "jobs" / "specs" / "ablation_demo.yaml").read_text())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a few modules' docstrings, and their tokenizer."""
    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    make_corpus({"out": str(folder)}, SimpleNamespace(report=lambda *_: None))  # type: ignore[arg-type]
    return folder


def run_demo(out: Path, corpus: Path, variants: list[str], *flags: str) -> None:
    """Run some of the demo's variants over one seed of the smallest model, in a process of its own."""
    data = {
        "train": f"{corpus}/*_train_*.bin", "val": f"{corpus}/*_val_*.bin", "tokenizer": f"{corpus}/text.model",
    }  # fmt: skip
    chosen = {name: DEMO["variants"][name] for name in variants}
    plain = {**DEMO, "overrides": SMALL, "seeds": [42], "variants": chosen, "data": data, "out": str(out)}
    spec = out.with_suffix(".yaml")
    spec.write_text(yaml.safe_dump(plain, sort_keys=False))
    command = [sys.executable, "-m", "jobs.cli", "run", str(spec), "--progress", "plain", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def computed(out: Path) -> Counter[str]:
    """Return how many runs computed each stage themselves, from the records."""
    records = [json.loads(path.read_text()) for path in out.glob("seeds/*/stages/*.json")]
    return Counter(record["stage"] for record in records if not record.get("reused_from"))


def donations(out: Path) -> Counter[str]:
    """Return how many attempts were given each stage by another run, from the events."""
    lines = (out / "events.jsonl").read_text().splitlines()
    return Counter(stage for line in lines for stage in json.loads(line).get("donors", ()))


@pytest.fixture(scope="module")
def demo(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of all seven variants, run one after the other in one process."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    run_demo(out, corpus, list(DEMO["variants"]), "--local")
    return out


def test_the_demo_trains_three_times_for_seven_runs(demo: Path) -> None:
    assert computed(demo) == {"train": 3, "quantize": 5, "evaluate": 5, "ttt": 7}
    assert donations(demo) == {"train": 4, "quantize": 2, "evaluate": 2}
    assert set(scores(demo)) == {(name, 42) for name in DEMO["variants"]}


def test_gangs_on_ray_share_stages_alike_and_score_the_same(demo: Path, corpus: Path, tmp_path: Path) -> None:
    variants, out = ["base", "slow_matrices", "bits_5", "fast_ttt"], tmp_path / "ray"
    run_demo(out, corpus, variants)
    assert computed(out) == {"train": 2, "quantize": 3, "evaluate": 3, "ttt": 4}
    assert donations(out) == {"train": 2, "quantize": 1, "evaluate": 1}
    assert scores(out) == {(name, 42): scores(demo)[name, 42] for name in variants}


def test_a_driver_that_is_killed_again_and_again_ends_with_each_stage_computed_once(tmp_path: Path) -> None:
    out = tmp_path / "killed"
    variants = {"base": {}, "wide": {"train": {"matrix_lr": 0.5}}, "fast": {"ttt": {"lr": 0.5}}}
    given = json.dumps({"out": str(out), "seeds": [1, 2], "variants": variants, "is_local": True})
    command = [sys.executable, "-m", "tests.drive_sweep", given]
    for num_finished in (1, 6, 11):  # of the 18 stages that runs compute themselves
        driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            wait_for_stages(out, num_finished, driver)
        finally:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
        assert 0 < sum(computed(out).values()) < 18
        grow_old(out)
    subprocess.run(command, cwd=ROOT, check=True, timeout=120, stdout=subprocess.DEVNULL)
    assert set(scores(out)) == {(name, seed) for name in variants for seed in (1, 2)}
    assert computed(out) == {"train": 4, "quantize": 4, "evaluate": 4, "ttt": 6}
    assert begun(out)["ttt"] >= 6


def wait_for_stages(out: Path, count: int, driver: subprocess.Popen[bytes]) -> None:
    """Wait until runs of a sweep have computed so many stages."""
    deadline = time.monotonic() + 120
    while sum(computed(out).values()) < count:
        assert driver.poll() is None, "the sweep was over before"
        assert time.monotonic() < deadline
        time.sleep(0.02)
