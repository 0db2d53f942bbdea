"""Limits that a log alone shows to be passed, and logs that contradict themselves or each other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations, pairwise
from typing import Any

from results.findings.findings import Finding
from results.findings.meanings import evaluation_seconds
from results.findings.readme_tables import seed_column, seed_in_cell, turn_table
from results.published.records import Record, Run, one_run_a_seed
from results.published.submitted import listed_seeds
from results.published.track import SIZE_LIMIT_BYTES, TIME_LIMIT_S

TRAIN_LIMIT_MS = 600_000
WORSE_TTT_BPB = 0.05  # a TTT result this much above the sliding one was not what a record meant to report
SCORING_PASSES = ("post_quant", "sliding", "ttt_lr0", "post_ttt")
EQUAL_LOSSES_FRAC = 0.5
MIN_SHARED_STEPS = 5
EARLY_STEP = 10
EARLY_LOSS_SLACK = 0.002  # what another order of sums makes of one start in ten steps
LOSS_DECIMALS = 3
THROUGHPUT_FRAC = 0.2
CLOCK_GRIDS_MS = (6_000, 1_000, 100, 10, 1)  # a tenth of a minute, a second, ...


def check_limits(record: Record) -> Iterator[Finding]:
    """Yield training over 600 s and totals over 16,000,000 bytes, once for several files of one run."""
    seen = set()
    for run in _chosen_first(record):
        train_ms, total = run.get("train_ms") or 0, run.get("total_bytes") or 0
        if train_ms > TRAIN_LIMIT_MS and (run["seed"], "train", train_ms) not in seen:
            seen.add((run["seed"], "train", train_ms))
            values = {"train_ms": train_ms, "log_file": _files(record, run, "train_ms")}
            field = "logged train_time over 600,000 ms (stop check granularity)"
            yield Finding(run["seed"], field, values, "train_seconds", train_ms / 1000, TRAIN_LIMIT_MS / 1000)
        if total > SIZE_LIMIT_BYTES and (run["seed"], "size", total) not in seen:
            seen.add((run["seed"], "size", total))
            values = {"log_total_bytes": total, "log_file": _files(record, run, "total_bytes")}
            yield Finding(
                run["seed"], "log total bytes over the 16,000,000 cap", values, "total_bytes", total, SIZE_LIMIT_BYTES
            )


def check_evaluation_time(record: Record) -> Iterator[Finding]:
    """Yield evaluation passes over 600 s; where none is, their sum when it is."""
    for run in one_run_a_seed(record):
        passes = {stage: s for stage, s in evaluation_seconds(run).items() if stage not in ("post_ema", "live")}
        over = {stage: seconds for stage, seconds in passes.items() if seconds > TIME_LIMIT_S}
        totals = [run[name] for name in ("total_eval_s", "total_eval_with_compile_s") if run.get(name)]
        together = max([sum(seconds for stage, seconds in passes.items() if stage in SCORING_PASSES), *totals])
        if over:
            values: dict[str, Any] = {f"{stage} s": seconds for stage, seconds in over.items()}
            values |= {"together s": together, "log_file": run["log_file"]}
            yield Finding(
                run["seed"], "evaluation over 600 s", values, "evaluation_seconds", max(over.values()), TIME_LIMIT_S
            )
        elif together > TIME_LIMIT_S:
            values = {f"{stage} s": seconds for stage, seconds in passes.items()}
            values |= {"printed totals s": totals, "log_file": run["log_file"]}
            field = "evaluation passes together over 600 s (each is under it)"
            yield Finding(run["seed"], field, values, "evaluation_seconds_together", together, TIME_LIMIT_S)


def check_seed_names(record: Record) -> Iterator[Finding]:
    """Yield logs whose file name and lines name different seeds."""
    for run in record["runs"]:
        named, inside = run.get("seed_in_filename"), run.get("seed_in_log")
        if named is not None and inside is not None and named != inside:
            values = {"file name": named, "log": inside, "log_file": run["log_file"]}
            yield Finding(run["seed"], "seed in the file name vs in the log", values, "seed_name", named, inside)


def check_several_logs(record: Record) -> Iterator[Finding]:
    """Yield seeds of which several logs show different final scores."""
    for run in one_run_a_seed(record):
        scores = {
            other["log_file"]: other["final_bpb"]
            for other in record["runs"]
            if other["seed"] == run["seed"] and other["final_bpb"] is not None
        }
        if len(set(scores.values())) > 1:
            field = "several logs of one seed differ"
            values = {**scores, "used": run["log_file"]}
            yield Finding(run["seed"], field, values, "several_logs", len(scores), 1)


def check_worse_ttt(record: Record) -> Iterator[Finding]:
    """Yield adaptation that made the score much worse."""
    for run in one_run_a_seed(record):
        sliding, adapted = run.get("sliding"), run.get("post_ttt")
        if sliding and adapted and adapted["val_bpb"] > sliding["val_bpb"] + WORSE_TTT_BPB:
            field = "log holds a later, worse TTT result that the submission does not report"
            if run["scored_stage"] == "sliding":
                field += " (submission reports the sliding stage)"
            values = {"sliding_bpb": sliding["val_bpb"], "post_ttt_bpb_in_log": adapted["val_bpb"]}
            limit = sliding["val_bpb"] + WORSE_TTT_BPB
            yield Finding(run["seed"], field, values, "worse_ttt", adapted["val_bpb"], limit)


def check_near_duplicates(record: Record) -> Iterator[Finding]:
    """Yield the seeds whose logs have mostly the same loss lines, or the same training clock, as another seed's."""
    pairs = list(_duplicates(one_run_a_seed(record)))
    if pairs:
        seeds = sorted({run["seed"] for a, b, _, _ in pairs for run in (a, b)})
        values: dict[str, Any] = {f"seeds {a['seed']} and {b['seed']}": shared for a, b, shared, _ in pairs}
        times = [a.get("train_ms") is not None and a.get("train_ms") == b.get("train_ms") for a, b, _, _ in pairs]
        values |= {"same train_ms": all(times), "files": [run["log_file"] for run in one_run_a_seed(record)]}
        field = f"logs of seeds {', '.join(map(str, seeds))} are nearly the same file"
        yield Finding(None, field, values, "near_duplicate_logs", max(frac for *_, frac in pairs), EQUAL_LOSSES_FRAC)


