"""model/corpus/fineweb.py against a loopback server that speaks the hub's protocol."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model.config import DataConfig
from model.corpus.fineweb import STAGING, FetchOptions, fetch_fineweb
from model.corpus.shard_file import write_shard
from model.data.manifest import MANIFEST_NAME, check_data, hash_data, read_manifest
from tests import fake_hub
from tests.fake_hub import COMMIT, REPO, FakeHub

TOKENIZER = Path(__file__).parent / "data" / "fineweb_8192_bpe.model"
FOLDER = "datasets/datasets/fineweb10B_sp8192/"


def ignore(phase: str, step: int, total: int | None, metrics: dict[str, float | int | str]) -> None:
    """A report callback that nobody reads."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    files = {
        "datasets/tokenizers/fineweb_8192_bpe.model": TOKENIZER.read_bytes(),
        "datasets/tokenizers/fineweb_1024_bpe.model": b"another variant",
        "datasets/manifest.json": b"{}",
        "README.md": b"about",
    }
    for name, seed in (("val_000000", 0), ("train_000000", 1), ("train_000001", 2), ("train_000002", 3)):
        tokens = np.random.default_rng(seed).integers(4, 8192, 5000)
        tokens[[0, 1000]] = 1
        write_shard(tmp_path / "shard.bin", tokens)
        files[f"{FOLDER}fineweb_{name}.bin"] = (tmp_path / "shard.bin").read_bytes()
    with fake_hub.serve(files) as server:
        yield server


def options(hub: FakeHub, num_shards: int | None = None) -> FetchOptions:
    return FetchOptions(repo=REPO, num_shards=num_shards, endpoint=hub.endpoint)


def config(out: Path) -> DataConfig:
    return DataConfig(
        train=str(out / "fineweb_train_*.bin"),
        val=str(out / "fineweb_val_*.bin"),
        tokenizer=str(out / "fineweb_8192_bpe.model"),
    )


