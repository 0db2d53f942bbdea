"""model.bundle and jobs.commands.bundle: one file that holds the recipe, and what it scores."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from model.bundle import make_program, read_package
from model.config import EvalConfig, tiny
from model.own_code import PACKED_NAME, READABLE_NAME
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
    (root / "model" / "__init__.py").write_text("")
    for name, source in modules.items():
        (root / "model" / f"{name}.py").write_text(textwrap.dedent(source))
    return root


def generate(root: Path, **modules: str) -> str:
    """Return the readable file of a made-up package."""
    return make_program(tiny(), root=make_package(root, **modules)).readable


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


def test_the_same_sources_give_the_same_bytes_and_both_files_say_the_same() -> None:
    program = make_program(tiny())
    again = type(program).of(program.readable)
    assert program == again
    printed = subprocess.run([sys.executable, "-c", program.packed, "--source"], capture_output=True, check=True)
    assert printed.stdout.decode() == program.readable


def test_every_section_keeps_its_docstring_and_stands_after_what_it_uses() -> None:
    text = make_program(tiny()).readable
    places = []
    for name, module in read_package(Path(__file__).parent.parent).items():
        title = f" {name.replace('.', '/')}.py ="
        assert title in text, name
        assert (ast.get_docstring(module.tree) or "").splitlines()[0] in text.partition(title)[2][:400]
        places.append((name, text.index(title)))
    order = [name for name, _ in sorted(places, key=lambda entry: entry[1])]
    assert order[:2] == ["model.field_types", "model.config"]
    assert order.index("model.gpt") < order.index("model.ttt") < order.index("model.standalone") == len(order) - 1


def test_what_neither_training_nor_scoring_needs_is_left_out() -> None:
    text = make_program(tiny()).readable
    for word in ("huggingface_hub", "def gather_docstrings", "model/audit", "model/bundle", "import safetensors"):
        assert word not in text, word
    assert "/work" not in text
    assert str(Path.home()) not in text


def test_no_name_of_the_readable_file_is_undefined() -> None:
    text = make_program(tiny()).readable
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821,F811,F823", "-"],
        input=text, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout


def test_names_that_two_modules_define_are_told_apart(tmp_path: Path) -> None:
    text = generate(
        tmp_path,
        config='LIMIT = 1\n\n\ndef _scale(x: int) -> int:\n    """Ours."""\n    return x * LIMIT  # kept\n',
        other="""
        from model.config import LIMIT as FIRST
        from model.config import _scale as scale_first

        LIMIT = 2


        def _scale(x: int, LIMIT: int = LIMIT) -> str:
            values = [LIMIT for LIMIT in range(2)]
            return f"{LIMIT} {FIRST} {values} LIMIT {scale_first(x)}"
        """,
        standalone="""
        import sys

        from model import config, other


        def main(argv: list[str], settings: str) -> int:
            from model import other as again
            from model.other import _scale

            assert again.LIMIT == 2
            print(config.LIMIT, other.LIMIT, config._scale(3), _scale(5), other._scale(5, LIMIT=7))
            return 0
        """,
    )
    path = tmp_path / "made.py"
    path.write_text(text)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == "1 2 3 2 1 [0, 1] LIMIT 5 7 1 [0, 1] LIMIT 5\n"
    assert "return x * LIMIT_CONFIG  # kept" in text


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"standalone": "from model import other\nUSED = [other]\n", "other": ""}, "module other is used as a value"),
        ({"standalone": "from model.other import x\n", "other": ""}, "model.other has no x"),
        ({"standalone": "from model.gone import x\n"}, "still imports model.gone"),
        ({"standalone": "from .other import x\n"}, "relative and star imports"),
        ({"standalone": "X = 1\nX = 2\n"}, "X is bound twice"),
        ({"standalone": "try:\n    X = 1\nfinally:\n    pass\n"}, "top-level Try"),
        ({"standalone": "from a import x\nfrom model.other import y\n", "other": "from b import x\ny = x\n"},
         "x is imported as"),
        ({"standalone": "from model.b import y\nx = 1\n", "b": "from model.standalone import x\ny = x\n"}, "circle"),
    ],
)  # fmt: skip
def test_what_one_file_cannot_hold_is_refused(tmp_path: Path, modules: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tmp_path, **modules)


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


def test_the_program_trains_to_the_same_weights_in_an_empty_environment(bundle: Path, tmp_path: Path) -> None:
    out = small_sweep()
    done = run_file(
        bundle / READABLE_NAME, "--train", f"{out.parent}/data/toy_train_*.bin", "--val", validation_glob(out),
        "--tokenizer", str(TOKENIZER), "--seed", "42", "--threads", "1", "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ours = (seed_directory(out) / "train.safetensors").read_bytes()
    assert (tmp_path / "run" / "train.safetensors").read_bytes() == ours
    records = [json.loads((folder / "stages" / "quantize.json").read_text())["metrics"]
               for folder in (tmp_path / "run", seed_directory(out))]  # fmt: skip
    for key in ("code_bytes", "code_bytes_readable", "code_bytes_convention"):
        assert records[0][key] == records[1][key]
    assert (tmp_path / "run" / READABLE_NAME).read_bytes() == (bundle / READABLE_NAME).read_bytes()


def test_sizes_in_the_record_are_those_of_the_files(bundle: Path) -> None:
    metrics = json.loads((seed_directory(small_sweep()) / "stages" / "quantize.json").read_text())["metrics"]
    assert metrics["code_bytes"] == (bundle / PACKED_NAME).stat().st_size
    assert metrics["code_bytes_readable"] == (bundle / READABLE_NAME).stat().st_size
    assert metrics["artifact_bytes"] == metrics["code_bytes"] + (bundle / "model.ssq").stat().st_size
    assert metrics["code_bytes_convention"] == "self-extracting-train_gpt"


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
    text = (bundle / READABLE_NAME).read_text()
    settings = text.partition('SETTINGS = """')[2].partition('"""')[0]
    assert program(arguments, settings) == 2
    shown = capsys.readouterr().err.strip()
    assert message in shown
    assert "\n" not in shown


def test_settings_of_another_recipe_are_refused(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from model.standalone import main as program

    monkeypatch.chdir(bundle)
    settings = json.loads((bundle / READABLE_NAME).read_text().partition('SETTINGS = """')[2].partition('"""')[0])
    settings["ttt"]["lr"] = 0.5
    arguments = ["--eval", "model.ssq", "--val", validation_glob(small_sweep()), "--tokenizer", str(TOKENIZER)]
    assert program(arguments, json.dumps(settings)) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize("is_plain_only", [False, True])
def test_an_artifact_is_scored_as_the_pipeline_does(
    is_plain_only: bool, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from model import standalone

    monkeypatch.chdir(bundle)
    order: list[str] = []
    plain = standalone.evaluate_plain

    def compiles(run: Any, _ledger: Any, *stages: str) -> None:
        assert run.config.runtime.attention == "sdpa"
        order.append(" ".join(("compile", *stages)))

    def scores(model: Any, *args: Any, **options: Any) -> Any:
        assert model.attention_backend == "sdpa"
        assert not any(parameter.requires_grad for parameter in model.parameters())
        order.append("score")
        return plain(model, *args[:4], standalone.Progress())

    def adapts(model: Any, *args: Any, is_adapting: bool, **_options: Any) -> Any:
        order.append(f"adapt {is_adapting}")
        return types.SimpleNamespace(scores=plain(model, *args[:2], EvalConfig(), args[3], standalone.Progress()))

    monkeypatch.setattr(standalone, "compile_kernels", compiles)
    monkeypatch.setattr(standalone, "evaluate_plain", scores)
    monkeypatch.setattr(standalone, "score_documents", adapts)
    settings = json.loads((bundle / READABLE_NAME).read_text().partition('SETTINGS = """')[2].partition('"""')[0])
    settings["runtime"]["attention"] = "sdpa"
    arguments = ["--eval", "model.ssq", "--val", validation_glob(small_sweep()), "--tokenizer", str(TOKENIZER)]
    assert standalone.main(arguments + ["--plain-only"] * is_plain_only, json.dumps(settings)) == 0
    all_stages = ["compile evaluate ttt", "score", "adapt False", "adapt True"]
    assert order == (["compile evaluate", "score"] if is_plain_only else all_stages)


def test_an_artifact_of_a_gpu_backend_is_scored_on_a_cpu_too(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from model.standalone import main as program

    monkeypatch.chdir(bundle)
    settings = json.loads((bundle / READABLE_NAME).read_text().partition('SETTINGS = """')[2].partition('"""')[0])
    settings["runtime"]["attention"] = "triton"
    arguments = ["--eval", "model.ssq", "--val", validation_glob(small_sweep()), "--tokenizer", str(TOKENIZER)]
    assert program([*arguments, "--plain-only"], json.dumps(settings)) == 0
    shown = capsys.readouterr()
    assert "runtime.attention=triton needs a GPU: scoring with auto on cpu" in shown.err
    wanted = json.loads((bundle / "scores.json").read_text())["scores"]["pre_ttt_bpb"]
    assert json.loads(shown.out.splitlines()[-1])["pre_ttt_bpb"] == wanted


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
    code = (
        "import runpy, sys, torch, torch.nn.attention.varlen\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        f"names = runpy.run_path({str(bundle / name)!r}, run_name='program')\n"
        "import triton\nprint(len(triton.NAMES), all(word in names for word in ('rotate', 'MixNorm', 'activate')))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count, are_there = done.stdout.split()
    assert int(count) == make_program(tiny()).readable.count("@triton.jit")
    assert are_there == "True"