def _duplicates(runs: list[Run]) -> Iterator[tuple[Run, Run, str, float]]:
    """Yield pairs of runs with what they share, in words and as a share."""
    for a, b in combinations(runs, 2):
        for name, what in (("train_losses", "losses"), ("clock", "training clocks")):
            first, second = _by_step(a.get(name)), _by_step(b.get(name))
            shared = first.keys() & second.keys()
            equal = sum(first[step] == second[step] for step in shared)
            is_fine = name == "clock" or _decimals(first.values()) >= LOSS_DECIMALS
            is_fine = is_fine and (name != "clock" or not _is_coarse(first.values()))
            if len(shared) >= MIN_SHARED_STEPS and equal >= EQUAL_LOSSES_FRAC * len(shared) and is_fine:
                yield a, b, f"{equal} of {len(shared)} logged {what} are equal", equal / len(shared)
                break


def _is_coarse(times: Iterable[float]) -> bool:
    """Return whether a clock was printed in tenths of a second or coarser, where equal times mean nothing."""
    return all(_grid(ms) >= 100 for ms in times)


def check_first_losses(record: Record) -> Iterator[Finding]:
    """Yield different seeds that start with one loss, and logs of one seed that start with different ones."""
    runs = [run for run in record["runs"] if isinstance(run.get("seed"), int) and _by_step(run.get("train_losses"))]
    duplicates = {frozenset((a["log_file"], b["log_file"])) for a, b, _, _ in _duplicates(one_run_a_seed(record))}
    for seed in dict.fromkeys(run["seed"] for run in runs):
        starts = {
            run["log_file"]: loss for run in runs if run["seed"] == seed and (loss := _first_loss(run)) is not None
        }
        if len(set(starts.values())) > 1:
            first, *others = starts.values()
            field = "logs of one seed start with different losses: other data, code or seed"
            yield Finding(seed, field, starts, "first_loss", others[-1], first)
    for a, b in combinations(one_run_a_seed(record), 2):
        curves = _by_step(a.get("train_losses")), _by_step(b.get("train_losses"))
        if frozenset((a["log_file"], b["log_file"])) in duplicates or not _has_one_start(*curves):
            continue
        field = f"seeds {a['seed']} and {b['seed']} have the same training loss in step 1: one seed was run twice"
        values = {a["log_file"]: curves[0][1], b["log_file"]: curves[1][1]}
        yield Finding(None, field, values, "first_loss", curves[0][1], f"different from {curves[1][1]}")


def _first_loss(run: Run) -> float | None:
    return _by_step(run.get("train_losses")).get(1)


def _has_one_start(first: dict[int, float], second: dict[int, float]) -> bool:
    """Return whether two loss curves start alike: step 1 equal, and the other steps up to 10 that both show.

    One equal loss may be chance (a few percent of pairs of seeds), so a curve without such steps shows nothing.
    """
    early = [step for step in first.keys() & second.keys() if 1 < step <= EARLY_STEP]
    is_alike = all(abs(first[step] - second[step]) <= EARLY_LOSS_SLACK for step in early)
    has_start = bool(early) and 1 in first and 1 in second
    return has_start and first[1] == second[1] and is_alike and _decimals([first[1]]) >= LOSS_DECIMALS


