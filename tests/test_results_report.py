"""results.report.data, figures and report: the page's numbers are the rows', and contradictions are shown."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import results
from jobs.cli import main
from results.compare.variants import Ablation, read_table
from results.report.data import read_system
from results.report.figures import PALETTE, draw_all, inline_svg, timing
from results.report.page import write_report
from results.tables import shown_columns
from tests.browser import Page, find_chromium, with_page
from tests.fake_runs import FakeVariant, commit_failed, commit_fake, fake_ablation, fake_sweep, seed_table
from tests.submissions import write_submission

FIGURES = ("loss", "waterfall", "ttt_by_length", "intervals", "timing", "artifact")


class Cells(HTMLParser):
    """Collects the seed table's cells: (seed, column) -> full-precision text, and every address in the page."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[tuple[str, str], str] = {}
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "td" and given.get("data-seed") and given.get("data-column"):
            self.values[str(given["data-seed"]), str(given["data-column"])] = given.get("data-value") or ""
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep of three seeds."""
    return fake_sweep(tmp_path_factory.mktemp("sweep"))


def test_the_time_against_the_limit_has_what_fit_measures(tmp_path: Path) -> None:
    system = read_system(str(fake_sweep(tmp_path, (42,), hessian_s=3.5, sensitivity_s=8.5)))
    drawn = timing(system)
    assert drawn is not None
    assert "Training with all that reads its data: at most 600.1 s (OVER 600 s)" in drawn.caption
    assert "sensitivity" in drawn.svg


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures out of a page, for tests about its words."""
    monkeypatch.setattr("results.report.page.draw_all", lambda _system: [])


@pytest.fixture(scope="module")
def report(sweep: Path) -> Path:
    """Its report."""
    path = sweep / "out" / "report.html"
    assert main(["report", str(sweep), "-o", str(path), "--with", "pr:1536"]) == 0
    return path


def test_the_pages_table_holds_the_values_of_the_rows(sweep: Path, report: Path) -> None:
    cells = Cells()
    cells.feed(report.read_text())
    table = seed_table(sweep)
    rows = {str(row["seed"]): row for row in table.seeds}
    expected = {(seed, key): repr(row[key]) for seed, row in rows.items() for _, key, _ in shown_columns(table)}
    assert cells.values == expected


def test_the_page_needs_no_network(report: Path) -> None:
    cells = Cells()
    cells.feed(report.read_text())
    assert all(address.startswith(("#", "data:")) for address in cells.addresses)
    assert "@import" not in report.read_text()
    assert not re.search(r"url\((?!#)", report.read_text())


def test_every_figure_is_in_the_page_and_on_disk(report: Path) -> None:
    files = {path.name for path in (report.parent / "report_figures").iterdir()}
    assert files == {f"{name}{suffix}" for name in FIGURES for suffix in (".svg", ".png")}
    assert report.read_text().count("<figure>") == len(FIGURES)
    assert report.read_text().count("<svg") == len(FIGURES)


def test_figures_take_the_pages_colors_inside_and_plain_ones_outside(sweep: Path, report: Path) -> None:
    drawn = draw_all(read_system(str(sweep)))
    for entry in drawn:
        inside = inline_svg(entry, "x")
        assert "var(--ink)" in inside
        assert not any(placeholder in inside for placeholder, _ in PALETTE.values())
    for path in (report.parent / "report_figures").glob("*.svg"):
        assert not any(placeholder in path.read_text() for placeholder, _ in PALETTE.values())


def test_ids_of_two_figures_cannot_clash(report: Path) -> None:
    ids = re.findall(r'\bid="([^"]+)"', report.read_text())
    assert len(ids) == len(set(ids))
    targets = set(re.findall(r'(?:url\(#|href="#)([^")]+)', report.read_text()))
    assert targets <= set(ids)


