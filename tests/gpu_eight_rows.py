"""What tests.gpu_eight found, as tables, and what that lets one expect: python -m tests.gpu_eight_rows ROWS.jsonl.

Pure functions over its rows (docs/bench/README.md says what each holds). Rows of a call that was cut off make a table
too: what was not measured is left out of it, or said not to be there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from results.render import markdown_table

Row = Mapping[str, Any]

# Logs of parameter-golf PR #1536: 8 H100, FlashAttention-3, steps of 786,432 tokens, 35 % of the time without loops.
PUBLISHED_GPUS = 8
PUBLISHED_RATES = {"plain": 8.15e6, "looped": 5.5e6}
PUBLISHED_STEPS = 4820
PUBLISHED_S = 588.0  # of training: 600 s less 12 s for the artifact
PLAIN_SHARE = 0.35
BATCH_TOKENS = 786_432
VISITS = {"plain": "11 layers", "looped": "17 visits"}
SLOWER_PERCENT = 2.0  # by which a gang may be slower while another one loses a rank
STAGES = ("train", "quantize", "evaluate", "ttt")
PASSES = ("live", "post_ema", "pre_ttt", "ttt_lr0", "post_ttt")


class Need(NamedTuple):
    """The seconds that a part needs at least, and those that it may have at most."""

    part: str
    least_s: float
    most_s: float


def share_s(needs: Sequence[Need], part: str, left_s: float) -> float | None:
    """Return the seconds that a part may take of those that are left; None where they are too few to begin it.

    What the parts after it need at least is kept for them, as far as it does not need that itself.
    """
    place = [need.part for need in needs].index(part)
    need, kept_s = needs[place], sum(need.least_s for need in needs[place + 1 :])
    return min(max(left_s - kept_s, need.least_s), need.most_s) if left_s >= need.least_s else None


def waves(gpus: int) -> list[list[int]]:
    """Return the numbers of GPUs to measure, 1, 2, 4 and so on to gpus: those below it at once, for they fit beside
    each other, then all GPUs alone.
    """
    counts = [2**power for power in range(gpus.bit_length()) if 2**power <= gpus]
    assert counts[-1] == gpus, gpus
    return [wave for wave in (counts[:-1], counts[-1:]) if wave]


def project_steps(rates: Mapping[str, float], seconds: float = PUBLISHED_S) -> int:
    """Return the steps of 786,432 tokens that seconds hold at these tokens/s, 35 % of the time without loops."""
    mean = PLAIN_SHARE * rates["plain"] + (1 - PLAIN_SHARE) * rates["looped"]
    return int(seconds * mean / BATCH_TOKENS)


def slower_percent(before: Row | None, now: Row | None) -> float | None:
    """Return by how many percent the median of one group of samples is below an earlier one's."""
    return None if before is None or now is None else 100 * (1 - now["median"] / before["median"])


def find(rows: Iterable[Row], **wanted: Any) -> Row | None:
    """Return the last row with these values, None where there is none."""
    found = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    return found[-1] if found else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file; a last line that was cut off does not count."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def summarize(rows: Sequence[Row]) -> str:
    """Return the tables and the projection as Markdown, ready for docs/performance.md."""
    machine = find(rows, part="machine")
    parts = [describe_machine(machine)] if machine else []
    for section in (summarize_published, summarize_scale, summarize_gangs, summarize_plan):
        parts += section(rows)
    parts += [f"Left out: {row['part']}, {row['left_out']}." for row in rows if row.get("left_out")]
    parts += [f"Cut off: {row['part']} after {row['seconds']:.0f} s." for row in rows if row.get("cut")]
    parts += [f"Failed: {row['part']}, {row['error']}." for row in rows if row.get("error")]
    return "\n\n".join(parts) + "\n"


