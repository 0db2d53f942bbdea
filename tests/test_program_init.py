"""`seedsweep program init`: specs out of submission folders of different layouts, and what is said to be missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.cli import main
from results.findings.run_command import find_commands
from runner.spec.draft import quote
from runner.spec.plain_yaml import SpecLoader
from runner.spec.program import PROGRAM_KEYS
from runner.spec.read import load_spec
from runner.spec.sweep import check_name
from tests.doc_pages import ROOT, blocks
from tests.made_folders import made_log, readme_table, write_folder

SCRIPT = """
import os
data = os.environ.get("DATA_PATH", "./data/datasets/fineweb10B_sp1024")
run_id = os.environ.get("RUN_ID", str(uuid.uuid4()))
seed = int(os.environ.get("SEED", "1337"))
logfile = f"logs/{run_id}.txt"
open("final_model.int8.ptz", "wb")
"""
KEY = "hf_" + "AbCdEfGhIjKlMnOpQr12"


def make(folder: Path, *, seeds: tuple[int, ...] = (42, 0), script: str | None = SCRIPT, **more: Any) -> Path:
    """Write a submission folder with a log for each seed."""
    logs = {f"train_seed{seed}.log": made_log(seed=seed, ttt=1.07) for seed in seeds}
    write_folder(folder, {**logs, **more.pop("files", {})}, **more)
    if script is not None:
        (folder / "train_gpt.py").write_text(script)
    return folder


def init(folder: Path, out: Path, code: int = 0) -> dict[str, Any]:
    """Run the command and return the spec, checked as far as its keys, name and seeds go."""
    assert main(["program", "init", str(folder), "-o", str(out)]) == code
    spec: dict[str, Any] = yaml.load(out.read_text(), Loader=SpecLoader)
    assert list(spec) == ["name", "program", "seeds", "gang", "out"]
    assert set(spec["program"]) <= set(PROGRAM_KEYS)
    check_name(spec["name"])
    if code == 0:
        assert load_spec(out).seeds == tuple(spec["seeds"])
    return spec


def test_a_usual_record_needs_only_a_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data" / "datasets" / "sp8192").mkdir(parents=True)
    command = (
        "RUN_ID=mine SEED=42 DATA_PATH=./data/datasets/sp8192/ MATRIX_LR=1e-4 "
        "torchrun --standalone --nproc_per_node=8 train_gpt.py > train.log 2>&1"
    )
    folder = make(
        tmp_path / "records" / "track" / "2026-04-11_Some Record",
        files={
            "requirements.txt": "numpy\nTorch>=2.9\n",
            "helper.py": "import os, other\n",
            "other.py": "",
            "plot.py": "",
        },
        script=f"from helper import x\n{SCRIPT}",
        submission={"seeds": [42, 0, 1337], "hardware": "8xH100 80GB SXM"},
        readme=f"# A record\n\n```bash\npip install -r requirements.txt\npython data/get.py\n{command}\n```\n",
    )
    spec = init(folder, tmp_path / "spec.yaml")
    assert spec == {
        "name": "2026-04-11_Some-Record",
        "program": {
            "folder": str(folder),
            "command": ["torchrun", "--standalone", "--nproc_per_node={world_size}", "train_gpt.py"],
            "launcher": "torchrun",
            "env": {"RUN_ID": "{run_id}", "DATA_PATH": "./data/datasets/sp8192/", "MATRIX_LR": "1e-4"},
            "seed_env": "SEED",
            "inputs": {"data/datasets/sp8192": str(tmp_path / "data" / "datasets" / "sp8192")},
            "requirements": "requirements.txt",
            "outputs": {"model": ["final_model.int8.ptz"], "code": ["train_gpt.py", "helper.py", "other.py"]},
            "log": ["logs/{run_id}.txt"],
        },
        "seeds": [0, 42, 1337],
        "gang": {"gpus": 8},
        "out": "runs/2026-04-11_Some-Record",
    }
    shown = capsys.readouterr().out
    assert "CHECK" not in shown
    assert "NOT FOUND" not in shown
    assert "# README.md line 6" in (tmp_path / "spec.yaml").read_text()


def test_a_loop_in_the_readme_with_exports_and_no_submission_json(tmp_path: Path) -> None:
    readme = """
Reproduce:

