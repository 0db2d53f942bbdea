"""Finished stages: their records written, held against the files again, or taken over from another run.

A stage is the same computation in two runs if its identity is the same. Then its outputs are the other run's, by
checksum; all but the counted program, which carries every setting and is each run's own.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from model.bundle.program import PACKED_NAME, READABLE_NAME, code_program
from model.files.atomic import file_sha256, remove_file, replace_file
from model.files.checkpoint import CheckpointStore, write_json
from model.files.linked import check_sha256, share_file
from model.pipeline.attempts import list_attempt, note_attention
from model.pipeline.identity import STAGE_INPUTS, dependents, stage_identity
from model.pipeline.inputs import ARTIFACT, WEIGHTS
from model.pipeline.records import Output, StageRecord, parse_record, read_record, record_path
from model.pipeline.run import Donor, Run
from model.pipeline.stage_quantize import write_program
from model.quant.rounded import weigh

READ_OUTPUTS = {"train": (), "quantize": (WEIGHTS,), "evaluate": (WEIGHTS, ARTIFACT), "ttt": (ARTIFACT,)}
PROGRAMS = (READABLE_NAME, PACKED_NAME)
ON_CPU = ("num_threads", "cpu_capability")  # move bits on a CPU only


def write_record(run: Run, stage: str, seconds: float, metrics: Mapping[str, Any], outputs: Iterable[str]) -> None:
    """Write the record that makes a stage finished."""
    kernel = metrics.get("attention_backend") or metrics.get(f"{stage}_attention_backend")
    surroundings = {**run.surroundings, "attention": kernel}
    record = StageRecord(
        stage=stage,
        seconds=seconds,
        metrics=metrics,
        outputs={name: describe_output(run, name) for name in outputs},
        **run.hashes,
        surroundings=surroundings,
        identity=identify(run, stage, surroundings),
        inputs=hash_inputs(run, stage),
    )
    store_record(run, record)


def describe_output(run: Run, name: str) -> Output:
    """Return what a record says of an output, having told of it."""
    path = run.workdir / name
    sha256 = run.written.pop(name, None) or file_sha256(path)
    output = Output(path.stat().st_size, sha256)
    run.on_write(path)
    return output


def store_record(run: Run, record: StageRecord) -> None:
    """Put a record in its place: from then on its stage is finished."""
    path = record_path(run.workdir, record.stage)
    write_json(path, record.to_json())
    run.on_write(path)
    run.records[record.stage] = record


def find_finished(run: Run, stage: str) -> bool:
    """Return whether a stage's outputs are what it left, having noted its record; else it is done (again)."""
    path = record_path(run.workdir, stage)
    if not path.exists():
        return False
    try:
        record = read_record(path)
        for name, output in record.outputs.items():
            place = run.workdir / name
            if place.stat().st_size != output.bytes or file_sha256(place) != output.sha256:
                raise ValueError(f"{place} does not match its record")
        if (record.config_hash, record.data_hash) != (run.hashes["config_hash"], run.hashes["data_hash"]):
            raise ValueError(f"{path} was made under other hashes")
        if record.inputs:  # version 0.1 did not note them
            check_inputs(run, record)
    except (ValueError, OSError) as error:
        run.report("prepare", 0, None, {"note": f"stage {stage} is done again: {error}"})
        return False
    run.records[stage] = record
    return True


def forget_finished(run: Run, stage: str) -> None:
    """Remove the record of a stage, and of those that build on it: all are stale from now on."""
    list_attempt(run)
    for name in (stage, *dependents(stage)):
        remove_file(record_path(run.workdir, name))
        run.records.pop(name, None)


# ---- what a stage is computed from -----------------------------------------------------------------------------------


def identify(run: Run, stage: str, surroundings: Mapping[str, Any]) -> str | None:
    """Return the identity of a stage that runs in these surroundings, attention being the kernel that it uses.

    None where code or surroundings have changed since the run began, or that is not known of a stage it builds on: a
    resumed training may then be of two kinds.
    """
    inputs = {name: run.records[name].identity for name in STAGE_INPUTS[stage]}
    known = {name: identity for name, identity in inputs.items() if identity is not None}
    if run.is_mixed or len(known) < len(inputs):
        return None
    is_cpu = surroundings["device"] == "cpu"
    backends = {name: value for name, value in surroundings.items() if is_cpu or name not in ON_CPU}
    return stage_identity(
        stage,
        run.config,
        seed=run.config.seed,
        repeat=run.orders.repeat,
        world_size=run.dist.world_size,
        data_hash=run.hashes["data_hash"],
        code_hash=run.hashes["code_hash"],
        backends={**backends, "asked_attention": run.config.runtime.attention},
        inputs=known,
    )


