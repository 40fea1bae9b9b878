"""The project's Markdown pages, and what can be read out of them."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / folder / "README.md" for folder in ("benchmarks", "tests")),
    ]
)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")


def page(name: str) -> str:
    """Return a page's text by its path from the project's root."""
    return (ROOT / name).read_text()


def links(text: str) -> list[str]:
    """Return the targets of all links and pictures."""
    return _LINK.findall(_FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """Return what may stand behind a ``#`` in a link to this text, as GitHub makes it of the headings."""
    headings = re.findall(r"^#+ (.*)$", _FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def fences(text: str, language: str = "") -> list[str]:
    """Return the fenced blocks of a language."""
    return [body for found, body in _FENCE.findall(text) if found == language]


def spans(text: str) -> list[str]:
    """Return what stands in backquotes."""
    return _SPAN.findall(text)


def table(text: str, *header: str) -> list[list[str]]:
    """Return the rows of the only table whose header begins with these cells.

    Raises:
        ValueError: There is none, or more than one.
    """
    lines = text.splitlines()
    starts = [i for i, line in enumerate(lines) if cells(line)[: len(header)] == list(header)]
    if len(starts) != 1:
        raise ValueError(f"{len(starts)} tables begin with {header}")
    rows = []
    for line in lines[starts[0] + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(cells(line))
    return rows


def cells(line: str) -> list[str]:
    """Return the cells of a table's line."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