def test_a_consistent_sweep_has_no_disagreements(report: Path) -> None:
    assert "None found: rows, their sums over documents and their hashes agree." in report.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"artifact_bytes": 15_000_000}, "artifact_bytes 15000000, but model + code is"),
        ({"post_ttt_bpb": 1.07}, "post_ttt_bpb 1.07000000, but its nats and bytes give"),
        ({"post_ttt_nats": 1.0}, "post_ttt_nats 1.000000, but its document rows sum to"),
        ({"code_hash": "1" * 64}, "code_hash differs between seeds: not one configuration"),
    ],
)
def test_contradictions_inside_the_rows_are_listed(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    fake_sweep(tmp_path, (0,))
    commit_fake(tmp_path, 42)
    run = {name: value for name, value in change.items() if not name.startswith("post_ttt")}
    commit_fake(tmp_path, 42, **run)
    if not run:
        _rewrite(tmp_path, change)
    assert any(message in line for line in read_system(str(tmp_path)).disagreements)


def _rewrite(out: Path, change: dict[str, Any]) -> None:
    """Change figures of seed 42 behind the store's back."""
    path = next((out / "results" / "runs").glob("seed=42-*.parquet"))
    frame = results.load(out)
    row = frame[frame["seed"] == 42].assign(**change)
    row.to_parquet(path)


def test_an_import_shows_what_it_found(tmp_path: Path, no_figures: None) -> None:
    folder = write_submission(tmp_path / "record", val_bpb_std=0.00064)
    assert main(["import-logs", str(folder), "--out", str(tmp_path / "out")]) == 0
    write_report([str(tmp_path / "out")], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "record: std convention: stated 0.00064" in text
    assert "imported from record" in text


def test_failed_seeds_and_an_audit_are_shown(tmp_path: Path, no_figures: None) -> None:
    fake_sweep(tmp_path, (42,))
    commit_failed(tmp_path, 7, error="rank 3: <out of memory>")
    probes = [{"probe": "causality", "result": "fail", "measured": 0.3, "limit": 0.0, "detail": "<leak>"}]
    audited = tmp_path / "seeds" / "seed=42-repeat=0"
    audited.mkdir(parents=True)
    (audited / "audit.json").write_text(json.dumps({"probes": probes}))
    write_report([str(tmp_path)], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "rank 3: &lt;out of memory&gt;" in text
    assert '<span class="mark">fail</span>' in text
    assert "seed=42-repeat=0: causality fail: &lt;leak&gt;" in text
    assert "no spread" in text


@pytest.mark.slow
def test_several_directories_stand_side_by_side(tmp_path: Path, sweep: Path) -> None:
    other = fake_sweep(tmp_path / "other", shift=0.002, sweep="other")
    written = write_report([str(sweep), str(other)], tmp_path / "page.html")
    text = written[0].read_text()
    assert "Side by side" in text
    assert {path.name for path in written} >= {"all_intervals.svg", "0_loss.svg", "1_loss.png"}


def test_nothing_to_show_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "page.html")]) == 2
    assert "no results here" in capsys.readouterr().err
    commit_failed(tmp_path, 1)
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "page.html")]) == 0