def check_clocks(record: Record) -> Iterator[Finding]:
    """Yield training clocks that run backwards while the steps go on."""
    for run in record["runs"]:
        backwards = []
        points = [(step, ms) for step, ms in run.get("clock") or [] if step is not None and ms is not None]
        for (step, before), (later, after) in pairwise(points):
            if later >= step > 0 and before - after > _grid(before) / 2 + _grid(after) / 2:
                backwards.append((later, before, after))
        if backwards:
            step, before, after = max(backwards, key=lambda entry: entry[1] - entry[2])
            field = f"training clock runs backwards at step {step}: {before:.0f} ms, then {after:.0f} ms"
            values = {"log_file": run["log_file"], "times": len(backwards)}
            yield Finding(run["seed"], field, values, "clock_ms", after, before)


def check_throughput(record: Record) -> Iterator[Finding]:
    """Yield logs whose tokens per second are not steps times tokens over time, by more than a fifth in most lines."""
    for run in record["runs"]:
        tokens = _setting(run, "train_batch_tokens")
        clock = _by_step(run.get("clock"))
        off = []
        rates = [(step, rate) for step, rate in run.get("token_rates") or [] if rate and clock.get(step)]
        for step, rate in rates:
            ms = clock[step]
            if tokens and step >= EARLY_STEP and ms >= 5 * _grid(ms):
                off.append((abs(rate * ms / 1000 / (step * tokens) - 1), step, rate, step * tokens / ms * 1000))
        wrong = [entry for entry in off if entry[0] > THROUGHPUT_FRAC]
        if len(off) >= 2 and len(wrong) > len(off) / 2:
            _, step, rate, expected = max(wrong)
            field = f"tokens per second at step {step} are not steps x tokens / time"
            values = {"log": rate, "steps x tokens / time": expected, "log_file": run["log_file"]}
            yield Finding(run["seed"], field, values, "tokens_per_second", rate, expected)


def check_seed_selection(record: Record) -> Iterator[Finding]:
    """Yield seeds that have a log but are left out of what is reported, when they score worse."""
    runs = {
        run["seed"]: run["final_bpb"] for run in record["runs"] if isinstance(run["seed"], int) and run["final_bpb"]
    }
    runs |= {run["seed"]: run["final_bpb"] for run in one_run_a_seed(record)}  # of several logs the one that counts
    listed = {*listed_seeds(record.get("submission_json")), *_readme_seeds(record)}
    kept = [score for seed, score in runs.items() if seed in listed]
    left = {seed: score for seed, score in runs.items() if seed not in listed}
    if not kept or not left:
        return
    mean, mean_of_all = sum(kept) / len(kept), sum(runs.values()) / len(runs)
    if mean_of_all > mean:
        field = f"{len(left)} of {len(runs)} seeds with a log are left out, and they score worse"
        values = {f"seed {seed}": score for seed, score in left.items()}
        values |= {"mean of the listed": mean, "mean of all": mean_of_all}
        yield Finding(None, field, values, "seed_selection", mean, mean_of_all)


def _readme_seeds(record: Record) -> set[int]:
    tables = [turn_table(table) for table in record.get("readme_seed_tables") or []]
    cells = [str(row.get(seed_column(table["columns"]) or "", "")) for table in tables for row in table["rows"]]
    return {seed for cell in cells if (seed := seed_in_cell(cell)) is not None}


def _chosen_first(record: Record) -> list[Run]:
    used = {run["log_file"] for run in one_run_a_seed(record)}
    return sorted(record["runs"], key=lambda run: run["log_file"] not in used)


def _files(record: Record, run: Run, figure: str) -> Any:
    """Return the file of a run, or the files where several show the same figure for its seed."""
    files = [
        other["log_file"]
        for other in record["runs"]
        if (other["seed"], other.get(figure)) == (run["seed"], run[figure])
    ]
    return files[0] if len(files) == 1 else files


def _by_step(points: list[list[Any]] | None) -> dict[int, float]:
    return {int(step): value for step, value in points or [] if step is not None and value is not None}


def _decimals(values: Any) -> int:
    return max((len(repr(float(value)).partition(".")[2]) for value in values), default=0)


def _grid(ms: float) -> float:
    """Return the coarsest unit that a time may have been printed in, in ms."""
    return next((grid for grid in CLOCK_GRIDS_MS if round(ms) % grid == 0), 1)


def _setting(run: Run, name: str) -> float | None:
    value = (run.get("settings") or {}).get(name, (run.get("hparams") or {}).get(name))
    return float(value) if value is not None and str(value).replace("_", "").replace(".", "", 1).isdigit() else None
