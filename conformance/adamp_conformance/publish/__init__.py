"""What a run found, for others to read: one HTML page, Markdown, JUnit XML and badges."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from adamp_conformance.publish.badge import render_badges
from adamp_conformance.publish.junit import render_junit
from adamp_conformance.publish.markdown import render_markdown
from adamp_conformance.publish.page import render_html
from adamp_conformance.results import Run

__all__ = ["write"]


def write(
    run: Run,
    *,
    html: Path | None = None,
    markdown: Path | None = None,
    junit: Path | None = None,
    badges: Path | None = None,
    notes: Mapping[str, str],
    purposes: Mapping[str, str],
) -> None:
    """Writes the reports that a path is given for; folders that are missing are made.

    Args:
      run: of `results.read`, or of `Run.here`.
      html: the page, a file.
      markdown: the summary, a file.
      junit: the JUnit XML, a file.
      badges: a folder, which gets one `<implementation>.json` each, other characters than letters and digits as `-`.
      notes: flag -> what the mistake is; flags without a note are shown by name.
      purposes: case -> what it is for.

    Raises:
      OSError: a path cannot be written.
    """
    texts: dict[Path, str] = {}
    for path, render in ((html, render_html), (markdown, render_markdown), (junit, render_junit)):
        if path is not None:
            texts[path] = render(run, notes, purposes)
    if badges is not None:
        texts |= {badges / name: text for name, text in render_badges(run).items()}
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
