"""Where a record contradicts itself: logs against submission.json, README tables, leaderboard and pull request text.

A printed value agrees when it is the log's value rounded to the decimals it was printed with. The list is
mechanical: a README may have meant another stage or another run, and then the finding says which stage it equals.
docs/imports.md names every check; the modules named here hold them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from results.findings import code_files, log_checks, text_checks
from results.findings.findings import Finding, Review, merge_claims, say_unchecked
from results.findings.headline import check_headline
from results.findings.said import compare_said, missing_seeds
from results.findings.spread import check_stds
from results.published.printed import printed_number
from results.published.records import Record, one_run_a_seed

SAME_IN_ALL_SEEDS_EXCEPT = re.compile(
    r"seed|run_id|run_name|logfile|path|dir|files|rank|wandb|port|host|device|time_stamp"
)
MEASURED = re.compile(r"\d+(\.\d+)?\s*(s|ms|sec|seconds|bytes|MiB|MB|GiB|GB)")
MAX_SINGLE_SETTINGS = 3
MAX_SHOWN_SETTINGS = 12
LOG_CHECKS: tuple[Callable[[Record], Iterator[Finding]], ...] = (
    log_checks.check_limits, log_checks.check_evaluation_time, log_checks.check_seed_names,
    log_checks.check_several_logs, log_checks.check_worse_ttt, log_checks.check_near_duplicates,
    log_checks.check_first_losses, log_checks.check_clocks, log_checks.check_throughput,
    text_checks.check_nats_per_bpb, text_checks.check_coverage, text_checks.check_shards,
    code_files.check_code_sizes, code_files.check_helper_bytes, code_files.check_hidden_settings,
    log_checks.check_seed_selection,
)  # fmt: skip


def review(record: Record) -> Review:
    """Return every contradiction inside a record, and what it prints that no log can confirm."""
    findings = [finding for check in LOG_CHECKS for finding in check(record)]
    findings += _different_settings(record)
    headline, spread, said = check_headline(record), check_stds(record), compare_said(record)
    printed = merge_claims(said.claims)
    findings += [_with_mean_rows(finding, printed) for finding in headline.findings]
    findings += [*spread.findings, *missing_seeds(record, said), *printed]
    unchecked = [*headline.unchecked, *spread.unchecked, *say_unchecked(said.unchecked)]
    return Review(findings, list(dict.fromkeys(unchecked)))


def _with_mean_rows(finding: Finding, printed: list[Finding]) -> Finding:
    """Return a headline with the README's rows of means that repeat it, which are taken out of `printed`."""
    said = printed_number(finding.value)[0]
    for other in [other for other in printed if other.field.startswith("mean of ") and finding.check == "headline"]:
        value, half_unit = printed_number(other.value)
        if said is not None and value is not None and abs(value - said) <= half_unit + 1e-9:
            printed.remove(other)
            places = {place: cell for place, cell in other.values.items() if place.startswith("README")}
            finding = finding._replace(values={**finding.values, **places})
    return finding


def find_disagreements(record: Record) -> list[Finding]:
    """Return every contradiction inside a record, logs first, then what was written about them."""
    return review(record).findings


def _different_settings(record: Record) -> Iterator[Finding]:
    """Yield the hyperparameters that differ between seeds: one finding each, or one for many."""
    runs = one_run_a_seed(record)
    dumps = {run["seed"]: run.get("hparams") or run.get("settings") or {} for run in runs}
    differing: dict[str, dict[str, str]] = {}
    for name in sorted({name for dump in dumps.values() for name in dump}):
        values = {str(seed): str(dump[name]) for seed, dump in dumps.items() if name in dump}
        is_measured = any(MEASURED.fullmatch(value) for value in values.values())
        if not SAME_IN_ALL_SEEDS_EXCEPT.search(name) and len(set(values.values())) > 1 and not is_measured:
            differing[name] = values
    if len(differing) > MAX_SINGLE_SETTINGS:
        field = f"{len(differing)} hyperparameters differ between the seeds: not one configuration"
        values = {name: ", ".join(f"seed {seed} {value}" for seed, value in shown.items())
                  for name, shown in list(differing.items())[:MAX_SHOWN_SETTINGS]}  # fmt: skip
        yield Finding(None, field, values, "one_configuration", len(differing), 0)
        return
    for name, values in differing.items():
        field = f"hyperparameter {name} differs between the seeds"
        yield Finding(None, field, dict(values), "one_configuration", len(set(values.values())), 1)
