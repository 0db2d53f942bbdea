"""The code beside the logs: which settings it reads from the environment, and which modules it needs.

The files are read with `ast`, never run. A script that unpacks itself (lzma, zlib, base64 or base85) is unpacked as
data first. A record carries what was found under "code", so that the checks need no folder.
"""

from __future__ import annotations

import ast
import base64
import lzma
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from results.findings.findings import Finding
from results.published.records import Record, Run, one_run_a_seed
from results.published.track import SIZE_LIMIT_BYTES

ENTRY = re.compile(r"train_gpt\w*\.py$")
ENV_NAME = re.compile(r"[A-Z][A-Z0-9_]*$")
# names that say where a run happens or what it is called, not what it computes
NOT_SETTINGS = re.compile(
    r"^(RANK|WORLD_SIZE|LOCAL_\w+|MASTER_\w+|NODE_\w+|GROUP_\w+|ROLE_\w+|TORCH\w*|CUDA\w*|NCCL\w*|OMP\w*|MKL\w*|PYTORCH\w*|"
    r"PYTHON\w*|TRITON\w*|HF_\w+|HUGGING\w*|WANDB\w*|SLURM\w*|PATH|HOME|USER|HOSTNAME|PWD|TMP\w*|TEMP|CC|CXX|LD_\w+|"
    r"TOKENIZERS_PARALLELISM|XDG\w*|RUN_ID|RUN_NAME|SEED|\w*(DIR|PATH|FILE|FILES|ROOT|LOGFILE)|LOG\w*|DEBUG\w*|VERBOSE|"
    r"\w*PROFILE\w*|UV_\w+|RAY_\w+|VIRTUAL_ENV)$"
)
DUMP_FRAC = 0.5  # a log with fewer of the settings than this has no dump of them, so nothing is hidden in it
MIN_SETTINGS = 5
PACKED_TEXT = 2_000  # a literal of so many characters may hold the script
MAX_UNPACKED_BYTES = 8_000_000
MAX_LAYERS = 4
MAX_NAMES = 12


def read_code(folder: Path) -> dict[str, Any]:
    """Return what the Python files of a folder read and need.

    {"settings": {name: the settings it becomes}, "entry": file, "entry_bytes", "helpers": {file: bytes},
    "packed_bytes": of entry and helpers under lzma, each}; {} without a train_gpt file.
    """
    files = {path.stem: path for path in sorted(folder.glob("*.py"))}
    entry = files.get("train_gpt") or next((path for path in files.values() if ENTRY.search(path.name)), None)
    if entry is None:
        return {}
    trees = {entry.name: _trees(entry)}
    helpers: dict[str, int] = {}
    waiting = [entry.name]
    while waiting:
        for name in _imports(trees[waiting.pop()]):
            path = files.get(name)
            if path is not None and path.name not in trees:
                trees[path.name] = _trees(path)
                helpers[path.name] = path.stat().st_size
                waiting.append(path.name)
    settings: dict[str, list[str]] = {}
    for name, targets in (read for found in trees.values() for tree in found for read in _environment_reads(tree)):
        if not NOT_SETTINGS.match(name):
            settings.setdefault(name, []).extend(targets)
    return {
        "settings": settings, "entry": entry.name, "entry_bytes": entry.stat().st_size, "helpers": helpers,
        "packed_bytes": {name: len(lzma.compress((folder / name).read_bytes())) for name in (entry.name, *helpers)},
    }  # fmt: skip


