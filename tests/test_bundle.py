"""model.bundle.program and jobs.evidence.bundle: one file that holds the recipe, and what it scores."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.cli import main
from model.bundle.program import (
    PACKED_NAME,
    QUOTES,
    READABLE_NAME,
    ROOT,
    code_program,
    escape,
    is_twin,
    minify,
    minify_used,
    read_modules,
    tool_versions,
)
from model.pipeline.stage_quantize import write_program
from model.presets import published, tiny
from model.quant.artifact import load_artifact
from model.quant.quantized import dequantize
from tests.program_bytes import MEASURED, group_by_room
from tests.small_run import TOKENIZER, seed_directory, small_sweep, validation_glob

# Runs a program as an empty environment would that holds only torch (with what it requires), numpy, sentencepiece
# and brotli: everything else that is installed is invisible, our own packages included.
GUARD = """
import runpy, sys
from importlib.machinery import PathFinder
ALLOWED = {
    "torch", "torchgen", "functorch", "typing_extensions", "filelock", "sympy", "mpmath", "networkx", "jinja2",
    "markupsafe", "fsspec", "setuptools", "numpy", "sentencepiece", "brotli", "_brotli",
}
class Guard:
    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target)
        places = [] if spec is None else [str(spec.origin), *map(str, spec.submodule_search_locations or ())]
        is_installed = any("site-packages" in place for place in places)
        return None if is_installed and name.split(".")[0] not in ALLOWED else spec
sys.meta_path[:] = [finder for finder in sys.meta_path if finder.__module__ == "_frozen_importlib"] + [Guard()]
for name in ("yaml", "safetensors", "model", "pandas"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} can be imported: this environment is not empty")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def make_package(root: Path, **modules: str) -> Path:
    """Write a model package of the given modules and those that every package needs."""
    (root / "model").mkdir()
    (root / "model" / "bundle").mkdir()
    loader = Path("model") / "bundle" / "loader.py"
    (root / loader).write_text((ROOT / loader).read_text())
    (root / "model" / "__init__.py").write_text("")
    for name, source in modules.items():
        (root / "model" / f"{name}.py").write_text(textwrap.dedent(source))
    return root


