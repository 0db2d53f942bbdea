"""Pictures of a report for docs/: `python -m tests.screenshots REPORT.html DIR` (light, dark, phone, print)."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.browser import Page, find_chromium, with_page

VIEWS = {
    "report-light.png": {"width": 1200},
    "report-dark.png": {"width": 1200, "scheme": "dark"},
    "report-phone.png": {"width": 390},
    "report-print.png": {"width": 800, "media": "print"},
}


def take_pictures(report: Path, folder: Path) -> list[Path]:
    """Save every view of a report as PNG and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in VIEWS]

    async def work(page: Page) -> None:
        for path in paths:
            await page.emulate(**VIEWS[path.name])  # type: ignore[arg-type]
            await page.open(report.resolve().as_uri())
            await page.picture(path)

    with_page(work)
    return paths


if __name__ == "__main__":
    if find_chromium() is None:
        sys.exit("no Chromium found; install it (Debian: chromium)")
    for made in take_pictures(Path(sys.argv[1]), Path(sys.argv[2])):
        print(made)