def check_hidden_settings(record: Record) -> Iterator[Finding]:
    """Yield the settings that the code reads from the environment and a log's dump of settings lacks."""
    read: dict[str, list[str]] = (record.get("code") or {}).get("settings") or {}
    lacking: dict[tuple[str, ...], list[Any]] = {}
    for run in one_run_a_seed(record):
        logged = {name.lower() for name in {**(run.get("hparams") or {}), **(run.get("settings") or {})}}
        absent = tuple(sorted(name for name, targets in read.items() if not {name.lower(), *targets} & logged))
        has_dump = len(read) >= MIN_SETTINGS and len(read) - len(absent) >= DUMP_FRAC * len(read)
        if has_dump and absent:
            lacking.setdefault(absent, []).append(run["seed"])
    for names, seeds in lacking.items():
        field = "settings that the code reads from the environment are not among the logged settings"
        shown = ", ".join(names[:MAX_NAMES]) + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")
        values = {"names": shown, "code": record["code"]["entry"], "seeds": seeds}
        yield Finding(None, field, values, "hidden_settings", len(names), 0)


def check_helper_bytes(record: Record) -> Iterator[Finding]:
    """Yield modules beside the script that it imports and that the counted code cannot contain."""
    code = record.get("code") or {}
    helpers = code.get("helpers") or {}
    runs = [run for run in one_run_a_seed(record) if run.get("code_bytes_implied") is not None]
    if not helpers or not runs:
        return
    run = max(runs, key=lambda run: int(run.get("total_bytes") or 0))
    counted, extra = run["code_bytes_implied"], sum(helpers.values())
    if _counts_helpers(counted, code):
        return
    packed = sum(code["packed_bytes"][name] for name in helpers)
    total = run["total_bytes"]
    field = "code bytes: modules that the script imports are not in the counted code"
    values = {
        **helpers, "counted": counted, code["entry"]: code["entry_bytes"], "total with them packed": total + packed,
        "log_file": run["log_file"],
    }  # fmt: skip
    yield Finding(None, field, values, "helper_code_bytes", total + extra, SIZE_LIMIT_BYTES)


def check_code_sizes(record: Record) -> Iterator[Finding]:
    """Yield a committed script of another size than was counted, and seeds that printed different sizes."""
    files = record.get("source_file_bytes_in_folder") or {}
    committed = files.get("train_gpt.py") or next((size for name, size in files.items() if "train_gpt" in name), None)
    printed: dict[str, list[int]] = {}
    differing: dict[int, list[Run]] = {}
    with_helpers = sum((record.get("code") or {}).get("helpers", {}).values()) + (committed or 0)
    for run in one_run_a_seed(record):
        counted = run.get("code_bytes_implied")
        is_there = counted in (committed, files.get("train_gpt_packed.py"), with_helpers, sum(files.values()))
        if committed is not None and counted is not None and not is_there:
            differing.setdefault(counted, []).append(run)
        if run.get("code_bytes_printed"):
            sizes = str(sorted(run["code_bytes_printed"].values()))
            printed.setdefault(sizes, []).append(run["seed"])
    for counted, runs in differing.items():
        yield _committed_size(committed, counted, runs)
    if len(printed) > 1:
        field = "code size printed differs between the seeds of one record (not one revision of the script)"
        yield Finding(None, field, dict(printed), "code_sizes", len(printed), 1)


def _committed_size(committed: int | None, counted: int, runs: list[Run]) -> Finding:
    """Return one finding for all seeds that counted one size."""
    assert committed is not None
    values: dict[str, Any] = {"file_bytes": committed, "counted": counted, "seeds": [run["seed"] for run in runs]}
    models = [run["model_bytes"] for run in runs if run.get("model_bytes") is not None]
    if models:
        values["total_if_file_counted_as_is"] = max(models) + committed
        values["over_cap_if_counted_as_is"] = max(models) + committed > SIZE_LIMIT_BYTES
    field = "code bytes: train_gpt.py file as committed vs code bytes counted in the log total"
    return Finding(None, field, values, "committed_code_bytes", committed, counted)


def _counts_helpers(counted: int, code: dict[str, Any]) -> bool:
    """Return whether counted code may hold the helpers: as files, or packed (halfway between with and without)."""
    if counted == code["entry_bytes"]:
        return False
    packed = code["packed_bytes"]
    helpers = sum(packed[name] for name in code["helpers"])
    return bool(counted > code["entry_bytes"] or counted >= packed[code["entry"]] + helpers / 2)


