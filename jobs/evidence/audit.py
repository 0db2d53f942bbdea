"""`seedsweep audit DIR`: every rule probed on finished runs; `--self-test`: every probe shown a broken system."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.evidence.programs import refuse_program
from results.render import markdown_table
from runner.errors import EXIT_FAILED, EXIT_OK

DETAIL_WIDTH = 110
MARKDOWN_HEAD = ("probe", "rule", "result", "measured", "sample", "detail")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("out", metavar="DIR", nargs="?", type=Path, help="a sweep's --out folder, or one run directory")
    parser.add_argument("--seed", type=int, help="audit this seed only")
    parser.add_argument("--variant", metavar="V", help="audit the runs of this variant only")
    parser.add_argument("--probes", metavar="A,B,...", help="run these probes only (default: all)")
    parser.add_argument("--sample", metavar="N", type=int, default=8, help="documents to probe (default 8)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument(
        "--self-test", action="store_true", help="break a small system on purpose, see each probe object"
    )
    parser.add_argument("--format", choices=("text", "json", "markdown"), default="text")


def execute(args: argparse.Namespace) -> int:
    """Audit, print and return 1 if a probe failed (in the self-test: if a control was missed)."""
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads {args.threads} must be at least 1")
        from model.audit.audit import use_threads

        use_threads(args.threads)
    if args.self_test:
        return self_test(args)
    if args.out is None:
        raise ValueError("DIR is missing; give a sweep's --out folder, or --self-test")
    if args.sample < 1:
        raise ValueError(f"--sample {args.sample} must be at least 1 document")
    refuse_program(args.out, "seedsweep table lists what was found in its logs and files")
    from model.audit.audit import audit_run, choose_probes, has_failed
    from model.audit.finished_run import find_runs, is_finished

    probes = choose_probes(args.probes)
    every = find_runs(args.out)
    chosen = find_runs(args.out, seed=args.seed, variant=args.variant)
    unfinished = [path.name for path in chosen if not is_finished(path)]
    if len(unfinished) == len(chosen):
        raise ValueError(f"{args.out} has no finished run to audit ({', '.join(unfinished)}); let the sweep finish")
    contents = []
    for workdir in (path for path in chosen if path.name not in unfinished):
        content = audit_run(args.out, every, workdir, probes=probes, sample=args.sample, report=show_progress)
        contents.append(content)
        if args.format != "json":
            print(render(content, is_markdown=args.format == "markdown"), flush=True)
    if args.format == "json":
        result = "fail" if has_failed(contents) else "pass"
        print(json.dumps({"result": result, "runs": contents, "not_finished": unfinished}, indent=1))
    elif unfinished:
        print(f"not finished, so not audited: {', '.join(unfinished)}")
    return EXIT_FAILED if has_failed(contents) else EXIT_OK


def self_test(args: argparse.Namespace) -> int:
    """Run the negative controls and print which probe caught which."""
    from jobs.evidence.self_test_text import render_self_test
    from model.controls.self_test import examine, micro_run

    with micro_run() as audit:
        outcome = examine(audit, show_progress)
    if args.format == "json":
        print(json.dumps(outcome.as_json(), indent=1))
    else:
        print(render_self_test(outcome, is_markdown=args.format == "markdown"))
    return EXIT_OK if outcome.is_sound else EXIT_FAILED


def show_progress(phase: str, step: int, total: int | None, metrics: Mapping[str, Any]) -> None:
    """Say on a terminal what is being probed; silent elsewhere."""
    from runner.view.progress import can_redraw

    if can_redraw(sys.stderr):
        print(f"\r\033[K{phase} {step}/{total} {metrics.get('probe', '')}", end="", file=sys.stderr, flush=True)


def render(content: Mapping[str, Any], *, is_markdown: bool = False) -> str:
    """Return one run's results as a table."""
    head = f"{content['run']}: {content['result']} ({len(content['probes'])} results, {content['seconds']} s)"
    if is_markdown:
        rows = [
            [p["probe"], p["rule"], p["result"], figure(p), f"{p['sample_size']} {p['sample_of']}", p["detail"]]
            for p in content["probes"]
        ]
        return f"{head}\n\n{markdown_table(MARKDOWN_HEAD, rows, is_words=True)}"
    lines = [head]
    for p in content["probes"]:
        lines.append(f"  {p['result']:<13} {p['probe']:<17} {p['rule']:<6} {figure(p)}")
        notes = {"": p["detail"], "sample: ": f"{p['sample_size']} {p['sample_of']}", "not checked: ": p["not_checked"]}
        for label, text in notes.items():
            if text.strip():
                wrapped = textwrap.wrap(label + text, DETAIL_WIDTH, initial_indent=" " * 16, subsequent_indent=" " * 18)
                lines += wrapped
    return "\n".join(lines)


def figure(probe: Mapping[str, Any]) -> str:
    """Return measured figure, limit and unit in words."""
    measured, limit = (f"{x:.6g}" if isinstance(x, float) else "-" if x is None else str(x)
                       for x in (probe["measured"], probe["limit"]))  # fmt: skip
    return f"{measured} (limit {limit}) {probe['unit']}".strip()