~~~sh
$ export DATA_PATH=/nowhere/data/sp1024   # where the shards are
$ SEEDS=(7 8 9)
$ for s in "${SEEDS[@]}"; do
$   TTT=1 SEED=$s \\
$     CUDA_VISIBLE_DEVICES=0,1,2,3 \\
$     python3 -m torch.distributed.run --nproc-per-node 4 records/x/loop/train_gpt.py | tee $s
$ done
~~~
"""
    folder = make(tmp_path / "loop", seeds=(), files={"notes.txt": "x"}, readme=readme)
    spec = init(folder, tmp_path / "spec.yaml")
    program = spec["program"]
    assert program["command"] == ["torchrun", "--nproc-per-node", "{world_size}", "train_gpt.py"]
    assert program["env"] == {"RUN_ID": "{run_id}", "TTT": "1", "DATA_PATH": "/nowhere/data/sp1024"}
    assert program["inputs"] == ["/nowhere/data/sp1024"]
    assert (spec["seeds"], spec["gang"]) == ([7, 8, 9], {"gpus": 4})
    text = (tmp_path / "spec.yaml").read_text()
    assert "CHECK: DATA_PATH: /nowhere/data/sp1024 is not on this machine; write where it is" in text
    assert "# CUDA_VISIBLE_DEVICES is left out: it is set for every process of a gang" in text
    assert "requirements: null  # NOT FOUND: no requirements.txt" in text


def test_a_shell_script_with_secrets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = f"""#!/bin/bash
set -e
export WANDB_API_KEY=0123456789abcdef0123456789abcdef01234567
export HF_AUTH={KEY}
BATCH=524288
TRAIN_BATCH_TOKENS=$BATCH PAD_TOKEN=0 SEED=${{1:-42}} torchrun --nproc_per_node=${{GPUS:-2}} train_gpt.py --key {KEY}
"""
    folder = make(tmp_path / "shell", files={"run.sh": script}, readme="# See run.sh\n")
    spec = init(folder, tmp_path / "spec.yaml")
    program = spec["program"]
    assert program["env"] == {"TRAIN_BATCH_TOKENS": "524288", "PAD_TOKEN": "0", "RUN_ID": "{run_id}"}
    assert program["command"][-2:] == ["--key", "LEFT_OUT"]
    assert (spec["seeds"], spec["gang"]) == ([0, 42], {"gpus": 2})
    text, shown = (tmp_path / "spec.yaml").read_text(), capsys.readouterr().out
    for secret in (KEY, "0123456789abcdef"):
        assert secret not in text
        assert secret not in shown
    assert "# CHECK: HF_AUTH is left out, it looks like a secret; write HF_AUTH: {secret: true, from_env" in text
    assert "CHECK: program.env.WANDB_API_KEY: WANDB_API_KEY is left out, it looks like a secret" in shown


def test_a_seed_option_braces_and_seeds_of_the_table(tmp_path: Path) -> None:
    readme = (
        readme_table([{"Seed": seed, "BPB": 1.1} for seed in (5, 6)])
        + "Train with `python src/train.py --seed 5 --opt '{\"lr\": 0.1}' --data shards/*.bin --run-id first`.\n"
    )
    folder = make(
        tmp_path / "option", script=None, submission={"seed_results": {"5": {"val_bpb": 1.1}, "6": {"val_bpb": 1.1}}},
        seeds=(), files={"src/train.py": "import argparse\n", "prepare_data.py": "x"}, readme=readme,
    )  # fmt: skip
    spec = init(folder, tmp_path / "spec.yaml")
    program = spec["program"]
    assert program["command"] == [
        "python", "src/train.py", "--seed", "{seed}", "--opt", '{{"lr": 0.1}}', "--data", "shards/*.bin", "--run-id",
        "{run_id}",
    ]  # fmt: skip
    assert (
        "shards/*.bin: no shell fills in the *; name the files if the program does not find them itself"
        in (tmp_path / "spec.yaml").read_text()
    )
    assert program["seed_env"] is None
    assert program["inputs"] == {"shards": "shards"}
    assert "launcher" not in program
    assert (spec["seeds"], spec["gang"]) == ([5, 6], {"gpus": 1})
    assert "CHECK: the command has no --nproc_per_node" in (tmp_path / "spec.yaml").read_text()


def test_a_bare_script_marks_all_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path / "bare", seeds=(), script="print(1)\n")
    spec = init(folder, tmp_path / "spec.yaml", code=1)
    assert spec["program"]["command"] == ["python", "train_gpt.py"]
    assert spec["seeds"] == []
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NOT FOUND")]
    assert [line.split(": ")[1] for line in shown] == [
        "program.command", "program.seed_env", "program.inputs", "program.requirements", "program.outputs.model",
        "seeds",
    ]  # fmt: skip
    text = (tmp_path / "spec.yaml").read_text()
    assert all(line.split(": ", 2)[2] in text for line in shown)


def test_a_launcher_that_cannot_be_started_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path / "a", readme="```\naccelerate launch --num_processes 8 train_gpt.py\n```\n")
    assert init(folder, tmp_path / "spec.yaml")["program"]["command"] == ["python", "train_gpt.py"]
    assert "it is started by accelerate launch (README.md line 2); write it as torchrun" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("requirements", "command", "script", "is_marked"),
    [
        ("numpy\n", "python train_gpt.py", "import os\n  import torch.nn as nn\n", True),
        ("numpy\ntorchvision\npytorch-lightning\n", "torchrun --nproc_per_node=2 train_gpt.py", "import os\n", True),
        ("numpy\n", "python train_gpt.py", "import os\n", False),
        ("torch\n", "python train_gpt.py", "from torch import nn\n", False),
        ("x\ntorch[opt] @ https://h/torch.whl\n", "torchrun --nproc_per_node=2 train_gpt.py", "x = 1\n", False),
        ("https://h/torch-2.9-cp311.whl", "python train_gpt.py", "from torch import nn\n", False),
    ],
)
def test_requirements_without_torch_are_marked_where_it_is_needed(
    tmp_path: Path, requirements: str, command: str, script: str, is_marked: bool
) -> None:
    files = {"requirements.txt": requirements}
    folder = make(tmp_path / "a", files=files, readme=f"Run `SEED=1 {command}`.\n", script=script)
    assert init(folder, tmp_path / "spec.yaml")["program"]["requirements"] == "requirements.txt"
    assert ("CHECK: it does not name torch" in (tmp_path / "spec.yaml").read_text()) is is_marked


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = make(tmp_path / "a"), tmp_path / "spec.yaml"
    out.write_text("mine")
    assert main(["program", "init", str(folder), "-o", str(out)]) == 2
    assert "is already there; choose another name, or --force" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert main(["program", "init", str(folder), "-o", str(out), "--force"]) == 0
    assert out.read_text() != "mine"
    link = tmp_path / "link.yaml"
    link.symlink_to(tmp_path / "gone.yaml")
    assert main(["program", "init", str(folder), "-o", str(link)]) == 2


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["program", "init", str(tmp_path / "nowhere"), "-o", str(tmp_path / "x.yaml")]) == 2
    error = capsys.readouterr().err
    assert error.endswith("nowhere: no such folder\n")
    assert len(error.splitlines()) == 1


def test_the_stand_in_of_the_documentation_is_read_and_reproduces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (script,) = blocks(ROOT / "docs" / "your-recipe.md", "python")
    monkeypatch.chdir(tmp_path)
    for name in ("theirs", "again"):
        folder = make(tmp_path / name, seeds=(), script=script, readme="Run `SEED=1 python train_gpt.py`.\n")
        for seed in (1, 2):
            run = subprocess.run(
                [sys.executable, "train_gpt.py"], cwd=folder, env={"SEED": str(seed)}, capture_output=True, check=True
            )
            (folder / f"train_seed{seed}.log").write_bytes(run.stdout)
    spec = init(Path("theirs"), Path("theirs.yaml"))
    assert (spec["program"]["folder"], spec["out"]) == ("theirs", "runs/theirs")
    assert (spec["seeds"], spec["program"]["command"]) == ([1, 2], ["python", "train_gpt.py"])
    capsys.readouterr()
    assert main(["compare", "again", "theirs", "--reproduces"]) == 0
    shown = capsys.readouterr().out
    assert "   1      1.20033    1.20033         +0.00000             30           30" in shown
    assert shown.splitlines()[-1].startswith("reproduced: the mean of again - theirs is +0.00000 bpb")


@pytest.mark.parametrize(
    "line",
    [
        "SEED=42 torchrun --nproc_per_node=8 train_gpt.py",
        "$ SEED=42 /opt/venv/bin/torchrun --nproc_per_node=8 ./train_gpt.py 2>&1 | tee log",
        "cd /workspace && env SEED=42 torchrun --nproc_per_node=8 /workspace/x/train_gpt.py && echo done",
        "for SEED in 42; do SEED=$SEED torchrun --nproc_per_node=8 train_gpt.py &> $SEED.log; done",
        "nohup env SEED=${SEED:-42} torchrun --nproc_per_node=8 train_gpt.py > log &",
        "SEED=42 python3.11 -m torch.distributed.launch --nproc_per_node=8 train_gpt.py # eight cards",
        "uv run torchrun --nproc_per_node=8 train_gpt.py --seed=42",
    ],
)
def test_forms_of_one_command_are_read_as_one(line: str) -> None:
    (found,) = find_commands({"run.sh": line + "\n"}, {"train_gpt.py"})
    words = [word for word in found.words if not word.startswith("--seed")]
    assert words == ["torchrun", "--nproc_per_node=8", "train_gpt.py"]
    assert found.seeds == [42]
    assert "{seed}" in [*found.env.values(), *(word.removeprefix("--seed=") for word in found.words)]


@pytest.mark.parametrize(
    "line",
    [
        "pip install torchrun",
        "python prepare_data.py",
        "python train_gpt.py --eval x",
        "echo 'SEED=1 torchrun a.py",
        "ls",
    ],
)
def test_other_commands_are_not_taken_for_it(line: str) -> None:
    assert find_commands({"run.sh": line}, {"train_gpt.py", "prepare_data.py", "a.py"}) == []


@pytest.mark.parametrize(
    "text",
    [
        "1e-4", "yes", "off", "~", "0x10", "null", "1:30", "a b", "{seed}", "- x", "", "\u00fc\t'\"", "a: b", "#x",
        "2026-01-01", "a,b", "[x]",
    ],
)  # fmt: skip
def test_text_reads_back_as_the_same_text(text: str) -> None:
    assert yaml.load(f"[{quote(text)}]", Loader=SpecLoader) == [text]
    assert yaml.load(f"key: {quote(text)}  # why", Loader=SpecLoader) == {"key": text}
