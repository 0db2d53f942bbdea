"""The four Parquet tables of a sweep: every column with its type, unit and meaning, and the schema's version.

One attempt of one seed is one file in each of `documents`, `steps`, `stages` and `runs`. Everything else in this
package, and docs/schema.md, is derived from the lists below. Needs pyarrow only when a schema is built.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)
VERSION_KEY = b"seedsweep.schema_version"  # in the metadata of every file

# Commit order: the file in `runs` is written last, and without it the other three do not count.
TABLES = ("documents", "steps", "stages", "runs")

# The scoring passes of one seed, in the order of the pipeline.
SCORES = {
    "live": "un-averaged weights when training stopped",
    "post_ema": "averaged weights before quantization",
    "pre_ttt": "quantized artifact, plain evaluation",
    "sliding": "quantized artifact, sliding window (only imported logs have it)",
    "ttt_lr0": "the TTT path with learning rate 0: longer context, no adaptation",
    "post_ttt": "test-time training",
}

# The times that count against the limit on training: whatever reads training data.
READS_TRAINING_S = ("train_s", "hessian_s", "sensitivity_s")

BASE = "base"  # the variant of a sweep that names none, and of every file of version 1

FINISHED = "DONE"  # the state of an attempt whose figures count


class Column(NamedTuple):
    """One column: name, Arrow type by name, meaning. `required` columns may never be null.

    since: the version of the schema that brought it.
    """

    name: str
    type: str
    meaning: str
    required: bool = False
    since: int = 1


KEYS = (
    Column("schema_version", "int32", "version of this schema", True),
    Column("run_id", "string", "names one attempt; equal in all four tables", True),
    Column("variant", "string", "which configuration of the sweep; base where it has only one", True, since=2),
    Column("seed", "int64", "seed of the run (-1: an imported log that names none)", True),
    Column("repeat", "int32", "0, or the n-th repetition of the same seed", True),
    Column("attempt", "int32", "from 1; a retry after a fault is the next attempt", True),
    Column("config_hash", "string", "sha256 of everything in the configuration that decides a score", True),
)

DOCUMENT_COLUMNS = (
    *KEYS,
    Column("index", "int32", "place of the document in the validation stream, from 0", True),
    Column("tokens", "int32", "targets scored", True),
    Column("bytes", "int32", "UTF-8 bytes of those targets", True),
    Column("nats_plain", "float64", "summed nats, plain evaluation of the artifact"),
    Column("nats_lr0", "float64", "summed nats, TTT path with learning rate 0"),
    Column("nats_ttt", "float64", "summed nats, test-time training"),
)

STEP_COLUMNS = (
    *KEYS,
    Column("step", "int32", "optimizer step, from 1", True),
    Column("loss", "float64", "training loss, nats per token"),
    Column("grad_norm", "float64", "gradient norm before clipping"),
    Column("lr_factor", "float64", "learning rate over its peak"),
    Column("momentum", "float64", "Muon momentum"),
    Column("is_looped", "bool", "the repeated layers were on"),
    Column("elapsed_s", "float64", "seconds on the training clock"),
    Column("tokens_per_s", "float64", "throughput of this very step, timed on the device"),
    Column("gpu_clock_mhz", "float64", "slowest SM clock of the gang when last sampled; null on CPU"),
    Column("gpu_power_w", "float64", "power of the gang's GPUs together when last sampled; null on CPU"),
    Column("gpu_throttle_bits", "int64", "reasons to run slower, as the driver's bit mask, of any GPU of the gang"),
)

STAGE_COLUMNS = (
    *KEYS,
    Column("stage", "string", "train, quantize, evaluate or ttt; program: somebody else's program as a whole", True),
    Column("seconds", "float64", "wall clock of the stage"),
    Column("metrics_json", "string", "every metric of the stage record"),
    Column("outputs_json", "string", "output files with bytes and sha256"),
    Column("data_hash", "string", "sha256 over shards and tokenizer"),
    Column("code_hash", "string", "sha256 over the sources the stage ran"),
    Column("stage_identity", "string", "sha256 of everything that decides the outputs of the stage", since=2),
    Column("reused_from", "string", "the run that computed this stage; null: this one did", since=2),
)


def _score_columns() -> tuple[Column, ...]:
    """Return the six columns of each scoring pass."""
    columns = []
    for name, meaning in SCORES.items():
        columns += [
            Column(f"{name}_nats", "float64", f"summed nats: {meaning}"),
            Column(f"{name}_tokens", "int64", f"targets scored: {meaning}"),
            Column(f"{name}_bytes", "int64", f"UTF-8 bytes of those targets: {meaning}"),
            Column(f"{name}_nats_per_token", "float64", f"nats per target: {meaning}"),
            Column(f"{name}_bpb", "float64", f"bits per byte: {meaning}"),
            Column(f"{name}_s", "float64", f"seconds of the pass: {meaning}"),
        ]
    return tuple(columns)


RUN_COLUMNS = (
    *KEYS,
    Column("state", "string", "DONE, FAILED, CANCELLED or INFEASIBLE", True),
    Column("error", "string", "root cause of a failed attempt, one line"),
    Column("error_rank", "int32", "the rank that failed first"),
    Column("sweep", "string", "name of the sweep, or of the imported record"),
    Column("source", "string", "run, program (somebody else's), or where imported figures came from"),
    Column("config_json", "string", "the resolved configuration"),
    Column("data_hash", "string", "sha256 over shards and tokenizer"),
    Column("code_hash", "string", "sha256 over the sources of the four packages; of a program over its folder"),
    Column("code_changed", "bool", "continued by --allow-code-change: other code, device, versions, threads or kernel"),
    Column("git_commit", "string", "commit of the working tree"),
    Column("git_dirty", "bool", "the working tree had uncommitted changes"),
    Column("versions_json", "string", "versions of every package that matters"),
    Column("python_version", "string", "Python"),
    Column("torch_version", "string", "PyTorch"),
    Column("ray_version", "string", "Ray; null for --local"),
    Column("node_label", "string", "which node, without its host name"),
    Column("gpu_model", "string", "GPU model; null on CPU"),
    Column("driver_version", "string", "GPU driver"),
    Column("cuda_version", "string", "CUDA"),
    Column("num_cpus", "int32", "CPUs of one gang"),
    Column("num_gpus", "int32", "GPUs of one gang"),
    Column("world_size", "int32", "ranks"),
    Column("started_at", "timestamp", "UTC"),
    Column("ended_at", "timestamp", "UTC"),
    Column("attempts", "int32", "attempts of this seed so far, this one included"),
    Column("preemptions", "int32", "attempts lost to nodes that went away, or to a sweep of higher priority"),
    Column("num_resumes", "int32", "times that training continued from a checkpoint"),
    Column("reused_stages", "string", "stages taken from another run, with their times; comma between", since=2),
    Column("resumed_at_steps", "list_int64", "the steps it continued from"),
    Column("lost_steps", "int64", "steps trained twice because of resumes"),
    Column("steps", "int64", "optimizer steps"),
    Column("train_tokens", "int64", "tokens trained on"),
    Column("tokens_per_s", "float64", "training throughput"),
    Column("train_loss_last", "float64", "training loss of the last step, nats per token"),
    Column(
        "warmup_s",
        "float64",
        "before the training clock: kernels compiled, attention probed, both loop states run",
    ),
    Column("train_s", "float64", "training"),
    Column("quantize_s", "float64", "calibration, rounding and compression"),
    Column("hessian_s", "float64", "calibration Hessians (reads training data)"),
    Column("sensitivity_s", "float64", "what rounding costs, for fit (reads training data); null: no fit", since=3),
    Column("solve_s", "float64", "GPTQ rounding"),
    Column("compress_s", "float64", "compression of the artifact"),
    Column("evaluate_s", "float64", "plain evaluation, all passes"),
    Column("ttt_s", "float64", "test-time training, both passes"),
    *_score_columns(),
    Column("order0_bpb", "float64", "validation bpb under the token counts of the training part"),
    Column("val_documents_hash", "string", "identity of the validation text: equal hash, comparable scores"),
    Column("val_documents", "int64", "validation documents"),
    Column("val_bytes", "int64", "UTF-8 bytes of the validation text"),
    Column("tokenizer_hash", "string", "sha256 of the tokenizer file"),
    Column("vocab_size", "int32", "ids of the tokenizer"),
    Column("num_params", "int64", "parameters of the model"),
    Column("model_bytes", "int64", "compressed model"),
    Column("code_bytes", "int64", "code, counted by code_bytes_convention"),
    Column("code_bytes_convention", "string", "how code_bytes was counted"),
    Column("code_bytes_readable", "int64", "the same code as the readable file has it, the other convention"),
    Column("artifact_bytes", "int64", "model_bytes + code_bytes"),
    Column("size_limit_bytes", "int64", "limit on artifact_bytes"),
    Column("within_limit", "bool", "artifact_bytes <= size_limit_bytes"),
    Column(
        "matrix_clip_sigmas",
        "float64",
        "row scale in standard deviations, as used; null where groups of matrices differ",
    ),
    Column(
        "attention_backend", "string", "attention kernel of training; each later stage names its own in its metrics"
    ),
    Column("peak_memory_bytes", "int64", "largest memory of any rank in any stage"),
    Column("is_slow", "bool", "flagged as slower than its sweep's other seeds"),
    Column(
        "provenance_json",
        "string",
        "of figures read from logs: column -> file and label; findings and notes of a program",
    ),
)

COLUMNS: dict[str, tuple[Column, ...]] = {
    "documents": DOCUMENT_COLUMNS,
    "steps": STEP_COLUMNS,
    "stages": STAGE_COLUMNS,
    "runs": RUN_COLUMNS,
}


def value_when_absent(column: str) -> str | None:
    """Return what a column of a later version is in a file of an earlier one."""
    return BASE if column == "variant" else None


def absent_columns(table: str, version: int) -> set[str]:
    """Return the columns that files of an earlier version of the schema do not have."""
    return {column.name for column in COLUMNS[table] if column.since > version}


def column_names(table: str) -> list[str]:
    """Return the column names of one table, in order."""
    return [column.name for column in COLUMNS[table]]


@cache
def arrow_schema(table: str) -> pa.Schema:
    """Return the Arrow schema of one of TABLES, with the schema version in its metadata."""
    import pyarrow as pa

    types = {
        "int32": pa.int32(),
        "int64": pa.int64(),
        "float64": pa.float64(),
        "bool": pa.bool_(),
        "string": pa.string(),
        "timestamp": pa.timestamp("us", tz="UTC"),
        "list_int64": pa.list_(pa.int64()),
    }
    fields = [pa.field(column.name, types[column.type], nullable=not column.required) for column in COLUMNS[table]]
    return pa.schema(fields, metadata={VERSION_KEY: str(SCHEMA_VERSION)})


def describe() -> str:
    """Return docs/schema.md: every table and column as Markdown."""
    parts = [
        "# The results schema",
        "",
        f"Version {SCHEMA_VERSION}. Written by `python -m results.schema > docs/schema.md`; do not edit by hand.",
        "",
        "One attempt of one seed is `OUT/results/TABLE/seed=S-repeat=R-attempt=A.parquet` in each of four tables",
        "(with `variant=V-` in front where the sweep names variants),",
        f"committed in the order {', '.join(TABLES)}: the file in `runs` is the commit, and readers ignore the",
        "others without it. Names end in their unit: `_s` seconds, `_bytes` bytes, `_bpb` bits per UTF-8 byte;",
        "nats are summed unless the name contains `per_token`. A failed attempt is a row too: `state`, `error`, and",
        "null where nothing was measured.",
        "",
        "Version 2 added `variant`, `stage_identity`, `reused_from` and `reused_stages`, version 3 `sensitivity_s`.",
        "Older files are read, also beside newer ones: what they lack is null, and the variant of version 1 is",
        f"`{BASE}`. A file of any other version is refused by name. The times and figures of a reused stage are those",
        "of the run that computed it: a sum over runs counts it twice.",
        "",
        "Any reader of Parquet will do. DuckDB takes a folder named like `seed=42` on the way to the files for a Hive",
        "partition and lays a column of that name over the one in the files; with `hive_partitioning = false` in",
        "`read_parquet` the files' own is kept.",
    ]
    for table in reversed(TABLES):
        parts += ["", f"## {table}", "", "| column | type | null | meaning |", "| --- | --- | --- | --- |"]
        for column in COLUMNS[table]:
            parts.append(
                f"| `{column.name}` | {column.type} | {'no' if column.required else 'yes'} | {column.meaning} |"
            )
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    print(describe(), end="")
