"""The checks of one seed of a submission folder: row, records, arrays, ledgers, artifact and code against another."""

from __future__ import annotations

import base64
import hashlib
import json
import lzma
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from results.export.evidence import EVIDENCE, PROGRAMS
from results.schema import column_names
from results.stats import bits_per_byte
from results.store.guard import file_sha256
from results.store.names import name_of_row
from results.verify.checks import AGREES, DIFFERS, UNCHECKED, Check, Formulas, compare, read_arrays, read_json

if TYPE_CHECKING:
    import numpy as np

STAGES = ("train", "quantize", "evaluate", "ttt")
# scoring pass -> file and column of its nats per document
PASSES = {
    "pre_ttt": ("evaluate.npz", "nats_plain"),
    "ttt_lr0": ("ttt.npz", "nats_lr0"),
    "post_ttt": ("ttt.npz", "nats_ttt"),
}
# metric -> stage, spans of its timing ledger that add up to it, spans that are subtracted
TIMES: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "warmup_s": ("train", ("warm_up",), ()),
    "hessian_s": ("quantize", ("hessians",), ()),
    "sensitivity_s": ("quantize", ("sensitivity",), ()),
    "compress_s": ("quantize", ("compress",), ()),
    "solve_s": ("quantize", ("round",), ("compress", "sensitivity")),
    "quantize_s": ("quantize", ("round", "load", "warm_up", "hessians", "program", "reload"), ()),
    "evaluate_s": ("evaluate", ("load", "warm_up", "live", "post_ema", "pre_ttt"), ()),
    "ttt_s": ("ttt", ("load", "warm_up", "ttt_lr0", "post_ttt"), ()),
}
TIME_TOLERANCE_S = 1e-6  # sums of the same spans in another order
OWN_DIGEST_BYTES = 32
Records = dict[str, dict[str, Any]]


def check_seed(folder: Path, row: Mapping[str, Any], formulas: Formulas) -> Iterator[Check]:
    """Check everything that one seed's evidence says."""
    seed = f"seed={row['seed']}"
    workdir = folder / EVIDENCE / name_of_row(row)
    if not (workdir / "run.json").is_file():
        yield Check(seed, UNCHECKED, "its run directory is not in the folder: only its rows are")
        return
    records: Records = {}
    for stage in STAGES:
        path = workdir / "stages" / f"{stage}.json"
        if path.is_file():
            records[stage] = read_json(path)
        else:
            yield Check(f"{seed} stages/{stage}.json", DIFFERS, "is missing")
    yield from check_hashes(seed, workdir, row, records, formulas)
    yield from check_outputs(seed, workdir, folder, records)
    yield from check_metrics(seed, row, records)
    yield from check_tables(seed, folder, workdir, row, records)
    yield from check_scores(seed, workdir, row)
    yield from check_ledgers(seed, workdir, records, formulas)
    yield from check_sizes(seed, folder, workdir, row, formulas)


def check_hashes(
    seed: str, workdir: Path, row: Mapping[str, Any], records: Records, formulas: Formulas
) -> Iterator[Check]:
    """Hash configuration and data again, and compare the hashes of row, run.json and stage records."""
    run = read_json(workdir / "run.json")
    ranks = run["world_size"]
    derived = formulas.config_hash(run["config"], ranks)
    yield compare(f"{seed} run.json config_hash", run["config_hash"], derived, "its configuration")
    yield compare(f"{seed} run.json data_hash", run["data_hash"], formulas.data_hash(run), "its list of files")
    yield compare(f"{seed} run.json seed", run["seed"], int(row["seed"]), "the row")
    yield compare(f"{seed} row world_size", int(row["world_size"]), ranks, "run.json")
    yield compare(
        f"{seed} row config_json", _config(json.loads(row["config_json"])), _config(run["config"]), "run.json"
    )
    for name in ("config_hash", "data_hash", "code_hash"):
        if name == "code_hash" and row["code_changed"] is True:
            yield from _check_changed_code(seed, row, run, records)
            continue
        yield compare(f"{seed} row {name}", row[name], run[name], "run.json")
        for stage, record in records.items():
            yield compare(f"{seed} stages/{stage}.json {name}", record[name], run[name], "run.json")