def run_file(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program in the guarded environment, from a folder that holds nothing else of ours."""
    command = [sys.executable, "-P", "-c", GUARD, str(path), *arguments]
    return subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=False, timeout=200)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle of the small sweep's first seed."""
    folder = tmp_path_factory.mktemp("bundle") / "out"
    assert main(["bundle", str(small_sweep()), "-o", str(folder)]) == 0
    return folder


def test_the_same_sources_give_the_same_bytes() -> None:
    program = code_program(tiny())
    assert program == code_program(tiny())
    assert is_twin(program.readable, program.packed)


def test_a_twin_of_other_modules_or_other_tools_is_told_apart() -> None:
    program = code_program(tiny())
    altered = program.readable.replace("RMS_EPS = 2.0**-23", "RMS_EPS = 2.0**-22")
    assert altered != program.readable
    assert is_twin(altered, program.packed) is False
    assert is_twin(program.readable.replace("python-minifier ", "python-minifier 0."), program.packed) is None
    with pytest.raises(ValueError, match="no settings or no modules"):
        is_twin(f"Twin made with {tool_versions()}\n".join(['"""\n', '"""\n']), program.packed)


def test_a_damaged_byte_anywhere_is_an_answer_or_one_line() -> None:
    """The module that no longer parses is named; nothing but ValueError may come out of a stranger's file."""
    program = code_program(tiny())
    tail = program.readable.index('"""\n\nSETTINGS')
    refused = []
    for at in np.linspace(tail, len(program.readable) - 1, num=12, dtype=int):
        damaged = program.readable[:at] + "!" + program.readable[at + 1 :]
        try:
            is_twin(damaged, program.packed)  # true where the byte stood in a comment
        except ValueError as error:
            refused.append(str(error))
    assert any("model." in text and "is no Python at line" in text for text in refused), refused


def test_every_module_is_there_verbatim_and_after_what_it_imports() -> None:
    text = code_program(tiny()).readable
    modules = read_modules(ROOT)
    for name, source in modules.items():
        assert f'MODULES["{name}"] = r{QUOTES}{source}{QUOTES}' in text
        assert (ROOT / f"{name.replace('.', '/')}.py").read_text() == source
    order = list(modules)
    assert order.index("model.config") < order.index("model.gpt") < order.index("model.ttt.documents")
    assert order[-1] == "model.standalone"


def test_what_neither_training_nor_scoring_needs_is_left_out() -> None:
    text = code_program(tiny()).readable
    for word in ("huggingface_hub", "fcntl", "manifest", "class CheckpointStore", "model/audit", "import safetensors"):
        assert word not in text, word
    assert "/work" not in text
    assert str(Path.home()) not in text


def test_the_twin_leaves_out_what_no_code_names() -> None:
    tools = """
        from __future__ import annotations
        import json
        import re
        from math import ceil, floor, pi
        from typing import NamedTuple
        UNUSED, KEPT = 1, 2
        ALONE = 3
        def helper(): return floor(2.5)
        def caller() -> NamedTuple: return helper()
        def asked_for_by_name(): return json.dumps(1)
        class Idle: pass
    """
    main = """
        from model.tools import pi
        import model.tools as tools
        print(pi, getattr(tools, "asked_for_by_name")(), tools.KEPT)
    """
    modules = {"model.tools": textwrap.dedent(tools), "model.main": textwrap.dedent(main)}
    small = minify_used(modules, "")
    names = {"helper", "caller", "Idle", "ALONE", "re", "ceil", "floor", "NamedTuple"}
    found = set(re.findall(r"\w+", "\n".join(small.values())))
    assert not found & names  # the caller of a helper goes first, then the helper, then what it needed
    assert {"asked_for_by_name", "json", "pi", "KEPT"} <= found
    future = "from __future__ import annotations"
    assert future not in small["model.tools"]  # nothing there is annotated any more
    field = minify(f"{future}\nfrom typing import NamedTuple\nclass Pair(NamedTuple):\n    x: int\n", name="model.pair")
    assert field.startswith(future)


def test_counted_code_stays_small() -> None:
    assert code_program(published()).num_bytes < 70_000


def test_the_table_of_counted_bytes_is_of_this_program() -> None:
    measured = json.loads(MEASURED.read_text())
    rooms = {room: len(names) for room, names in group_by_room(read_modules(ROOT)).items()}
    fix = "run python -m tests.program_bytes, then python -m tests.docs"
    assert {name: room["modules"] for name, room in measured["rooms"].items()} == rooms, fix
    assert measured["num_bytes"] == pytest.approx(code_program(published()).num_bytes, rel=0.02), fix


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*map(bytes, ([34], [92], [13], [10], [0], [48], [133], [255]))])).map(b"".join))
def test_every_byte_stands_between_the_quotes(data: bytes) -> None:
    source = f'# coding: latin-1\nfound = """{escape(data)}"""\n'.encode("latin-1")
    names: dict[str, str] = {}
    exec(compile(source, "packed.py", "exec"), names)
    assert names["found"].encode("latin-1") == data


