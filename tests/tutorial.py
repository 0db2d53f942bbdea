"""Runs docs/tutorial.py cell by cell: `python -m tests.tutorial > docs/tutorial.md`."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).resolve().parent.parent / "docs" / "tutorial.py"


def run_tutorial() -> str:
    """Return the tutorial as Markdown: its text, its code, and what the code printed just now."""
    names: dict[str, Any] = {"__name__": "tutorial"}
    parts = ["<!-- made by `python -m tests.tutorial > docs/tutorial.md`; do not edit by hand -->"]
    for kind, body in re.findall(
        r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", SCRIPT.read_text(), re.DOTALL | re.MULTILINE
    ):
        if kind:
            parts.append("\n".join(line.removeprefix("#").removeprefix(" ") for line in body.strip().splitlines()))
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(body, SCRIPT.name, "exec"), names)
        parts.append(f"```python\n{body.strip()}\n```")
        if printed.getvalue():
            parts.append(f"```text\n{printed.getvalue().rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(run_tutorial(), end="")