def left_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown whose cells are words as well as numbers: all to the left."""
    return markdown_table(header, lines).replace("---:", "---")


def describe_machine(row: Row) -> str:
    """Return what everything ran on."""
    device = f"{row['gpus']} x {row['gpu_model']}" if row["gpu_model"] else f"{row['gpus']} CPU ranks"
    versions = f"torch {row['torch']}, Ray {row['ray']}"
    return f"{device} of one host, {row['cpus']} CPU cores, {versions}, commit {row['git_commit'] or 'unknown'}."


def summarize_published(rows: Sequence[Row]) -> list[str]:
    """Return the table of the published recipe, and the projection."""
    train = find(rows, part="published", row="train")
    if train is None:
        return []
    lines = [*rate_lines(train), *stage_lines(rows)]
    table = left_table(("published recipe, in a run through Ray", "measured", "published logs"), lines)
    return [table, *projection(train)]


def rate_lines(train: Row) -> list[list[str]]:
    """Return what training measured."""
    is_alike = train["gpus"] == PUBLISHED_GPUS
    lines = []
    for loop, rate in train["rates"].items():
        if rate is not None:
            factor = f" (x{rate['median'] / PUBLISHED_RATES[loop]:.2f})" if is_alike else ""
            cells = [f"{millions(rate)}{factor}, {rate['samples']} steps", f"{PUBLISHED_RATES[loop] / 1e6:.2f} M"]
            lines.append([f"train tokens/s, {VISITS[loop]}, {train['attention']}", *cells])
    clocks, power = train["gpu_clock_mhz"], train["gpu_power_w"]
    lines.append([f"steps within {train['train_s']:.1f} s", f"{train['steps']:,}", "-"])
    warm = f"{train['warmup_s']:.1f} s, {train['compile_s']:.1f} s"
    lines.append(["warm-up before the training clock, compilation in it", warm, "-"])
    if clocks:
        watts = f"{power['median'] / train['gpus']:.0f} W a GPU"
        lines.append(["slowest SM clock, power, medians", f"{clocks['median']:.0f} MHz, {watts}", "-"])
    return lines


def stage_lines(rows: Sequence[Row]) -> list[list[str]]:
    """Return the seconds of every stage and pass, the artifact's bytes, and the memory."""
    lines = []
    start, end = (find(rows, part="published", row=name) for name in ("start", "end"))
    if start:
        lines.append(["from the command to the ranks' first word", f"{start['seconds']:.1f} s", "-"])
    stages = {name: find(rows, part="published", row=name) for name in STAGES}
    took = [f"{name} {row['stage_s']:.1f}" for name, row in stages.items() if row]
    lines.append(["stages, s", ", ".join(took), "-"])
    passes = {name: value for row in stages.values() if row for name, value in row.get("passes_s", {}).items()}
    if passes:
        lines.append(["passes, s", ", ".join(f"{name} {value:.2f}" for name, value in passes.items()), "-"])
    if ttt := stages["ttt"]:
        what = f"TTT of {ttt['documents']:,} documents, {ttt['tokens']:,} targets"
        lines.append([what, f"{ttt['passes_s']['post_ttt']:.1f} s", "-"])
        lines.append(["post-TTT bpb", f"{ttt['bpb']['post_ttt']:.5f}", "another text"])
    if quantize := stages["quantize"]:
        fits = "within" if quantize["within_limit"] else "over"
        lines.append(["artifact bytes", f"{quantize['artifact_bytes']:,} ({fits} the limit)", "-"])
    peaks = {name: row["peak_memory_bytes"] / 2**30 for name, row in stages.items() if row}
    lines.append(["largest rank's peak, GiB", ", ".join(f"{name} {peak:.1f}" for name, peak in peaks.items()), "-"])
    if end and end["gpu_used_bytes"]:
        used = ", ".join(f"{value / 2**30:.1f}" for value in end["gpu_used_bytes"])
        lines.append(["most memory in use on each GPU, GiB", used, "-"])
    return lines


def projection(train: Row) -> list[str]:
    """Return what the measured rates would come to in a whole run, labeled as what it is."""
    medians = {loop: rate["median"] for loop, rate in train["rates"].items() if rate is not None}
    if set(medians) != set(VISITS) or train["batch_tokens"] != BATCH_TOKENS:
        return ["No projection: it needs the published step, timed without loops and with them."]
    theirs = f"the published logs have {PUBLISHED_STEPS:,} on {PUBLISHED_GPUS} H100"
    return [
        f"**Projection, not measured:** at these rates {PUBLISHED_S:.0f} s of training on {train['gpus']} GPUs hold "
        f"{project_steps(medians):,} steps, {PLAIN_SHARE:.0%} of the time without loops; {theirs}."
    ]


