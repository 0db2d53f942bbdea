"""Coverage-guided fuzzing of our own parsers with atheris, where it is installed: `pip install atheris`.

Started by tests.fuzz.drive as `python -m tests.fuzz.coverage LOADER FOLDER RUNS SEED`. libFuzzer mutates the valid
files of a case towards new branches; artifacts get their checksum made right, or nothing behind it would be reached.
"""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path

PARSERS = (
    "model.quant.artifact", "model.quant.artifact_header", "model.quant.rans", "model.quant.compression",
    "model.data.shards", "model.data.manifest", "model.files.tensors", "model.files.checkpoint",
    "runner.spec.read", "runner.spec.sweep", "runner.spec.plain_yaml", "runner.spec.variants", "model.fields",
)  # fmt: skip
NUM_CORPUS = 40
MEMORY_MIB, TIMEOUT_S = 4096, 20


def main(loader: str, folder: Path, runs: int, seed: int) -> None:
    """Fuzz one loader; the process ends with 0 after runs loads, with another code at the first fault."""
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=list(PARSERS)):
        for name in PARSERS:
            importlib.import_module(name)
    from tests.fuzz.cases import make_case
    from tests.fuzz.mutations import seal

    case = make_case(loader, folder / "case")
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    paths = set()
    for number in range(NUM_CORPUS):
        path, content = case.mutated(random.Random(number))
        paths.add(path)
        (corpus / str(number)).write_bytes(content[:-32] if loader == "artifact" else content)
    targets = sorted(paths)

    def test_one_input(data: bytes) -> None:
        """Load what libFuzzer made, as each of the case's files in turn."""
        content = seal(data) if loader == "artifact" else data
        case.run_content(targets[len(data) % len(targets)], content)

    options = [f"-runs={runs}", f"-seed={seed + 1}", f"-rss_limit_mb={MEMORY_MIB}", f"-timeout={TIMEOUT_S}"]
    options += [f"-artifact_prefix={folder}/", "-verbosity=0", str(corpus)]
    atheris.Setup([sys.argv[0], *options], test_one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
