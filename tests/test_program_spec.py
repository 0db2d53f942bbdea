"""The program section of a spec: what fits, what is refused in one line, what is secret, what a rank makes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runner.gang.program_place import Place, gpus_of, kept_environment, make_command, make_environment_of
from runner.gang.rank import Rank
from runner.life.job import Job
from runner.spec.program import fill, parse_program
from runner.spec.read import parse_spec
from runner.spec.secrets import looks_like_secret
from runner.spec.sweep import RunKey, SweepSpec

PLAIN = {"name": "rerun", "program": {"folder": "prog"}, "seeds": [1, 2], "out": "out"}
HF = "hf_" + "a1B2c3D4" * 4


def program_spec(**section: Any) -> SweepSpec:
    """Return a spec whose program section has these keys."""
    return parse_spec({**PLAIN, "program": {"folder": "prog", **section}})


def make_rank(spec: SweepSpec, *, rank: int = 0, world_size: int = 1, uses_gpus: bool = False) -> Rank:
    """Return a rank of the first seed of a program."""
    return Rank(
        Job(
            key=RunKey(seed=1), attempt=2, config=spec.config, world_size=world_size, threads=3, uses_gpus=uses_gpus,
            workdir="/run", out="/out", program=spec.program, record={"sweep": spec.name}, secrets={"HF_TOKEN": HF},
        ),
        rank,
    )  # fmt: skip


PLACE = Place(work=Path("/w"), out=Path("/o"), python="/env/bin/python", port=7)


def test_defaults_are_the_challenges_and_a_program_always_starts_from_scratch() -> None:
    spec = program_spec()
    assert spec.program is not None
    assert spec.program.command == ("python", "train_gpt.py")
    assert (spec.program.seed_env, spec.program.launcher, spec.limits.restart) == ("SEED", "none", "scratch")
    assert spec.program.folder == str(Path("prog").absolute())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preset": "tiny"}, "preset is of our own recipes"),
        ({"data": {}}, "data is of our own recipes"),
        ({"restart": "checkpoint"}, "restart=checkpoint is of our own recipes"),
        ({"limits": {"restart": "checkpoint"}}, "restart=checkpoint is of our own recipes"),
        ({"gang": {"gpus": 2, "hosts": 2}}, "a program's processes meet on one host"),
        ({"program": {}}, "program.folder is missing"),
        ({"program": {"folder": "p", "comand": ["x"]}}, "unknown key 'comand'; did you mean 'command'"),
        ({"program": {"folder": "p", "command": "python train_gpt.py"}}, "must be a list of words"),
        ({"program": {"folder": "p", "command": ["python", "{sed}"]}}, "placeholder {sed}; did you mean 'seed'"),
        ({"program": {"folder": "p", "env": {"A": '{"a": 1}'}}}, "a single { in '{\"a\": 1}'; double the braces"),
        ({"program": {"folder": "p", "command": ["python", HF]}}, "looks like a secret, and commands are recorded"),
        ({"program": {"folder": "p", "command": ["torchrun", "x.py"], "launcher": "none"}}, "leave it out"),
        ({"program": {"folder": "p", "launcher": "mpirun"}}, "launcher='mpirun' must be torchrun"),
        ({"program": {"folder": "p", "env": {"RANK": 0}}}, "program.env.RANK is set for each process"),
        ({"program": {"folder": "p", "env": {"SEED": 1}}}, "program.env.SEED is what program.seed_env sets"),
        ({"program": {"folder": "p", "env": {"A B": 1}}}, "'A B' is no name of a variable"),
        ({"program": {"folder": "p", "env": {"A": [1]}}}, "program.env.A must be text or a number"),
        ({"program": {"folder": "p", "env": {"WANDB_API_KEY": "0123456789abcdef"}}}, "KEY looks like a secret"),
        ({"program": {"folder": "p", "env": {"X": {"secret": False, "from_env": "X"}}}}, "or {secret: true, from_env"),
        ({"program": {"folder": "p", "inputs": ["s3://b/x"]}}, "must be a file or a folder on the node"),
        ({"program": {"folder": "p", "inputs": {"x": "/mnt/*.bin"}}}, "program.inputs.x='/mnt/*.bin' is a pattern"),
        ({"program": {"folder": "p", "inputs": {"x": "/mnt/a[0-9]"}}}, "name the files' folder"),
        ({"program": {"folder": "p", "inputs": {"../x": "/x"}}}, "must be a path inside the program's folder"),
        ({"program": {"folder": "p", "requirements": "/etc/r.txt"}}, "must be a path inside the program's folder"),
        ({"program": {"folder": "p", "outputs": {"modle": "x"}}}, "unknown key 'modle'"),
        ({"seeds": []}, "seeds is empty"),
        ({"out": ""}, "out is missing"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as refused:
        parse_spec({**PLAIN, **changes})
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)
    assert HF not in str(refused.value)


def test_a_program_survives_json_and_no_secret_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", HF)
    spec = program_spec(
        env={
            "LR": 0.1, "FLAG": True, "DATA": '{{"a": {{"b": 1}}}}',
            "HF_TOKEN": {"secret": True, "from_env": "MY_TOKEN"},
        },
        inputs={"data": "/d", "tok": "/t"}, outputs=["*.ptz"], log="logs/*.txt", seed_env="TRAIN_SEED",
    )  # fmt: skip
    text = json.dumps(spec.to_json())
    assert HF not in text
    assert SweepSpec.from_json(json.loads(text)) == spec
    assert spec.program is not None
    assert spec.program.env == {"LR": "0.1", "FLAG": "1", "DATA": '{{"a": {{"b": 1}}}}'}
    assert fill(spec.program.env["DATA"], {}) == '{"a": {"b": 1}}'
    assert "program" not in parse_spec(
        {"name": "n", "preset": "tiny", "seeds": [1], "out": "o", "data": {"train": "a", "val": "b", "tokenizer": "c"}}
    ).to_json()  # fmt: skip


def test_the_hash_names_command_and_settings_and_no_places() -> None:
    base = program_spec().config_hash
    assert base == program_spec(folder="elsewhere", inputs=["/x"], log="a.txt").config_hash
    for change in ({"command": ["python", "x.py"]}, {"env": {"LR": 1}}, {"seed_env": "S"}, {"launcher": "torchrun"}):
        assert program_spec(**change).config_hash != base
    assert parse_spec({**PLAIN, "gang": {"ranks": 2}}).config_hash != base


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "abcdefgh12"), ("WANDB_API_KEY", "x"), ("DB_PASSWORD", "hunter2"), ("AWS_SECRET_ACCESS_KEY", "k"),
        ("aws_secret", "k"), ("ANY", HF), ("ANY", "ghp_" + "a" * 36), ("ANY", "AKIA" + "A1" * 8),
        ("URL", "https://user:pass@host/x"), ("ANY", "q7Zk2mP9xW4vB8nL3tR6yC1dF5gH0jQa"),
        ("ANY", "sk-ant-" + "a1" * 12), ("MY_AUTH", "Basic abcdef"), ("SLACK", "xoxb-1234567890-abcdef"),
    ],
)  # fmt: skip
def test_passwords_keys_and_tokens_are_known_by_name_or_shape(name: str, value: str) -> None:
    assert looks_like_secret(name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TRAIN_BATCH_TOKENS", "524288"), ("VAL_TOKENS", "47851520"), ("TOKENIZER_PATH", "./data/tok.model"),
        ("PAD_TOKEN", "<pad>"), ("BOS_TOKEN", "1"), ("NUM_KV_HEADS", "4"), ("KEY", "value"), ("EMPTY_SECRET", ""),
        ("COMMIT", "0123456789abcdef0123456789abcdef01234567"),
        ("DATA_PATH", "/data/Fineweb10B_sp1024/Part_0001_a_B/x"),
        ("RUN_ID", "baseline_sp1024_9x512_KV4_run_2026_11_27_final_ABc"), ("LR", "1e-4"), ("SPARSE_ATTN", "1"),
        ("MASK_TOKEN_FRAC", "0.15"), ("VOCAB_HASH", "a" * 64),
    ],
)  # fmt: skip
def test_settings_of_a_training_are_no_secrets(name: str, value: str) -> None:
    assert not looks_like_secret(name, value)


def test_each_rank_finds_its_place_as_torchrun_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MATRIX_LR", "9")  # of the shell that started the driver
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("PYTHONPATH", "/ours")
    spec = program_spec(env={"RUN_ID": "{run_id}", "WHERE": "{workdir}:{out}"})
    assert spec.program is not None
    env = make_environment_of(make_rank(spec, rank=1, world_size=2), spec.program, PLACE)
    assert [env[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")] == ["1", "1", "2", "2"]
    assert (env["MASTER_ADDR"], env["MASTER_PORT"], env["SEED"], env["OMP_NUM_THREADS"]) == ("127.0.0.1", "7", "1", "3")
    assert (env["RUN_ID"], env["WHERE"]) == ("rerun-seed1-repeat0", "/w:/o")
    assert env["CUDA_VISIBLE_DEVICES"] == ""
    assert env["HF_TOKEN"] == HF
    assert env["PATH"].startswith("/env/bin:")
    assert not {"MATRIX_LR", "RAY_ADDRESS", "PYTHONPATH"} & set(env)


def test_a_rank_on_gpus_sees_those_of_its_gang_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    rank = make_rank(program_spec(), world_size=2, uses_gpus=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert gpus_of(rank) == ("4", "5")
    rank.visible_gpus = ("2", "7")
    assert gpus_of(rank) == ("2", "7")


def test_no_key_of_the_drivers_shell_reaches_a_program() -> None:
    shell = {
        "PATH": "/bin", "HF_TOKEN": "abcdefgh12", "NCCL_DEBUG": "INFO", "https_proxy": "http://me:pw@proxy:1",
        "HTTP_PROXY": "http://proxy:1", "LR": "1", "TORCH_LOGS": "all",
    }  # fmt: skip
    kept = kept_environment(shell)
    assert kept == {"PATH": "/bin", "NCCL_DEBUG": "INFO", "HTTP_PROXY": "http://proxy:1", "TORCH_LOGS": "all"}


@pytest.mark.parametrize(
    ("section", "command"),
    [
        ({"command": ["python", "a.py", "--seed", "{seed}"]}, ["/env/bin/python", "a.py", "--seed", "1"]),
        ({"command": ["bash", "a.sh"]}, ["bash", "a.sh"]),
        (
            {"launcher": "torchrun"},
            ["/env/bin/python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train_gpt.py"],
        ),
        (
            {"command": ["torchrun", "--standalone", "--nproc_per_node={world_size}", "x.py"]},
            ["/env/bin/python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "x.py"],
        ),
        (
            {"command": ["bash", "run.sh"], "launcher": "torchrun"},
            ["/env/bin/python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--no-python",
             "bash", "run.sh"],
        ),
    ],
)  # fmt: skip
def test_the_command_is_filled_in_and_torchrun_put_before_it(section: dict[str, Any], command: list[str]) -> None:
    spec = program_spec(**section)
    assert spec.program is not None
    assert make_command(make_rank(spec, world_size=2).job, spec.program, PLACE) == command


def test_what_a_program_prints_of_its_secret_is_not_recorded(tmp_path: Path) -> None:
    rank = make_rank(program_spec())
    failure = rank.failure_of(RuntimeError(f"401 for {HF}"))
    assert HF not in json.dumps(failure.to_json())
    assert "401 for ***" in failure.message
    assert HF not in repr(rank.job)


def test_a_secret_that_the_driver_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from runner.work import read_secrets

    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(
        ValueError, match=r"program\.env\.HF_TOKEN: NOT_SET is not set in the environment of the driver"
    ):
        read_secrets(program_spec(env={"HF_TOKEN": {"secret": True, "from_env": "NOT_SET"}}))


def test_inputs_may_be_one_text_a_list_or_links() -> None:
    assert parse_program({"folder": "p", "inputs": "/a"}).inputs == {"/a": "/a"}
    assert parse_program({"folder": "p", "inputs": {"data/x": "/a"}}).inputs == {"data/x": "/a"}