def _trees(path: Path) -> list[ast.Module]:
    """Return the syntax trees of a file and of what it unpacks; [] for a file that is not Python."""
    trees = []
    source = path.read_text(encoding="utf-8", errors="replace")
    for _ in range(MAX_LAYERS):
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            break
        trees.append(tree)
        inner = _unpacked(tree)
        if inner is None:
            break
        source = inner
    return trees


def _unpacked(tree: ast.Module) -> str | None:
    """Return the source that a self-extracting script holds in one long literal, None for an ordinary script."""
    for node in ast.walk(tree):
        value = node.value if isinstance(node, ast.Constant) else None
        if not isinstance(value, str | bytes) or len(value) < PACKED_TEXT:
            continue
        data = value.encode("latin-1", errors="ignore") if isinstance(value, str) else value
        for decoded in _decodings(data):
            for unpack in (_unpack_lzma, _unpack_zlib):
                if (text := unpack(decoded)) is not None:
                    return text
    return None


def _decodings(data: bytes) -> Iterator[bytes]:
    yield data
    for decode in (base64.b85decode, base64.b64decode, base64.a85decode):
        try:
            yield decode(data)
        except ValueError:
            continue


def _unpack_lzma(data: bytes) -> str | None:
    filters = [{"id": lzma.FILTER_LZMA2}]
    for form, chain in ((lzma.FORMAT_AUTO, None), (lzma.FORMAT_RAW, filters)):
        try:
            text = lzma.LZMADecompressor(format=form, filters=chain).decompress(data, MAX_UNPACKED_BYTES)
            return text.decode("utf-8")
        except (lzma.LZMAError, EOFError, UnicodeDecodeError, ValueError):
            continue
    return None


def _unpack_zlib(data: bytes) -> str | None:
    for bits in (zlib.MAX_WBITS | 32, -zlib.MAX_WBITS):
        try:
            return zlib.decompressobj(bits).decompress(data, MAX_UNPACKED_BYTES).decode("utf-8")
        except (zlib.error, UnicodeDecodeError):
            continue
    return None


def _imports(trees: list[ast.Module]) -> Iterator[str]:
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ([node.module.split(".")[0]] if node.module else [alias.name for alias in node.names])


def _environment_reads(tree: ast.Module) -> Iterator[tuple[str, list[str]]]:
    """Yield every name that the code reads from the environment, with the names its value is assigned to.

    Helpers that take the name ("env_int('X', 1)") count by their own name.
    """
    assigned: dict[int, list[str]] = {}
    for node in ast.walk(tree):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        names = [_plain_name(target) for target in targets]
        if targets and node.value is not None:  # type: ignore[attr-defined]
            for inner in ast.walk(node.value):  # type: ignore[attr-defined]
                assigned.setdefault(id(inner), []).extend(name.lower() for name in names if name)
        elif isinstance(node, ast.keyword) and node.arg:
            for inner in ast.walk(node.value):
                assigned.setdefault(id(inner), []).append(node.arg.lower())
    for node in ast.walk(tree):
        name = _name_read(node)
        if name is not None and ENV_NAME.match(name):
            yield name, assigned.get(id(node), [])


def _name_read(node: ast.AST) -> str | None:
    """Return the name of a read of the environment: environ[...], environ.get(...), getenv(...), env_x(...)."""
    argument: ast.expr | None = None
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and _plain_name(node.value) == "environ":
        argument = node.slice
    elif isinstance(node, ast.Call) and node.args:
        called, owner = _plain_name(node.func), getattr(node.func, "value", None)
        is_read = called in ("get", "pop", "setdefault") and owner is not None and _plain_name(owner) == "environ"
        if is_read or (called or "").lower() == "getenv" or re.match(r"_?(get_)?env(_\w+)?$", called or ""):
            argument = node.args[0]
    is_text = isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    return argument.value if is_text else None  # type: ignore[union-attr]


def _plain_name(node: ast.AST) -> str | None:
    """Return the last part of a dotted name."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None