def _check_changed_code(seed: str, row: Mapping[str, Any], run: Mapping[str, Any], records: Records) -> Iterator[Check]:
    """Look for the code of the row, and of each stage, among that of the attempts in run.json."""
    known = {run["code_hash"], *(attempt.get("code_hash") for attempt in run.get("later_attempts", []))}
    for where, found in (("row", row), *((f"stages/{stage}.json", record) for stage, record in records.items())):
        is_known = found["code_hash"] in known
        detail = "is that of an attempt in run.json" if is_known else "is that of no attempt in run.json"
        yield Check(f"{seed} {where} code_hash", AGREES if is_known else DIFFERS, detail)


def _config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without the places of its data, which the driver may name relatively."""
    plain = json.loads(json.dumps(config))
    return {name: value for name, value in plain.items() if name != "data"}


def check_outputs(seed: str, workdir: Path, folder: Path, records: Records) -> Iterator[Check]:
    """Compare every output file with the bytes and sha256 in its stage's record."""
    for stage, record in records.items():
        for name, facts in sorted(record["outputs"].items()):
            path = folder / name if name in PROGRAMS else workdir / name
            where = f"{seed} {name}"
            if ".." in Path(name).parts or Path(name).is_absolute():
                yield Check(where, DIFFERS, "leads out of the run directory")
            elif not path.is_file():
                yield Check(where, UNCHECKED, f"of stage {stage} is not in the folder ({facts['bytes']} bytes)")
            else:
                yield compare(f"{where} bytes", path.stat().st_size, facts["bytes"], f"stages/{stage}.json")
                yield compare(f"{where} sha256", file_sha256(path), facts["sha256"], f"stages/{stage}.json")


def check_metrics(seed: str, row: Mapping[str, Any], records: Records) -> Iterator[Check]:
    """Compare every column of the row that a stage measured with that stage's record."""
    columns = set(column_names("runs"))
    for stage, record in records.items():
        for name, value in sorted(record["metrics"].items()):
            if name in columns and name != "peak_memory_bytes":  # each stage has its own
                stated = row[name]
                stated = stated.tolist() if hasattr(stated, "tolist") else stated
                yield compare(f"{seed} row {name}", stated, value, f"stages/{stage}.json")
    peaks = [record["metrics"].get("peak_memory_bytes") for record in records.values()]
    if all("peak_memory_of" in record["metrics"] for record in records.values()):  # written since stages are told apart
        stated = _whole(row["peak_memory_bytes"])
        yield compare(f"{seed} row peak_memory_bytes", stated, max(peaks, default=None), "the largest of its stages")


def check_tables(seed: str, folder: Path, workdir: Path, row: Mapping[str, Any], records: Records) -> Iterator[Check]:
    """Compare the rows of documents, steps and stages with the arrays and records of the run directory."""
    from results.store.reader import read_attempt

    out, files = str(folder / EVIDENCE), (("steps", ("steps.npz",)), ("documents", ("evaluate.npz", "ttt.npz")))
    for table, names in files:
        arrays = {key: values for name in names for key, values in read_arrays(workdir / name).items()}
        chosen = [name for name in column_names(table) if name in arrays]
        frame = read_attempt(out, table, row, chosen)
        for name in chosen:
            is_equal = _equal(frame[name].to_numpy(), arrays[name])
            detail = f"{len(frame)} rows, {len(arrays[name])} in {', '.join(names)}"
            yield Check(f"{seed} {table}.{name}", AGREES if is_equal else DIFFERS, detail)
    frame = read_attempt(out, "stages", row, ["stage", "seconds", "metrics_json", "outputs_json"])
    for entry in frame.to_dict("records"):
        record = records.get(str(entry["stage"]), {})
        where = f"{seed} stages table, {entry['stage']}"
        yield compare(f"{where}: seconds", entry["seconds"], record.get("seconds"), "its record")
        for column in ("metrics", "outputs"):
            stated = json.loads(str(entry[f"{column}_json"]))
            yield compare(f"{where}: {column}", _canonical(stated), _canonical(record.get(column)), "its record")


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _equal(stated: np.ndarray, derived: np.ndarray) -> bool:
    import numpy as np

    if stated.shape != derived.shape:
        return False
    if stated.dtype.kind == "f" or derived.dtype.kind == "f":
        return bool(np.array_equal(stated.astype(np.float64), derived.astype(np.float64), equal_nan=True))
    return bool((stated == derived).all())