@pytest.mark.slow
@pytest.mark.skipif(find_chromium() is None, reason="no Chromium installed (Debian package chromium)")
def test_a_real_browser_shows_the_page_without_errors(sweep: Path, report: Path) -> None:
    rows = {str(row["seed"]): row for row in seed_table(sweep).seeds}
    query = "[...document.querySelectorAll('td[data-seed]')].map(c => [c.dataset.seed, c.dataset.column, "
    query += "c.dataset.value, c.innerText])"

    async def work(page: Page) -> None:
        backgrounds = set()
        for scheme in ("light", "dark"):
            for width in (1200, 390):
                await page.emulate(width=width, scheme=scheme)
                await page.open(report.as_uri())
                cells = await page.evaluate(query)
                assert len(cells) == len(rows) * len(shown_columns(seed_table(sweep)))
                for seed, column, value, text in cells:
                    assert value == repr(rows[seed][column])
                    decimals = len(text.partition(".")[2])
                    assert round(float(text.replace(",", "")), decimals) == round(rows[seed][column], decimals)
                overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
                assert await page.evaluate(overflow) <= 0
                widths = await page.evaluate("[...document.querySelectorAll('figure svg')].map(s => s.clientWidth)")
                assert len(widths) == len(FIGURES)
                assert all(0 < shown <= width for shown in widths)
            backgrounds.add(await page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(backgrounds) == 2
        await page.emulate(width=800, scheme="dark", media="print")
        assert await page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.problems == []

    with_page(work)


@pytest.fixture(scope="module")
def ablation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep of 40 variants with long names, half of which took their training from the baseline."""
    made = [FakeVariant("base", dict.fromkeys((1, 2), 0.0))]
    for place in range(1, 40):
        gains = {seed: 0.0005 * (place - 20) + 0.0001 * seed for seed in (1, 2)}
        name = f"learning_rate={place}+lora_rank={place}+num_layers={place}"
        made.append(FakeVariant(name, gains, ("train",) if place % 2 else ()))
    return fake_ablation(tmp_path_factory.mktemp("ablation"), made, num_documents=0)


@pytest.fixture(scope="module")
def ablation_page(ablation: Path) -> str:
    """Its report."""
    path = ablation / "out" / "report.html"
    assert main(["report", str(ablation), "-o", str(path)]) == 0
    assert {entry.stem for entry in (ablation / "out" / "report_figures").iterdir()} == {
        "forest", "waterfalls", "sharing",
    }  # fmt: skip
    return path.read_text()


def test_every_variant_has_its_difference_the_best_first(ablation: Path, ablation_page: str) -> None:
    table = read_table(ablation)
    assert isinstance(table, Ablation)
    expected = {effect.variant: effect.difference.mean for effect in table.effects if effect.difference}
    shown = re.findall(r'data-variant="([^"]+)" data-value="([^"]+)"', ablation_page)
    assert {name: float(value) for name, value in shown} == expected
    values = [float(value) for _, value in shown]
    assert values == sorted(values)
    assert len(values) == 39


def test_the_page_of_variants_says_what_sharing_saved(ablation_page: str) -> None:
    # 40 runs took a training of 588.1 s on 8 GPUs: 52.28 hours
    computed = 80 * (588.1 + 80 + 16 + 251) * 8 / 3600 - 40 * 588.1 * 8 / 3600
    assert f"{computed:.2f} GPU-hours computed by finished runs" in ablation_page
    assert "so 52.28 (" in ablation_page
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", ablation_page)


def test_rows_of_many_seeds_are_folded_away_and_of_few_are_not(tmp_path: Path, ablation_page: str) -> None:
    assert ablation_page.count("<details><summary>") == 40
    few = fake_ablation(tmp_path, [FakeVariant("base", {1: 0.0, 2: 0.0}), FakeVariant("x", {1: 0.1, 2: 0.2})])
    write_report([str(few)], tmp_path / "few.html")
    assert (tmp_path / "few.html").read_text().count("<details open>") == 2


def test_one_variant_has_the_whole_report(tmp_path: Path) -> None:
    ablation = fake_ablation(tmp_path, [FakeVariant("base", {1: 0.0, 2: 0.0}), FakeVariant("x", {1: 0.1, 2: 0.2})])
    system = read_system(str(ablation), "base")
    assert [drawn.name for drawn in draw_all(system)] == list(FIGURES)
    assert system.name == "fake base"
    assert main(["report", f"{ablation}#nothing", "-o", str(tmp_path / "page.html")]) == 2


def test_rows_of_a_variant_that_contradict_are_named(tmp_path: Path) -> None:
    out = fake_ablation(tmp_path, [FakeVariant("base", {1: 0.0}), FakeVariant("x", {1: 0.1})])
    commit_fake(out, 1, variant="x", artifact_bytes=5)
    write_report([str(out)], tmp_path / "page.html")
    assert "x, seed 1: artifact_bytes 5, but model + code is" in (tmp_path / "page.html").read_text()
