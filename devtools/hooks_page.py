"""Write ``docs/hooks.md``: the register of hooks and upstream patches, made from the table of hooks.

Usage: ``python -m devtools.hooks_page`` writes it, with ``--check`` it only says whether the page is current.
"""

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from rkv_sglang.integration.hooking.hook import Hook

ROOT = Path(__file__).resolve().parents[1]
PATCHES = ROOT / "patches"
REGISTER = ROOT / "docs" / "hooks.md"

_HEAD = """\
# Where rkv_sglang meets SGLang

Made by `python -m devtools.hooks_page` from `rkv_sglang/integration/hooks/`; do not edit it by hand.

Nothing in the installed SGLang is changed. SGLang's plugin loader applies the hooks below as its processes start, and
only after their targets were found with the parameters that they use, and with them every other name of SGLang that
they use; `rkv-sglang doctor --contract` looks them all up. A port to another SGLang must go through this list. Each
says what would be wrong without it, and which change in SGLang would make it unnecessary. "Counts on" names functions
that a hook neither goes around nor calls, but whose course it relies on. A STEP is a step of SGLang's resolution of its
arguments, wrapped through its own extension point for that, `register_resolution_hook`.

## Hooks
"""

_PATCHES_HEAD = """
## Patches for SGLang

Changes worth having upstream, in the order in which they apply, each in a folder named after the SGLang it applies to.
The plugin works without them. They are in `patches/`; `git am PATCH` takes one into a checkout of SGLang at that
version, and the command puts them into any tree of it, or takes them out: all or none, and only where the files they
touch are the release's own.

```
rkv-sglang patch check --target path/to/sglang
rkv-sglang patch apply --target path/to/sglang --only 1
rkv-sglang patch revert --target path/to/sglang
```
"""


def render(hooks: Iterable[Hook], patches: Iterable[Path]) -> str:
    """Return the register's text.

    Args:
        hooks: In the order in which they come to pass.
        patches: Files in the format of ``git format-patch``.
    """
    sections = [_HEAD]
    for number, hook in enumerate(hooks, start=1):
        function = f"{hook.function.__module__}.{hook.function.__qualname__}"
        lines = [f"### {number}. `{hook.target}`", "", f"- how: {hook.kind}, `{function}`"]
        if hook.signature:
            lines.append(f"- signature: `{hook.signature}`")
        lines += [f"- why: {hook.why}", f"- unnecessary with: {hook.upstream}"]
        if hook.capability:
            lines.append(f"- left out where the patches below give SGLang the capability `{hook.capability}`")
        lines += [f"- uses of `{owner}`: {', '.join(used)}" for owner, used in _by_owner(hook.uses).items()]
        lines += [f"- counts on `{owner}`: {', '.join(used)}" for owner, used in _by_owner(hook.surroundings).items()]
        sections.append("\n".join(lines) + "\n")
    entries = [f"- `{patch.relative_to(PATCHES)}`: {subject(patch)}" for patch in patches]
    return "\n".join(sections) + _PATCHES_HEAD + "\n" + "\n".join(entries) + "\n"


def _by_owner(uses: Iterable[str]) -> dict[str, list[str]]:
    owners: dict[str, list[str]] = {}
    for name in uses:
        owner, _, attribute = name.rpartition(".")
        owners.setdefault(owner, []).append(f"`{attribute}`")
    return owners


def subject(patch: Path) -> str:
    """Return a patch's subject, without its ``[PATCH]``."""
    header = patch.read_text().split("\n\n", 1)[0]
    folded = re.search(r"^Subject: (.*(?:\n .*)*)", header, re.MULTILINE)
    if folded is None:
        raise ValueError(f"{patch.name} has no Subject: make it with git format-patch")
    return re.sub(r"^\[PATCH[^]]*\] ", "", folded[1].replace("\n", ""))


def current() -> str:
    """Return what the register should be."""
    from rkv_sglang.integration.hooks.table import HOOKS

    return render(HOOKS, sorted(PATCHES.glob("*/*.patch")))


def main(argv: list[str]) -> int:
    """Write or check the register; returns the exit status."""
    if argv not in ([], ["--check"]):
        print("usage: python -m devtools.hooks_page [--check]", file=sys.stderr)
        return 2
    text = current()
    if not argv:
        REGISTER.write_text(text)
    elif not REGISTER.exists() or REGISTER.read_text() != text:
        print("docs/hooks.md is out of date: run python -m devtools.hooks_page", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
