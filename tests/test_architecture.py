"""The floors of the house: who may import whom, read from the sources with ast, and what stays cheap to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("jobs", "runner", "model", "results")
MAX_TRACKED_BYTES = 1_500_000
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 50

# A module of model/ imports only from its own floor and those below; one that is not named here is a stage.
MODEL_FLOORS: dict[str, int] = {
    "config": 0, "field_types": 0, "cpus": 0, "distributed": 0, "kernels": 0, "data": 0, "layers": 0, "ledger": 0,
    "lora": 1, "gpt": 1,
    "pipeline": 3, "stages": 3, "standalone": 3,
}  # fmt: skip
MODEL_STAGE_FLOOR = 2
MODEL_TOP_FLOOR = 3


def sources(package: str) -> list[Path]:
    """Return every Python file of a package, sorted."""
    return sorted((ROOT / package).rglob("*.py"))


@cache
def parse(path: Path) -> ast.Module:
    """Return the syntax tree of one file."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported_modules(path: Path) -> Iterator[str]:
    """Yield the dotted name of everything that path imports, inside functions too.

    `from a import b` yields a and a.b, because b may be a module.
    """
    package_parts = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = package_parts[: len(package_parts) - node.level + 1] if node.level else ()
            base = ".".join((*prefix, *((node.module,) if node.module else ())))
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def roots_imported_by(path: Path) -> set[str]:
    """Return the top-level names that path imports."""
    return {name.split(".")[0] for name in imported_modules(path)}


def offenders(package: str, forbidden: set[str], allowed: tuple[str, ...] = ()) -> list[str]:
    """List the files of package that import a forbidden top-level name and match none of the allowed patterns."""
    found = []
    for path in sources(package):
        relative = path.relative_to(ROOT)
        wrong = roots_imported_by(path) & forbidden
        if wrong and not any(relative.match(pattern) for pattern in allowed):
            found.append(f"{relative} imports {', '.join(sorted(wrong))}")
    return found


def test_results_imports_neither_torch_nor_ray_nor_other_packages_of_ours() -> None:
    assert offenders("results", {"torch", "ray", "jobs", "runner", "model"}) == []


def test_model_never_imports_ray_or_what_stands_above_it() -> None:
    assert offenders("model", {"ray", "runner", "jobs", "results"}) == []


def test_nobody_imports_jobs() -> None:
    assert [line for package in ("runner", "model", "results") for line in offenders(package, {"jobs"})] == []


def test_ray_is_used_only_by_the_gang_the_scheduler_and_submit() -> None:
    allowed = ("runner/gang.py", "runner/scheduler.py", "runner/ray_*.py", "jobs/submit.py")
    assert [line for package in PACKAGES for line in offenders(package, {"ray"}, allowed)] == []


def test_inside_runner_only_the_worker_knows_torch() -> None:
    assert offenders("runner", {"torch"}, ("runner/worker.py",)) == []


def model_floor(dotted: str) -> int:
    """Return the floor of model.<name>[.<...>]; the package itself stands at the bottom."""
    parts = dotted.split(".")
    if len(parts) == 1:
        return 0
    return MODEL_TOP_FLOOR if parts[1].startswith("audit") else MODEL_FLOORS.get(parts[1], MODEL_STAGE_FLOOR)


def test_inside_model_each_floor_imports_only_from_itself_and_below() -> None:
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources("model")}
    wrong = []
    for path in sources("model"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for target in imported_modules(path):
            if target in modules and model_floor(target) > model_floor(name):
                wrong.append(f"{name} imports {target}")
    assert wrong == []


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
