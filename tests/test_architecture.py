"""The floors of the house: who may import whom, read from the sources with ast, and what stays cheap to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests import house
from tests.house import HOUSE, PACKAGES, ROOT, entries, find_circle, imported_names, parse, sources

MAX_TRACKED_BYTES = 1_500_000
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
ROOM_FILES = range(2, 17)
# entries at the top of a package, rooms and files
MAX_ENTRIES = {"model": 23, "results": 13, "runner": 12, "jobs": 7}
# the files that may import a heavy package; everything else must do without
ALLOWED = {
    "torch": ("model/*.py", "model/*/*.py", "runner/gang/worker.py", "jobs/bench/*.py"),
    "ray": ("runner/gang/ray_*.py", "jobs/sweeps/ray_job.py"),
}
WITHOUT_TORCH = ("fields", "report", "config", "presets", "bundle")  # rooms of model/


def roots_imported_by(path: Path) -> set[str]:
    """Return the top-level names that path imports."""
    return {name.split(".")[0] for name in imported_names(path)}


def offenders(package: str, forbidden: set[str], allowed: tuple[str, ...] = ()) -> list[str]:
    """List the files of package that import a forbidden top-level name and match none of the allowed patterns."""
    found = []
    for path in sources(package):
        relative = path.relative_to(ROOT)
        wrong = roots_imported_by(path) & forbidden
        if wrong and not any(relative.match(pattern) for pattern in allowed):
            found.append(f"{relative} imports {', '.join(sorted(wrong))}")
    return found


def test_no_import_goes_up_or_sideways() -> None:
    assert house.broken_rules() == []


def test_neither_files_nor_rooms_import_each_other_in_a_circle() -> None:
    assert find_circle(house.imports()) == []
    assert find_circle(house.room_graph()) == []


def test_the_table_itself_has_no_circle() -> None:
    for package, rooms in HOUSE.items():
        assert find_circle({name: set(room.may_import) for name, room in rooms.items()}) == [], package


def test_a_circle_an_upward_import_and_one_inside_a_function_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {
        "config.py": "from model.gpt import GPT\n",
        "gpt.py": "def build():\n    from model.config import CONFIG\n    return CONFIG\n",
    }.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "model" / "__init__.py").touch()
    monkeypatch.setattr(house, "ROOT", tmp_path)
    house.modules.cache_clear()
    house.imports.cache_clear()
    try:
        assert house.broken_rules() == ["model.config imports model.gpt"]
        assert set(find_circle(house.imports())) == {"model.config", "model.gpt"}
    finally:
        monkeypatch.undo()
        house.modules.cache_clear()
        house.imports.cache_clear()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_entry_is_a_room_of_the_table_with_two_to_sixteen_files(package: str) -> None:
    listed = {name for name in HOUSE[package] if name != "__init__"}
    assert {Path(name).stem for name in entries(package)} == listed
    assert len(entries(package)) <= MAX_ENTRIES[package]
    for name in listed:
        folder = ROOT / package / name
        if folder.is_dir():
            files = [path for path in folder.rglob("*.py") if path.name != "__init__.py"]
            assert all(path.parent == folder for path in files), f"{package}/{name} holds a room"
            assert len(files) in ROOM_FILES, f"{package}/{name} holds {len(files)} files"


def test_results_imports_neither_torch_nor_ray_nor_other_packages_of_ours() -> None:
    assert offenders("results", {"torch", "ray", "jobs", "runner", "model"}) == []


def test_model_never_imports_ray_or_what_stands_above_it() -> None:
    assert offenders("model", {"ray", "runner", "jobs", "results"}) == []


def test_nobody_imports_jobs_or_the_tests() -> None:
    assert [line for package in ("runner", "model", "results") for line in offenders(package, {"jobs"})] == []
    assert [line for package in PACKAGES for line in offenders(package, {"tests"})] == []


@pytest.mark.parametrize("name", ALLOWED)
def test_heavy_packages_are_imported_where_they_belong_and_nowhere_else(name: str) -> None:
    assert [line for package in PACKAGES for line in offenders(package, {name}, ALLOWED[name])] == []


def test_settings_and_words_of_the_model_do_without_torch() -> None:
    lines = offenders("model", {"torch"})
    assert [line for line in lines if line.split("/")[1].split(".")[0] in WITHOUT_TORCH] == []


def test_package_files_hold_no_code() -> None:
    packages = ("jobs", "runner", "model")  # results/__init__.py holds the functions that notebooks call
    files = [path for package in packages for path in sources(package) if path.name == "__init__.py"]
    assert [str(path) for path in files if any(not isinstance(node, ast.Expr) for node in parse(path).body)] == []


def test_every_package_is_named_in_pyproject() -> None:
    import tomllib

    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    present = {".".join(path.parent.relative_to(ROOT).parts) for package in PACKAGES for path in sources(package)}
    assert set(named) == present


def test_nothing_unpickles() -> None:
    assert [
        line for package in PACKAGES for line in offenders(package, {"pickle", "cloudpickle", "shelve", "joblib"})
    ] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_files_and_functions_keep_a_readable_size(package: str) -> None:
    too_long = []
    for path in sources(package):
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        if num_lines > MAX_FILE_LINES:
            too_long.append(f"{path.relative_to(ROOT)}: {num_lines} lines")
        for node in ast.walk(parse(path)):
            if not isinstance(node, ast.FunctionDef) or any("triton" in ast.dump(d) for d in node.decorator_list):
                continue  # a GPU kernel is one function by nature
            if (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES:
                too_long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: more than {MAX_FUNCTION_LINES}")
    assert too_long == []


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("jobs.cli", ("torch", "ray", "pandas", "pyarrow", "scipy", "matplotlib")),
        ("model.config", ("torch",)),
        ("results.schema", ("torch", "ray")),
    ],
)
def test_importing_stays_light(module: str, heavy: tuple[str, ...]) -> None:
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_of_the_command_line_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom jobs import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'ray', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_no_tracked_file_is_large() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip(f"git cannot list the tracked files here: {listed.stderr.strip()}")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    large = [
        f"{path.relative_to(ROOT)}: {path.stat().st_size}"
        for path in paths
        if path.exists() and path.stat().st_size > MAX_TRACKED_BYTES
    ]
    assert large == []