def summarize_scale(rows: Sequence[Row]) -> list[str]:
    """Return the table of speeds by number of GPUs."""
    found = [row for row in rows if row["part"] == "scale" and row["row"] == "rates"]
    if not found:
        return []
    one = find(found, gpus=1)
    lines = [
        [str(row["gpus"]), *(scaled(row, one, loop) for loop in VISITS), f"{row['peak_memory_gib']:.1f}",
         ", ".join(map(str, row["beside"])) or "-"]
        for row in sorted(found, key=lambda row: row["gpus"])
    ]  # fmt: skip
    labels = [f"tokens/s, {found[0]['visits'][loop]}" for loop in VISITS]
    header = ("GPUs", *labels, "peak GiB", "measured beside gangs of")
    return [left_table(header, lines)]


def scaled(row: Row, one: Row | None, loop: str) -> str:
    """Return a rate, and how many times that of one GPU it is."""
    rate = row["rates"].get(loop)
    if rate is None:
        return "-"
    base = one["rates"].get(loop) if one else None
    return millions(rate) + (f" (x{rate['median'] / base['median']:.2f})" if base and row is not one else "")


def summarize_gangs(rows: Sequence[Row]) -> list[str]:
    """Return what became of two gangs of which one lost a rank."""
    fates, speed = find(rows, part="gangs", row="fates"), find(rows, part="gangs", row="speed")
    lines = []
    if fates:
        killed = fates["killed"]
        death = f"rank {killed['rank']} of seed {killed['seed']} killed at step {killed['step']}" if killed else "none"
        ends = ", ".join(f"seed {seed} {fate['state']} at attempt {fate['attempts']}"
                         for seed, fate in fates["fates"].items())  # fmt: skip
        lines += [["killed", death], ["ends", ends]]
    if speed:
        lines.append(["from the kill to training again", seconds(speed["again_after_s"])])
        before = speed["before"]
        lines.append(["the other gang's tokens/s before the kill", millions(before) if before else "-"])
        for name, what in (("gone", "while the killed gang was gone"), ("both", "once both trained again")):
            lines.append([f"slower {what} by", slower(speed[f"{name}_slower_percent"], speed[name])])
        alone = slower(speed["together_slower_percent"], speed["alone"], bar="no bar")
        lines.append(["slower than a gang that trains while the other is past training by", alone])
    if not lines:
        return []
    gpus = (fates or speed or {})["gpus_each"]
    return [left_table((f"two gangs of {gpus} at once", "measured"), lines)]


def summarize_plan(rows: Sequence[Row]) -> list[str]:
    """Return what `seedsweep plan` says, and the figure of the preflight."""
    lines = []
    for row in rows:
        if row["part"] == "plan" and row["row"] == "plan":
            said = "; ".join([row["slots"], f"exit code {row['exit_code']}", *row["problems"]])
            lines.append([f"`seedsweep plan`, gangs of {row['gang']}", said])
    start = find(rows, part="published", row="start")
    if start and start["all_reduce_bytes_per_s"]:
        lines.append(["preflight's all-reduce of the whole gang", f"{start['all_reduce_bytes_per_s'] / 1e9:.1f} GB/s"])
    return [left_table(("this machine", "says"), lines)] if lines else []


def millions(rate: Row) -> str:
    """Return a median of tokens/s in millions."""
    return f"{rate['median'] / 1e6:.3f} M"


def seconds(value: float | None) -> str:
    """Return seconds, or that they are not known."""
    return "not seen" if value is None else f"{value:.1f} s"


def slower(percent: float | None, samples: Row | None, bar: str = f"bar: {SLOWER_PERCENT:g} %") -> str:
    """Return by how much something is slower, over how many steps, beside the bar."""
    if percent is None or samples is None:
        return "not measured"
    return f"{percent:+.2f} %, {samples['samples']} steps ({bar})"


if __name__ == "__main__":
    print(summarize(read_rows(Path(sys.argv[1]))), end="")