def test_a_traceback_names_module_and_line(tmp_path: Path) -> None:
    program = code_program(
        tiny(),
        root=make_package(
            tmp_path,
            other="def divide(x):\n    # by zero\n    return x / 0\n",
            standalone="from model.other import divide\n\n\ndef main(argv, settings, code_bytes):\n    divide(1)\n",
        ),
    )
    write_program(program, tmp_path)
    for name, line in ((READABLE_NAME, 3), (PACKED_NAME, 1)):
        done = subprocess.run([sys.executable, str(tmp_path / name)], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert f'{name}/model/other.py", line {line}, in divide' in done.stderr


def test_a_package_of_the_same_name_in_the_current_folder_changes_nothing(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    make_package(here, standalone="raise SystemExit('the wrong one')\n")
    program = code_program(
        tiny(), root=make_package(tmp_path, standalone="def main(argv, settings, code_bytes):\n    print('ours')\n")
    )
    write_program(program, here)
    done = subprocess.run([sys.executable, READABLE_NAME], cwd=here, capture_output=True, text=True, check=True)
    assert done.stdout == "ours\n"


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"standalone": "from model.gone import x\n"}, "model.gone is imported, but .* is not there"),
        ({"standalone": "def f():\n    from .other import x\n", "other": ""}, "a relative import in line 2"),
        ({"standalone": "from model import b\n", "b": "from model.standalone import x\n"}, "circle: model"),
        ({"standalone": "X = '''text'''\n"}, "holds ''', which ends a text"),
        ({"standalone": "", "__init__": "X = 1\n"}, "has code: a package in one file has none"),
    ],
)
def test_what_one_file_cannot_hold_is_refused(tmp_path: Path, modules: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        code_program(tiny(), root=make_package(tmp_path, **modules))


@pytest.mark.parametrize("name", [READABLE_NAME, pytest.param(PACKED_NAME, marks=pytest.mark.slow)])
def test_two_files_reproduce_the_scores_to_the_last_bit_in_an_empty_environment(bundle: Path, name: str) -> None:
    done = run_file(
        bundle / name, "--eval", "model.ssq", "--tokenizer", str(TOKENIZER), "--val", validation_glob(small_sweep())
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout.splitlines()[-1])
    stages = seed_directory(small_sweep()) / "stages"
    plain, adapted = (json.loads((stages / f"{stage}.json").read_text())["metrics"] for stage in ("evaluate", "ttt"))
    for key in ("pre_ttt_bpb", "pre_ttt_nats", "pre_ttt_tokens", "pre_ttt_bytes"):
        assert scores[key] == plain[key], key
    for key in ("ttt_lr0_bpb", "post_ttt_bpb", "post_ttt_nats", "post_ttt_tokens", "post_ttt_bytes"):
        assert scores[key] == adapted[key], key
    assert json.loads((bundle / "scores.json").read_text())["scores"]["post_ttt_bpb"] == scores["post_ttt_bpb"]


def test_the_program_trains_to_the_same_scores_in_an_empty_environment(bundle: Path, tmp_path: Path) -> None:
    out = small_sweep()
    done = run_file(
        bundle / READABLE_NAME, "--train", f"{out.parent}/data/toy_train_*.bin", "--val", validation_glob(out),
        "--tokenizer", str(TOKENIZER), "--seed", "42", "--threads", "1", "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_artifact(folder / "model.ssq")[1] for folder in (seed_directory(out), tmp_path / "run"))
    for name, value in dequantize(ours).items():
        assert torch.equal(dequantize(theirs)[name], value), name
    metrics = json.loads(done.stdout.splitlines()[-1])
    records = {}
    for path in (seed_directory(out) / "stages").glob("*.json"):
        records |= json.loads(path.read_text())["metrics"]
    for key in ("code_bytes", "steps", "live_bpb", "post_ema_bpb", "pre_ttt_bpb", "ttt_lr0_bpb", "post_ttt_bpb"):
        assert metrics[key] == records[key], key


def test_sizes_in_the_record_are_those_of_the_files(bundle: Path) -> None:
    metrics = json.loads((seed_directory(small_sweep()) / "stages" / "quantize.json").read_text())["metrics"]
    assert metrics["code_bytes"] == (bundle / PACKED_NAME).stat().st_size
    assert metrics["code_bytes_readable"] == (bundle / READABLE_NAME).stat().st_size
    assert metrics["artifact_bytes"] == metrics["code_bytes"] + (bundle / "model.ssq").stat().st_size
    assert metrics["code_bytes_convention"] == "self-extracting-minified-train_gpt"


def settings_text(bundle: Path) -> str:
    """Return the settings of a bundle's program as JSON."""
    return (bundle / READABLE_NAME).read_text().partition(f"SETTINGS = r{QUOTES}")[2].partition(QUOTES)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eval", "model.ssq"], "--val is missing"),
        (["--train", "x"], "--val is missing"),
        (["--eval", "gone.ssq", "--val", "x", "--tokenizer", "y"], "gone.ssq"),
        (["--eval", "model.ssq", "--val", "none_*.bin", "--tokenizer", str(TOKENIZER)], "no such shard"),
    ],
)
def test_mistakes_end_in_one_line(
    bundle: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from model.standalone import main as program

    monkeypatch.chdir(bundle)
    assert program(arguments, settings_text(bundle), 0) == 2
    shown = capsys.readouterr().err.strip()
    assert message in shown
    assert "\n" not in shown


def test_settings_of_another_recipe_are_refused(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from model.standalone import main as program

    monkeypatch.chdir(bundle)
    settings = json.loads(settings_text(bundle))
    settings["quant"]["damping_frac"] = 0.5
    arguments = ["--eval", "model.ssq", "--val", validation_glob(small_sweep()), "--tokenizer", str(TOKENIZER)]
    assert program(arguments, json.dumps(settings), 0) == 2
    assert "other settings" in capsys.readouterr().err


def test_a_damaged_run_is_not_bundled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.small_run import copy_sweep

    out = copy_sweep(tmp_path / "out")
    path = seed_directory(out) / READABLE_NAME
    path.write_text(path.read_text().replace("0.5", "0.6", 1))
    assert main(["bundle", str(out), "-o", str(tmp_path / "folder")]) == 2
    assert "sha256 differs" in capsys.readouterr().err
    assert main(["bundle", str(tmp_path), "-o", str(tmp_path / "folder")]) == 2
    assert "no artifact of any seed" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)  # installs PyTorch
def test_two_files_reproduce_the_scores_in_a_fresh_environment(bundle: Path, tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    packages = ["torch", "numpy", "sentencepiece", "brotli"]
    install = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c"]
    subprocess.run([*install, str(root / "constraints.txt"), *packages], check=True)
    for name in (READABLE_NAME, PACKED_NAME):
        arguments = ["--eval", "model.ssq", "--tokenizer", str(TOKENIZER), "--val", validation_glob(small_sweep())]
        done = subprocess.run([str(python), name, *arguments], cwd=bundle, capture_output=True, text=True, check=True)
        scores = json.loads(done.stdout.splitlines()[-1])
        expected = json.loads((bundle / "scores.json").read_text())["scores"]
        assert {key: scores[key] for key in expected} == expected


FAKE_TRITON = """
import ast, inspect, textwrap
__version__ = "0.0"
NAMES = []
def jit(function=None, **options):
    if function is None:
        return jit
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))  # what Triton does with a kernel
    NAMES.append(tree.body[0].name)
    return function
def cdiv(a, b):
    return -(-a // b)
"""


@pytest.mark.parametrize("name", [pytest.param(READABLE_NAME, marks=pytest.mark.slow), PACKED_NAME])
def test_where_triton_is_installed_kernels_are_there_with_their_source(bundle: Path, tmp_path: Path, name: str) -> None:
    """Triton reads a kernel's source through inspect, from a program that was extracted in memory as well."""
    for file, text in {
        "triton/__init__.py": FAKE_TRITON,
        "triton/language.py": "class constexpr:\n    def __init__(self, value):\n        self.value = value\n",
        "triton/tools/__init__.py": "",
        "triton/tools/tensor_descriptor.py": "class TensorDescriptor:\n    pass\n",
    }.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    code = f"""
import importlib, runpy, sys, torch, torch.nn.attention.varlen
sys.path.insert(0, {str(tmp_path)!r})
program = runpy.run_path({str(bundle / name)!r}, run_name="program")
sys.meta_path.insert(0, program["TextImporter"](program["MODULES"], {str(bundle / name)!r}))
names = [name for name in program["MODULES"] if name.endswith("_triton")]
for name in names:
    importlib.import_module(name)
import triton
print(len(triton.NAMES), len(names) > 5)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count, are_there = done.stdout.split()
    assert int(count) == code_program(tiny()).readable.count("@triton.jit")
    assert are_there == "True"


def test_a_kernel_keeps_its_constants_when_it_is_minified() -> None:
    """A constant that is assigned to a plain name is a number of the run to Triton's compiler, not of the kernel."""
    kernels = {name: text for name, text in read_modules(ROOT).items() if "constexpr" in text}
    assert len(kernels) > 5
    for name, text in kernels.items():
        small = ast.parse(minify(text, name=name))
        for function in (node for node in ast.walk(small) if isinstance(node, ast.FunctionDef)):
            constants = {arg.arg for arg in function.args.args if "constexpr" in ast.unparse(arg.annotation or arg)}
            values = [node.value for node in ast.walk(function) if isinstance(node, ast.Assign)]
            assert not [value.id for value in values if isinstance(value, ast.Name) and value.id in constants], name
        marked, still_marked = (
            [node for node in ast.walk(tree) if isinstance(node, ast.AnnAssign) and "constexpr" in ast.unparse(node)]
            for tree in (ast.parse(text), small)
        )
        assert len(marked) == len(still_marked), name


def test_a_launch_takes_constants_of_any_name_when_it_is_minified() -> None:
    """The minifier shortens the names of what is given by its place, to such as kernels have for their constants."""
    module: dict[str, Any] = {}
    exec(minify((ROOT / "model/kernels/launch.py").read_text(), name="model.kernels.launch"), module)
    heard: list[tuple[Any, ...]] = []
    module["listeners"].append(lambda *call: heard.append(call))
    options = dict.fromkeys("ABCDEFGH", 1)
    module["launch"]("kernel", (1,), 2, 3, **options)
    assert heard == [("kernel", (1,), (2, 3), options)]
