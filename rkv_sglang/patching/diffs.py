"""Patches in git's format, applied to texts exactly or not at all."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Where SGLang's package lies in its repository.
PREFIX = "python/sglang/"


@dataclass(frozen=True)
class Hunk:
    """One change: at ``line``, counted from 0, the lines ``before`` become ``after``, then at ``new_line``."""

    line: int
    new_line: int
    before: tuple[str, ...]
    after: tuple[str, ...]

    def reversed(self) -> Hunk:
        """Return the change that takes this one back."""
        return Hunk(self.new_line, self.line, self.after, self.before)


@dataclass(frozen=True)
class Patch:
    """One patch.

    Attributes:
        name: Of its file.
        subject: Its first line, without ``[PATCH]``.
        hunks: By path in SGLang's package.
        new_files: Paths that it makes.
    """

    name: str
    subject: str
    hunks: dict[str, tuple[Hunk, ...]]
    new_files: frozenset[str]


def read_patch(file: Path) -> Patch:
    """Read one file of ``git format-patch``.

    Raises:
        ValueError: It is none, or it touches what is not in SGLang's package.
    """
    text = file.read_text(encoding="utf-8")
    header = text.split("\n\n", 1)[0]
    subject = re.search(r"^Subject: (.*(?:\n .*)*)", header, re.MULTILINE)
    if subject is None:
        raise ValueError(f"{file.name} has no Subject: make it with git format-patch")
    # The signature of git ends the last hunk.
    body = re.sub(r"^-- \n.*\Z", "", text, flags=re.MULTILINE | re.DOTALL)
    hunks: dict[str, tuple[Hunk, ...]] = {}
    new_files = set()
    for part in re.split(r"^diff --git ", body, flags=re.MULTILINE)[1:]:
        old, new = part.split("\n", 1)[0].split()
        path = new.removeprefix(f"b/{PREFIX}")
        if old != f"a/{PREFIX}{path}" or new != f"b/{PREFIX}{path}" or ".." in path.split("/"):
            raise ValueError(f"{file.name} touches {new}, which is not in {PREFIX}")
        hunks[path] = tuple(_hunks(part))
        if re.search(r"^new file mode", part, re.MULTILINE):
            new_files.add(path)
    line = re.sub(r"^\[PATCH[^]]*\] ", "", subject[1].replace("\n", ""))
    return Patch(file.name, line, hunks, frozenset(new_files))


def _hunks(part: str) -> Iterator[Hunk]:
    for text in re.split(r"^@@ -", part, flags=re.MULTILINE)[1:]:
        head, *lines = text.split("\n")
        old, new = (max(int(number) - 1, 0) for number in re.findall(r"(?:^|\+)(\d+)", head)[:2])
        lines = [line for line in lines if line and not line.startswith("\\")]
        before = tuple(line[1:] for line in lines if line[0] in " -")
        after = tuple(line[1:] for line in lines if line[0] in " +")
        yield Hunk(old, new, before, after)


def change(text: str, hunks: tuple[Hunk, ...], *, reverse: bool = False) -> str | None:
    """Return a text with some hunks applied, or taken back; None if they do not fit.

    Each must fit line by line; it may have moved, if there is one place only where it fits.
    """
    lines, shift, start = text.split("\n"), 0, 0
    for hunk in hunks:
        if reverse:
            hunk = hunk.reversed()
        size = len(hunk.before)
        expected = hunk.line + shift
        places = [at for at in range(start, len(lines) - size + 1) if tuple(lines[at : at + size]) == hunk.before]
        if expected not in places and len(places) != 1:
            return None
        at = expected if expected in places else places[0]
        lines[at : at + size] = hunk.after
        start = at + len(hunk.after)
        shift = at - hunk.line + len(hunk.after) - size
    return "\n".join(lines)
