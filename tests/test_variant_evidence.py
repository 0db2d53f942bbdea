"""export, verify, bundle and audit on a sweep of variants: one is taken, the others are named, all stay apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import results
from jobs.cli import main
from jobs.evidence.bundle import find_workdir
from model.audit.configuration import probe_configuration
from model.audit.finished_run import find_runs
from results.export.evidence import EVIDENCE
from results.store.writer import commit_attempt
from results.verify.checks import read_arrays
from tests.small_run import small_sweep

AUTHOR = ("--author", "A", "--github-id", "a")


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a sweep of the variants base and gate, made of the runs of a plain one; do not write to it."""
    plain, out = small_sweep(), tmp_path_factory.mktemp("ablation") / "out"
    sweep = json.loads((plain / "sweep.json").read_text())
    for variant in ("base", "gate"):
        for _, row in results.load(plain).iterrows():
            name = f"seed={row['seed']}-repeat=0"
            workdir = Path(shutil.copytree(plain / "seeds" / name, out / "seeds" / f"variant={variant}-{name}"))
            records = [json.loads(path.read_text()) for path in sorted((workdir / "stages").glob("*.json"))]
            kept = {key: as_plain(value) for key, value in row.items() if key not in ("run_id", "schema_version")}
            run = {key: value for key, value in kept.items() if value is not None} | {"variant": variant}
            arrays = {
                key: value for part in ("evaluate.npz", "ttt.npz") for key, value in read_arrays(workdir / part).items()
            }
            commit_attempt(out, run=run, stages=records, steps=read_arrays(workdir / "steps.npz"), documents=arrays)
    hashes = dict.fromkeys(("base", "gate"), sweep["config_hash"])
    announced = [{**entry, "variants": list(hashes)} for entry in sweep["announcements"]]
    (out / "sweep.json").write_text(json.dumps({**sweep, "variants": hashes, "announcements": announced}))
    return out


def as_plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    return None if not isinstance(value, list) and pd.isna(value) else value


def test_one_variant_is_exported_and_verifies(
    ablation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    assert main(["export", str(ablation), "--variant", "gate", *AUTHOR, "-o", str(folder)]) == 0
    assert json.loads((folder / "submission.json").read_text())["variant"] == "gate"
    runs = sorted(path.name for path in (folder / EVIDENCE / "results" / "runs").iterdir())
    assert runs == [f"variant=gate-seed={seed}-repeat=0-attempt=1.parquet" for seed in (0, 42)]
    assert (folder / EVIDENCE / "variant=gate-seed=42-repeat=0" / "run.json").is_file()
    assert not list(folder.rglob("*base*"))
    capsys.readouterr()
    assert main(["verify", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "0 differ" in shown
    assert shown.count("not checked") == 2  # the weights before quantization, as in any export
    sweep = folder / EVIDENCE / "sweep.json"
    sweep.write_text(sweep.read_text().replace(json.loads(sweep.read_text())["config_hash"], "0" * 64))
    assert main(["verify", str(folder)]) == 1
    assert "config_hash of the rows" in capsys.readouterr().out


def test_export_and_bundle_name_the_variants(
    ablation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments in (["export", str(ablation), *AUTHOR], ["bundle", str(ablation)]):
        assert main([*arguments, "-o", str(tmp_path / "folder")]) == 2
        error = capsys.readouterr().err
        assert "holds 2 variants (base, gate); name one with --variant, such as --variant base" in error
        assert error.count("\n") == 1
        assert main([*arguments, "-o", str(tmp_path / "folder"), "--variant", "gat"]) == 2
        assert "has no variant 'gat'; nearest: gate" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()


def test_bundle_takes_a_run_of_the_variant(ablation: Path) -> None:
    assert find_workdir(ablation, None, 0, "gate").name == "variant=gate-seed=42-repeat=0"
    assert find_workdir(ablation, 0, 0, "base").name == "variant=base-seed=0-repeat=0"
    assert find_workdir(small_sweep(), None, 0, "base").name == "seed=42-repeat=0"
    with pytest.raises(FileNotFoundError, match="no artifact of seed=5"):
        find_workdir(ablation, 5, 0, "gate")


def probe(out: Path) -> tuple[str, str]:
    result = probe_configuration(out, find_runs(out))
    return result.result, result.detail


def test_every_variant_is_one_configuration(ablation: Path, tmp_path: Path) -> None:
    assert [path.name for path in find_runs(ablation, variant="gate", seed=42)] == ["variant=gate-seed=42-repeat=0"]
    assert len(find_runs(ablation)) == 4
    with pytest.raises(FileNotFoundError, match=r"no run of variant gat \(its variants: base, gate\)"):
        find_runs(ablation, variant="gat")
    assert probe(ablation)[0] == "pass"
    out = Path(shutil.copytree(ablation, tmp_path / "out"))

    def edit(name: str, **changes: str) -> None:
        path = out / "seeds" / name / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def announce(**changes: Any) -> None:
        path = out / "sweep.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    for seed in (0, 42):
        edit(f"variant=gate-seed={seed}-repeat=0", config_hash="9" * 64)
    assert probe(out) == ("fail", "variant=gate-seed=0-repeat=0: config_hash is not that of sweep.json")
    hashes = json.loads((out / "sweep.json").read_text())["variants"]
    announce(variants=hashes | {"gate": "9" * 64})
    assert probe(out)[0] == "pass"  # each variant has its own
    edit("variant=gate-seed=42-repeat=0", config_hash="8" * 64)
    assert probe(out)[1].startswith("config_hash differs (variant=gate-seed=0-repeat=0")
    edit("variant=gate-seed=42-repeat=0", config_hash="9" * 64)
    for seed in (0, 42):
        edit(f"variant=gate-seed={seed}-repeat=0", code_hash="7" * 64)
    assert probe(out)[1].startswith("code_hash differs (variant=base-seed=0-repeat=0")


def test_announced_runs_of_every_variant_must_be_there(ablation: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(ablation, tmp_path / "out"))
    shutil.rmtree(out / "seeds" / "variant=gate-seed=42-repeat=0")
    assert probe(out) == ("fail", "variant gate seed 42 was announced, but is neither here nor listed as failed")
    failed = {"variant": "gate", "seed": 42, "repeat": 0, "state": "FAILED"}
    (out / "state.json").write_text(json.dumps({"runs": [failed]}))
    assert probe(out)[0] == "pass"
    sweep = json.loads((out / "sweep.json").read_text())
    sweep["announcements"][0]["variants"] = ["base"]
    (out / "sweep.json").write_text(json.dumps(sweep))
    assert probe(out) == ("fail", "variant gate seed 0 was never announced")


def test_the_audit_command_takes_one_variant(
    ablation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(ablation, tmp_path / "out"))
    arguments = ["audit", str(out), "--variant", "gate", "--seed", "42", "--probes", "one_configuration"]
    assert main([*arguments, "--format", "json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [run["run"] for run in runs] == ["variant=gate-seed=42-repeat=0"]
    assert main(["report", f"{out}#base", "-o", str(tmp_path / "base.html")]) == 0
    assert "<h3>Audit</h3>" not in (tmp_path / "base.html").read_text()
    assert main(["report", str(out), "-o", str(tmp_path / "all.html")]) == 0
    assert "variant=gate-seed=42-repeat=0" in (tmp_path / "all.html").read_text()