def hash_inputs(run: Run, stage: str) -> dict[str, str]:
    """Return the sha256, by name, of the outputs of other stages that a stage reads."""
    outputs = {name: output for earlier in STAGE_INPUTS[stage] for name, output in run.records[earlier].outputs.items()}
    return {name: outputs[name].sha256 for name in READ_OUTPUTS[stage] if name in outputs}


def check_inputs(run: Run, record: StageRecord) -> None:
    """Raise ValueError if a stage read other files than this run has: where no two trainings are alike, that counts."""
    now = hash_inputs(run, record.stage)
    for name in now:
        if record.inputs.get(name) != now[name]:
            raise ValueError(f"stage {record.stage} was computed from another {name}")


# ---- taken over ------------------------------------------------------------------------------------------------------


def take_stage(run: Run, stage: str) -> bool:
    """Take a stage over from the run that has finished it; return False, having said why, if it has to be computed."""
    donor = run.orders.donors.get(stage)
    if donor is None:
        return False
    try:
        with run.long_call():  # it may come from an object store
            record = parse_record(donor.read(f"stages/{stage}.json"), shown=f"stages/{stage}.json of {donor.name}")
            check_same_computation(run, stage, record)
            forget_finished(run, stage)
            store_record(run, take_outputs(run, record, donor))
    except (ValueError, KeyError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        run.report("prepare", 0, None, {"note": f"stage {stage} of {donor.name} is not taken over: {reason}"})
        return False
    if stage == "train":
        kernel = record.surroundings["attention"]
        if kernel is not None:
            note_attention(run, kernel)
        CheckpointStore(run.checkpoints).clear()
    run.report("prepare", 0, None, {"note": f"stage {stage} is taken over from {run.records[stage].reused_from}"})
    return True


def check_same_computation(run: Run, stage: str, record: StageRecord) -> None:
    """Raise ValueError, saying why, unless this run would compute what the record of another one tells of."""
    kernel = record.surroundings.get("attention")  # where a stopwatch chose it, this run would have been as content
    ours = identify(run, stage, {**run.surroundings, "attention": kernel})
    if record.identity is None or ours is None:
        whose = "its record" if record.identity is None else "this run"
        raise ValueError(f"code or surroundings changed under way, or {whose} does not say")
    if record.stage != stage or record.identity != ours:
        raise ValueError(f"it is another computation (identity {record.identity[:12]}, here {ours[:12]})")
    check_inputs(run, record)


def take_outputs(run: Run, record: StageRecord, donor: Donor) -> StageRecord:
    """Put the outputs that a donor's record names into this run's directory; return the record for them.

    Raises ValueError or OSError for one that is missing or not as recorded.
    """
    outputs: dict[str, Output] = {}
    for name, output in record.outputs.items():
        path = run.workdir / name
        if name in PROGRAMS:
            continue
        if donor.folder is not None:
            share_file(donor.folder / name, path, sha256=output.sha256)
        else:
            content = donor.read(name)
            check_sha256(hashlib.sha256(content).hexdigest(), output.sha256, f"{name} of {donor.name}")
            with replace_file(path) as file:
                file.write(content)
        run.on_write(path)
        outputs[name] = output
    metrics = dict(record.metrics)
    if record.stage == "quantize":
        program = code_program(run.config)
        metrics |= weigh(run.config, model_bytes=outputs[ARTIFACT].bytes, code_bytes=program.num_bytes)
        metrics["code_bytes_readable"] = program.readable_bytes
        outputs |= {name: describe_output(run, name) for name in write_program(program, run.workdir)}
    origin = record.reused_from or donor.name
    return dataclasses.replace(
        record, outputs=outputs, metrics=metrics, config_hash=run.hashes["config_hash"], reused_from=origin
    )  # data_hash and code_hash are in the identity