def check_scores(seed: str, workdir: Path, row: Mapping[str, Any]) -> Iterator[Check]:
    """Add the documents up to the sums and the bits per byte of each pass; the steps to the training figures."""
    for stage, (name, column) in PASSES.items():
        arrays = read_arrays(workdir / name)
        nats, tokens, num_bytes = float(arrays[column].sum()), int(arrays["tokens"].sum()), int(arrays["bytes"].sum())
        figures = {
            "nats": nats, "tokens": tokens, "bytes": num_bytes, "bpb": bits_per_byte(nats, num_bytes),
            "nats_per_token": nats / tokens,
        }  # fmt: skip
        for figure, value in figures.items():
            yield compare(f"{seed} row {stage}_{figure}", row[f"{stage}_{figure}"], value, f"the documents of {name}")
    steps = read_arrays(workdir / "steps.npz")
    yield compare(f"{seed} row steps", int(row["steps"]), int(steps["step"][-1]), "steps.npz")
    yield compare(f"{seed} row train_loss_last", row["train_loss_last"], float(steps["loss"][-1]), "steps.npz")
    batch = json.loads(row["config_json"])["train"]["batch_tokens"]
    yield compare(
        f"{seed} row train_tokens", int(row["train_tokens"]), int(row["steps"]) * batch, "steps x batch_tokens"
    )


def check_ledgers(seed: str, workdir: Path, records: Records, formulas: Formulas) -> Iterator[Check]:
    """Add the spans of the timing ledgers up to the recorded seconds, and follow the chain of the score ledger."""
    spans: dict[str, dict[str, float]] = {}
    for stage, record in records.items():
        sums: dict[str, float] = {}
        for span in read_json(workdir / "ledger" / f"{stage}.json")["spans"]:
            if span.get("rank", 0) == 0:
                sums[span["name"]] = sums.get(span["name"], 0.0) + span["end_s"] - span["start_s"]
        spans[stage] = sums
        yield _compare_time(f"{seed} stages/{stage}.json seconds", record["seconds"], sums.get(stage, 0.0), stage)
    for name, (stage, added, taken) in TIMES.items():
        if stage in spans and name in records[stage]["metrics"]:
            sums = spans[stage]
            total = sum(sums.get(part, 0.0) for part in added) - sum(sums.get(part, 0.0) for part in taken)
            yield _compare_time(f"{seed} {name}", records[stage]["metrics"][name], total, stage)
    targets = read_arrays(workdir / "ttt.npz")
    scores = read_arrays(workdir / "ttt_scores.npz")
    problems = formulas.check_score_ledger(scores, targets["tokens"])
    for problem in problems:
        yield Check(f"{seed} ttt_scores.npz", DIFFERS, problem)
    if not problems:
        yield Check(f"{seed} ttt_scores.npz", AGREES, "its chain holds and every target was scored exactly once")
    yield from _compare_losses(seed, scores, targets)


def _compare_time(where: str, stated: float, derived: float, stage: str) -> Check:
    if abs(stated - derived) <= TIME_TOLERANCE_S:
        return Check(where, AGREES, f"{stated:.6f} s, as the spans of ledger/{stage}.json")
    return Check(where, DIFFERS, f"states {stated!r} s, the spans of ledger/{stage}.json add up to {derived!r}")


