"""`seedsweep inspect FILE`: what is inside an artifact, after checking all of it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from runner.errors import EXIT_OK


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("file", type=Path, help="an artifact, such as model.ssq in a seed's run directory")
    parser.add_argument("--format", choices=("text", "json"), default="text")


def execute(args: argparse.Namespace) -> int:
    """Print the artifact's content; a file that is damaged or lies ends in one line and exit code 2."""
    content = describe(args.file)
    print(json.dumps(content, indent=2, allow_nan=False) if args.format == "json" else render(content))
    return EXIT_OK


def describe(path: Path) -> dict[str, Any]:
    """Return everything that an artifact says and holds, as plain JSON values. Unpacks and checks the whole file."""
    import dataclasses

    from model.quant.artifact import load_artifact, read_artifact_info
    from model.quant.artifact_header import raw_sizes

    header, sizes = read_artifact_info(path)
    _, state = load_artifact(path)
    tensors = [
        {
            "name": entry.name,
            "shape": list(entry.shape),
            "bits": entry.bits,
            "numel": entry.numel,
            "raw_bytes": sum(raw_sizes([entry]).values()),
            "entropy_bits": None if entry.is_float else round(entropy_bits(state.matrices[entry.name].codes), 4),
            **({"correction": {"rank": entry.rank, "group": entry.group}} if entry.rank else {}),
        }
        for entry in header.tensors
    ]
    return {
        "path": str(path),
        "format": header.format,
        "model": dataclasses.asdict(header.config),
        "meta": header.meta,
        "tensors": tensors,
        "streams": [
            {"part": s.part, "codec": s.codec, "raw_bytes": s.raw_bytes, "bytes": s.num_bytes} for s in header.streams
        ],
        "totals": {
            "num_parameters": sum(entry.numel for entry in header.tensors),
            "raw_bytes": sum(stream.raw_bytes for stream in header.streams),
            **sizes._asdict(),
        },
    }


def entropy_bits(codes: Any) -> float:
    """Return the order-0 entropy of an integer tensor, in bits a number: what any memoryless coder needs at least."""
    share = codes.flatten().int().add(128).bincount().double() / codes.numel()
    share = share[share > 0]
    return float((share * (1 / share).log2()).sum())


def render(content: dict[str, Any]) -> str:
    """Return the description as text."""
    totals, tensors = content["totals"], content["tensors"]
    fields = ", ".join(f"{name}={value}" for name, value in content["model"].items())
    lines = [
        f"{content['path']}: seedsweep artifact, format {content['format']}, checksum and content checked",
        f"model: {totals['num_parameters']:,} parameters; {fields}",
        *(f"meta: {name}={value}" for name, value in content["meta"].items()),
        "",
        f"{'tensor':<18} {'shape':<16} {'bits':>5} {'numbers':>12} {'raw bytes':>12} {'entropy, bits':>14}",
    ]
    for row in tensors:
        shape = "x".join(map(str, row["shape"])) or "scalar"
        entropy = "-" if row["entropy_bits"] is None else f"{row['entropy_bits']:.3f}"
        lines.append(
            f"{row['name']:<18} {shape:<16} {row['bits']:>5} {row['numel']:>12,} {row['raw_bytes']:>12,} {entropy:>14}"
            + (f"  and a correction of rank {row['correction']['rank']}" if "correction" in row else "")
        )
    lines += ["", f"{'part':<8} {'codec':<8} {'streams':>7} {'raw bytes':>12} {'bytes':>12}"]
    for part, codec in dict.fromkeys((row["part"], row["codec"]) for row in content["streams"]):
        streams = [row for row in content["streams"] if (row["part"], row["codec"]) == (part, codec)]
        raw_bytes, num_bytes = (sum(row[key] for row in streams) for key in ("raw_bytes", "bytes"))
        lines.append(f"{part:<8} {codec:<8} {len(streams):>7} {raw_bytes:>12,} {num_bytes:>12,}")
    lines.append(f"{'header':<8} {'-':<8} {'-':>7} {totals['header_bytes']:>12,} {totals['header_bytes']:>12,}")
    raw_bytes = totals["raw_bytes"] + totals["header_bytes"]
    lines.append(f"{'total':<8} {'':<8} {'':>7} {raw_bytes:>12,} {totals['total_bytes']:>12,}")
    return "\n".join(lines)
