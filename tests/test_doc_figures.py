"""tests/doc_figures.py: the tables of docs/recipe.md say what rows and presets hold."""

from pathlib import Path

from tests.doc_figures import LENGTHS, NOT_MEASURED, changes, measured_tables, preset_table
from tests.fake_runs import FakeVariant, fake_ablation

SEEDS = (42, 0, 1337)


def of(name: str, *gains: float) -> FakeVariant:
    return FakeVariant(name, dict(zip(SEEDS, gains)), ())


def test_a_presets_table_has_what_it_changes_and_nothing_else() -> None:
    assert changes("published") == {}
    assert "| `train.orthogonalization` | polar_express |" in preset_table("frontier").splitlines()
    assert len(preset_table("frontier").splitlines()) == 2 + len(changes("frontier"))


def test_without_rows_the_page_says_so(tmp_path: Path) -> None:
    assert measured_tables(tmp_path) == NOT_MEASURED


def test_the_measured_tables_have_the_paired_differences_of_the_rows(tmp_path: Path) -> None:
    fake_ablation(tmp_path / "final", [of("base", 0.0, 0.0, 0.0), of("fit", 0.001, 0.001, 0.001),
                                       of("all", -0.004, -0.005, -0.006)])  # fmt: skip
    fake_ablation(tmp_path / "screening", [of("base", 0.0, 0.0, 0.0), of("polar", -0.001, 0.001, 0.003)])
    fake_ablation(tmp_path / "screening_rates", [of("slope", 0.0, 0.0, 0.0)])
    text = measured_tables(tmp_path)
    assert all(length in text for length in LENGTHS.values())
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| `"]
    by_name = {cells[0]: cells for cells in rows}
    assert by_name["`base`"][6:10] == ["", "", "", ""]
    assert by_name["`polar`"][1] == "3"
    assert by_name["`polar`"][6] == "+0.00100"
    (whole, pair) = [cells for cells in rows if cells[0] == "`all`"]
    assert whole[6:8] == ["-0.00500", "[-0.00748, -0.00252]"]
    assert text.index("At equal bytes") < text.rindex("| `all` |")
    assert "same trained weights" not in text  # neither all nor fit has the weights of the other
    assert pair == ["`all`", "`fit`", "post-TTT", pair[3], "-0.00600", "[-0.00848, -0.00352]", "3"]


def test_figures_of_another_code_are_named_with_it(tmp_path: Path) -> None:
    fake_ablation(tmp_path / "final", [of("base", 0.0, 0.0, 0.0)])
    fake_ablation(tmp_path / "final", [of("all", 0.0, 0.0, 0.0)], code_hash="a" * 64)
    text = measured_tables(tmp_path)
    (where,) = [line for line in text.splitlines() if "code hash" in line]
    assert "aaaaaaaa" in where
    assert where.endswith((" (`all`):", " (`base`):"))  # the first variant's is the table's