def _compare_losses(seed: str, scores: Mapping[str, np.ndarray], targets: Mapping[str, np.ndarray]) -> Iterator[Check]:
    """Add the loss of every target up by document and compare with the documents' sums."""
    import numpy as np

    nll, tokens = scores["nll"], targets["tokens"]
    ends = np.cumsum(tokens)
    if int(ends[-1]) != nll.size:
        yield Check(f"{seed} ttt_scores.npz nll", DIFFERS, f"has {nll.size} targets, the documents have {ends[-1]}")
        return
    sums = np.array([nll[end - count : end].sum(dtype=np.float64) for end, count in zip(ends, tokens)])
    differing = np.flatnonzero(sums != targets["nats_ttt"])
    detail = f"{len(sums)} documents" + (f", the first that differs is {differing[0]}" if differing.size else "")
    yield Check(f"{seed} ttt.npz nats_ttt against each target's loss", DIFFERS if differing.size else AGREES, detail)


def check_sizes(seed: str, folder: Path, workdir: Path, row: Mapping[str, Any], formulas: Formulas) -> Iterator[Check]:
    """Measure artifact and code on the files, and unpack the code's twin (nothing is run)."""
    model = workdir / "model.ssq"
    readable, packed = (folder / name for name in PROGRAMS)
    if not model.is_file() or not readable.is_file() or not packed.is_file():
        yield Check(f"{seed} sizes", UNCHECKED, "artifact or code are not in the folder")
        return
    content = model.read_bytes()
    is_whole = hashlib.sha256(content[:-OWN_DIGEST_BYTES]).digest() == content[-OWN_DIGEST_BYTES:]
    detail = "its own checksum " + ("holds" if is_whole else "does not hold")
    yield Check(f"{seed} model.ssq", AGREES if is_whole else DIFFERS, detail)
    counted = packed.stat().st_size
    for name, derived in {
        "model_bytes": len(content), "code_bytes": counted, "code_bytes_readable": readable.stat().st_size,
        "artifact_bytes": len(content) + counted,
    }.items():  # fmt: skip
        yield compare(f"{seed} row {name}", _whole(row[name]), derived, "the files")
    limit = len(content) + counted <= int(row["size_limit_bytes"])
    yield compare(f"{seed} row within_limit", bool(row["within_limit"]), limit, "the files")
    yield check_twin(f"{seed} {packed.name}", readable.read_bytes(), packed.read_bytes(), formulas)


def check_twin(where: str, readable: bytes, packed: bytes, formulas: Formulas) -> Check:
    """Compare the packed program with the readable one (nothing is run)."""
    if b"b85decode" in packed:  # programs of version 0.1 and before hold the readable text itself
        is_twin: bool | None = unpack_program(packed) == readable
    else:
        is_twin = formulas.is_twin(readable.decode(), packed)
    if is_twin is None:
        return Check(where, UNCHECKED, "was made with other versions of Python, python-minifier or brotli than these")
    return Check(where, AGREES if is_twin else DIFFERS, f"is {'' if is_twin else 'not '}made of train_gpt.py's modules")


def _whole(value: Any) -> int | None:
    return None if value is None or value != value else int(value)


def unpack_program(packed: bytes) -> bytes:
    """Return the source inside a self-extracting program, without running it. ValueError if there is none."""
    match = re.search(rb'b85decode\("([^"\\]+)"\)', packed)
    if match is None:
        raise ValueError("the packed program holds no compressed source")
    decoder = lzma.LZMADecompressor(memlimit=1 << 28)
    try:
        source = decoder.decompress(base64.b85decode(match[1]), max_length=1 << 24)
    except lzma.LZMAError as error:
        raise ValueError(f"the packed program's source is damaged: {error}") from None
    if not decoder.eof:
        raise ValueError("the packed program's source is cut off, or over 16 MiB")
    return source