def test_the_first_shards_arrive_with_tokenizer_and_manifest(hub: FakeHub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    corpus = fetch_fineweb(out, options(hub, 2), ignore)
    assert sorted(path.name for path in out.iterdir()) == [
        "fineweb_8192_bpe.model",
        "fineweb_train_000000.bin",
        "fineweb_train_000001.bin",
        "fineweb_val_000000.bin",
        "manifest.json",
    ]
    assert corpus.splits["train"].tokens == 10_000
    assert corpus.splits["val"].documents == 2
    for path in out.glob("*.bin"):
        assert path.read_bytes() == hub.files[FOLDER + path.name]
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.source["revision"] == COMMIT
    assert check_data(config(out), vocab_size=8192, is_deep=True) == []
    assert hash_data(config(out)).data_hash


def test_a_second_call_fetches_nothing_and_more_shards_can_follow(hub: FakeHub, tmp_path: Path) -> None:
    fetch_fineweb(tmp_path / "out", options(hub, 1), ignore)
    hub.requests.clear()
    fetch_fineweb(tmp_path / "out", options(hub, 1), ignore)
    assert hub.downloads() == []
    corpus = fetch_fineweb(tmp_path / "out", options(hub), ignore)
    assert hub.downloads() == ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert corpus.splits["train"].tokens == 15_000


def test_a_transfer_that_breaks_off_continues_where_it_was(hub: FakeHub, tmp_path: Path) -> None:
    hub.cut_after[f"{FOLDER}fineweb_train_000000.bin"] = 4000
    out = tmp_path / "out"
    fetch_fineweb(out, options(hub, 1), ignore)
    assert hub.downloads().count("fineweb_train_000000.bin") == 2
    assert (out / "fineweb_train_000000.bin").read_bytes() == hub.files[f"{FOLDER}fineweb_train_000000.bin"]


def test_a_stopped_fetch_continues_with_the_file_it_was_at(hub: FakeHub, tmp_path: Path) -> None:
    def stop(phase: str, step: int, total: int | None, metrics: dict[str, float | int | str]) -> None:
        if (phase, metrics["file"]) == ("fetch", "fineweb_train_000000.bin"):
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        fetch_fineweb(out, options(hub), stop)
    assert not (out / MANIFEST_NAME).exists()
    hub.requests.clear()
    (out / "fineweb_val_000000.bin").write_bytes(b"damaged meanwhile")
    fetch_fineweb(out, options(hub), ignore)
    assert hub.downloads() == ["fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    assert check_data(config(out), is_deep=True) == []


def test_a_file_that_arrives_damaged_is_not_kept(hub: FakeHub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for path in ("datasets/tokenizers/fineweb_8192_bpe.model", f"{FOLDER}fineweb_val_000000.bin"):
        hub.corrupt = {path}
        with pytest.raises(ConnectionError, match="arrived damaged; run the same command again"):
            fetch_fineweb(out, options(hub, 1), ignore)
        assert not (out / Path(path).name).exists()
    hub.corrupt = set()
    assert fetch_fineweb(out, options(hub, 1), ignore).splits["train"].tokens == 5000


def test_progress_ends_at_the_total(hub: FakeHub, tmp_path: Path) -> None:
    steps: list[tuple[int, int | None]] = []
    fetch_fineweb(tmp_path / "out", options(hub, 1), lambda phase, step, total, metrics: steps.append((step, total)))
    sizes = [len(hub.files[FOLDER + name]) for name in ("fineweb_val_000000.bin", "fineweb_train_000000.bin")]
    total = sum(sizes) + TOKENIZER.stat().st_size
    assert steps[-1] == (total, total)


def test_a_folder_with_other_data_is_refused_and_left_alone(hub: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "fineweb_train_000000.bin").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"already holds fineweb_train_000000\.bin, which is not the published one"):
        fetch_fineweb(tmp_path, options(hub, 1), ignore)
    assert (tmp_path / "fineweb_train_000000.bin").read_bytes() == b"mine"


def test_another_revision_does_not_mix_with_the_first(hub: FakeHub, tmp_path: Path) -> None:
    fetch_fineweb(tmp_path / "out", options(hub, 1), ignore)
    manifest_path = tmp_path / "out" / MANIFEST_NAME
    manifest_path.write_text(manifest_path.read_text().replace(COMMIT, "0" * 40))
    with pytest.raises(ValueError, match="already holds another corpus"):
        fetch_fineweb(tmp_path / "out", options(hub, 1), ignore)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"repo": "someone/else"}, "cannot list dataset someone/else"),
        ({"variant": "sp1024"}, "has no validation shard of --variant sp1024"),
        ({"variant": "sp2048"}, "has no tokenizer of --variant sp2048"),
        ({"num_shards": 4}, "--shards 4: dataset someone/golf has 3 training shards"),
        ({"endpoint": "http://127.0.0.1:9"}, r"cannot list dataset someone/golf at http://127\.0\.0\.1:9"),
    ],
)
def test_what_the_hub_does_not_have_is_named(
    hub: FakeHub, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        fetch_fineweb(tmp_path / "out", replace(options(hub), **changes), ignore)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


GATED = "Access to dataset someone/golf is restricted. You must have access to it and be authenticated to access it."


@pytest.mark.parametrize(
    ("status", "headers", "token", "expected"),
    [
        (401, {"X-Error-Code": "GatedRepo", "X-Error-Message": GATED}, None, (GATED, "no HF_TOKEN is set")),
        (
            403,
            {"X-Error-Code": "GatedRepo", "X-Error-Message": GATED},
            "hf_x",
            (GATED, "HF_TOKEN is set and was refused"),
        ),
        (401, {"X-Error-Message": 'User Access Token "ci" is expired'}, "hf_x", ('"ci" is expired', "was refused")),
        (404, {"X-Error-Code": "RepoNotFound"}, "hf_x", ("Repository Not Found",)),
        (403, {}, "hf_x", ("correct permissions", "HF_TOKEN is set and was refused")),
    ],
)
def test_what_the_hub_says_is_passed_on_whole(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, headers: dict[str, str],
    token: str | None, expected: tuple[str, ...],
) -> None:  # fmt: skip
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("model.corpus.fineweb.get_token", lambda: None)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    for refused, kind in (("", ValueError), ("/resolve/", ConnectionError)):
        hub.refusal = (refused, status, headers)
        with pytest.raises(kind) as error:
            fetch_fineweb(tmp_path / "out", options(hub, 1), ignore)
        said = str(error.value)
        assert "\n" not in said
        assert all(words in said for words in expected), said
        assert ("HF_TOKEN" in said) == (status in (401, 403))


@pytest.mark.parametrize("changes", [{"repo": "../x"}, {"variant": "byte260"}, {"num_shards": 0}])
def test_impossible_options_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"--(repo|variant|shards) "):
        FetchOptions(**changes)  # type: ignore[arg-type]


def test_the_command_follows_hf_endpoint_and_says_when_it_can_continue(hub: FakeHub, tmp_path: Path) -> None:
    hub.corrupt = {f"{FOLDER}fineweb_train_000000.bin"}
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf_home")}
    command = [sys.executable, "-m", "jobs.cli", "data", "fineweb", "--repo", REPO, "--shards", "1"]
    results = []
    for corrupt in ({f"{FOLDER}fineweb_train_000000.bin"}, set[str]()):
        hub.corrupt = corrupt
        results.append(
            subprocess.run([*command, "--out", str(tmp_path / "out")], env=environment, capture_output=True, text=True)
        )
    assert [result.returncode for result in results] == [3, 0], results
    assert "run the same command again" in results[0].stderr
    assert results[1].stdout.splitlines()[-2].split() == ["train", "2", "5000", "-"]
    assert not (tmp_path / "out" / STAGING).exists()
