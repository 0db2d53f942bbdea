"""The audit: a healthy run passes every probe, a broken one is caught, and what the command says and returns."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.cli import main
from jobs.evidence.audit import render
from jobs.evidence.self_test_text import list_broken, list_healthy, render_self_test
from model.audit.audit import PROBES, Audit, choose_probes
from model.audit.byte_table import probe_bytes
from model.audit.causality import probe_chunk_borders
from model.audit.configuration import probe_configuration
from model.audit.finished_run import load_run
from model.audit.updates import probe_adapter_states, probe_frozen_updates, probe_poisoned_update
from model.controls.broken import CONTROLS
from model.controls.self_test import SelfTest, examine, micro_run
from model.controls.systems import UpdateFirst, alter
from model.data.validation import ValidationSet
from model.score.bpb import document_sums
from model.ttt.document_pass import DocumentPass
from model.ttt.learning_step import LearningStep
from model.ttt.recorded_pass import RecordedPass
from model.ttt.slots import Slots
from model.ttt.windows import Window

ROOT = Path(__file__).parent.parent
QUICK = "score_ledger,exactly_once,separation,overlap,bytes,size"


@pytest.fixture(scope="module")
def audit() -> Iterator[Audit]:
    """Return a finished micro run."""
    with micro_run() as made:
        yield made


@pytest.fixture(scope="module")
def outcome(audit: Audit) -> SelfTest:
    """Return what the probes say of the micro run, and of every way to break it."""
    return examine(audit, lambda *_: None)


def test_the_healthy_run_passes_every_probe(outcome: SelfTest) -> None:
    assert [(result.probe, result.detail) for result in outcome.false_alarms] == []


@pytest.mark.parametrize("control", [control.name for control in CONTROLS])
def test_each_control_is_caught(outcome: SelfTest, control: str) -> None:
    lines = [line for line in outcome.lines if line.control == control]
    assert lines
    assert [(line.probe, line.result.result) for line in lines if not line.is_caught] == []


def test_every_probe_has_a_control_that_it_caught(outcome: SelfTest) -> None:
    assert outcome.unproven == []
    assert {result.probe for result in outcome.healthy} == {*PROBES, "network_block"}


def test_a_result_names_its_sample_and_what_it_did_not_check(outcome: SelfTest) -> None:
    for result in outcome.healthy:
        assert result.sample_size >= 1, result.probe
        assert result.sample_of, result.probe
        assert result.not_checked or result.probe == "network_block", result.probe


def test_the_fresh_process_scores_bit_identically(outcome: SelfTest) -> None:
    (reload,) = [result for result in outcome.healthy if result.probe == "reload"]
    assert reload.detail.startswith("bit-identical")


def test_sampled_adapter_states_are_kept_as_hashes(outcome: SelfTest) -> None:
    (states,) = [result for result in outcome.healthy if result.probe == "adapter_states"]
    by_document = list(states.evidence["states"].values())
    assert len({states[0] for states in by_document}) == 1  # adapters are drawn by seed, not by document
    assert all(len(set(states)) == len(states) > 2 for states in by_document)


def test_the_page_lists_every_probe_and_control(outcome: SelfTest) -> None:
    page = (ROOT / "docs" / "audit.md").read_text()
    assert page.count("\n") == render_self_test(outcome, is_markdown=True).count("\n") + 1
    healthy, broken = list_healthy(outcome), list_broken(outcome)
    assert [row[0] for row in healthy if f"| {row[0]} | {row[1]} | {row[2]} |" not in page] == []
    assert [row[0] for row in broken if f"| {row[0]} | {row[1]} | {row[2]} | caught |" not in page] == []


def test_the_command_writes_what_it_prints(audit: Audit, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(audit.out), "--probes", QUICK, "--format", "json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    (run,) = printed["runs"]
    assert printed["result"] == run["result"] == "pass"
    assert {probe["probe"] for probe in run["probes"]} == set(QUICK.split(","))
    assert json.loads((audit.files.workdir / "audit.json").read_text()) == run
    assert main(["audit", str(audit.files.workdir), "--seed", "7", "--probes", "score_ledger"]) == 0
    assert "pass          score_ledger" in capsys.readouterr().out


def test_an_altered_ledger_fails_the_command(audit: Audit, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(audit.out, out)
    log = out / "seeds" / audit.files.workdir.name / "ttt_scores.npz"
    with np.load(log) as arrays:
        altered = dict(arrays)
    altered["num_updates_before"] = altered["num_updates_before"] + 1
    np.savez(log, allow_pickle=False, **altered)
    assert main(["audit", str(out), "--probes", "score_ledger"]) == 1


def test_bad_input_is_named(audit: Audit, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    assert main(["audit", str(audit.out), "--seed", "99"]) == 2
    assert "no run of seed 99" in capsys.readouterr().err
    assert main(["audit", str(audit.out), "--probes", "casuality"]) == 2
    assert "casuality" in capsys.readouterr().err
    assert main(["audit"]) == 2
    assert "DIR is missing" in capsys.readouterr().err
    out = tmp_path / "out"
    shutil.copytree(audit.out, out)
    (out / "seeds" / audit.files.workdir.name / "ledger" / "ttt.json").unlink()
    assert main(["audit", str(out), "--probes", "score_ledger"]) == 2
    assert "ttt.json is missing" in capsys.readouterr().err


def test_probes_are_chosen_by_name_and_run_in_their_own_order() -> None:
    assert choose_probes("order, bytes,size") == ["size", "order", "bytes"]
    with pytest.raises(ValueError, match="choose from records, size"):
        choose_probes(",")


def test_recorded_steps_of_a_gpu_are_probed_alike(audit: Audit) -> None:
    class UpdateFirstInSteps(UpdateFirst, RecordedPass):
        """The control on the path that a GPU takes; on a CPU its steps run operation by operation."""

    sound = alter(audit.system, pass_type=RecordedPass, sample=2)
    broken = alter(audit.system, pass_type=UpdateFirstInSteps, sample=2)
    for probe in (probe_chunk_borders, probe_adapter_states, probe_poisoned_update, probe_frozen_updates):
        assert probe(sound).result == "pass", probe
    for probe in (probe_adapter_states, probe_poisoned_update, probe_frozen_updates):
        assert probe(broken).result == "fail", probe


def test_a_step_that_learns_before_it_scores_is_looked_into(audit: Audit) -> None:
    class EarlyStep(LearningStep):
        """Hands back the losses of adapters that have seen the chunk."""

        def score_and_learn(self, table: torch.Tensor, length: int) -> torch.Tensor:
            super().score_and_learn(table, length)
            kept = self.slots.values.clone(), self.slots.moments.clone(), self.slots.num_updates.clone()
            losses = super().score_and_learn(table, length)
            for mine, value in zip((self.slots.values, self.slots.moments, self.slots.num_updates), kept):
                mine.copy_(value)
            return losses

    class EarlyPass(DocumentPass):
        def _make_step(self, _documents: Sequence[int], slots: Slots) -> LearningStep:
            return EarlyStep(self.model, self.validation.tokens, self.config, slots, is_looped=self.is_looped)

    assert probe_adapter_states(alter(audit.system, sample=2)).result == "pass"
    found = probe_adapter_states(alter(audit.system, pass_type=EarlyPass, sample=2))
    assert found.result == "fail"
    assert "said to come after 0 updates read a state" in found.detail


def test_a_stream_cut_inside_a_character_still_has_its_bytes(audit: Audit) -> None:
    table, byte_piece = audit.tokenizer.byte_table, 4 + 0xE2  # pieces 4..259 are the bytes
    tokens = np.append(audit.validation.tokens, [byte_piece]).astype(np.uint16)
    cut = ValidationSet(tokens, audit.validation.document_starts)
    sums = document_sums(cut, table, np.zeros(cut.num_targets), num_scored=cut.num_targets, seconds=0.0)
    assert probe_bytes(audit.tokenizer, table, cut, sums.bytes.tolist()).result == "pass"


def test_announced_runs_must_be_here_or_listed_as_failed(audit: Audit, tmp_path: Path) -> None:
    def answer(**sweep: object) -> tuple[str, str]:
        entry = {"time": "2000-01-01T00:00:00+00:00", "seeds": [7, 8], "repeats": 1, **sweep}
        (tmp_path / "sweep.json").write_text(json.dumps({"announcements": [entry]}))
        result = probe_configuration(tmp_path, [audit.files.workdir])
        return result.result, result.detail

    assert answer() == ("fail", "seed 8 was announced, but is neither here nor listed as failed")
    assert answer(seeds=[7], repeats=2)[0] == "fail"
    (tmp_path / "state.json").write_text(json.dumps({"runs": [{"seed": 8, "repeat": 0, "state": "FAILED"}]}))
    assert answer()[0] == "pass"
    event = {"time": "1999-01-01T00:00:00+00:00", "seed": 7, "repeat": 0}
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n")
    assert answer() == ("fail", "seed 7 was announced after it had started")


def test_unfinished_runs_are_named_and_not_audited(
    audit: Audit, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(audit.out, out)
    (out / "seeds" / "seed=8-repeat=0").mkdir()
    shutil.copy(audit.files.workdir / "run.json", out / "seeds" / "seed=8-repeat=0" / "run.json")
    assert main(["audit", str(out), "--probes", "bytes"]) == 0
    assert "not finished, so not audited: seed=8-repeat=0" in capsys.readouterr().out
    assert main(["audit", str(out), "--seed", "8"]) == 2


def test_a_growing_ledger_does_not_slow_down(audit: Audit) -> None:
    system = audit.system
    work = DocumentPass(system.model, system.validation, system.config.ttt, lambda *_: None, label="test")
    window, started = [Window(0, 0, 16, 16, 0, False)], time.process_time()
    for _ in range(4000):
        work._log_updates(window, 0)
    assert time.process_time() - started < 0.5  # 0.04 s; copying the events each time would take 10 s
    assert len(work.close_ledger().rows) == 4000


def test_a_finished_run_reads_back(audit: Audit) -> None:
    files = load_run(audit.files.workdir)
    assert files.config == audit.files.config
    assert list(files.ledgers) == ["prepare", "train", "quantize", "evaluate", "ttt"]


def test_a_bar_in_a_detail_does_not_break_the_markdown_table() -> None:
    probe = {"probe": "size", "rule": "R1", "result": "fail", "measured": 1, "limit": None, "unit": "bytes",
             "sample_size": 1, "sample_of": "file", "detail": "a | b", "not_checked": ""}  # fmt: skip
    text = render({"run": "seed=1", "result": "fail", "probes": [probe], "seconds": 1}, is_markdown=True)
    assert text.splitlines()[-1] == r"| size | R1 | fail | 1 (limit -) bytes | 1 file | a \| b |"
