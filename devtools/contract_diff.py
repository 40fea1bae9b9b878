"""Print what a port to another SGLang has to read: of each function of the contract that differs there, the difference.

Usage: ``python -m devtools.contract_diff FOLDER``, with an unpacked wheel, a checkout or another environment's
``sglang``; it is compared with the installed one. Nothing of either is imported.
"""

import ast
import difflib
import sys
from pathlib import Path

from rkv_sglang.integration.hooking.contract import Contract
from rkv_sglang.integration.hooking.definitions import Definitions
from rkv_sglang.integration.hooking.sources import Sources, without_collector
from rkv_sglang.patching.folders import installed_folder, unpacked_folder, version_in


def source_of(definitions: Definitions, name: str) -> list[str]:
    """Return the lines that define a name, decorators included; none where it is not there."""
    found = definitions.find(name)
    path = None if found is None else definitions.sources.file_of(found.module)
    if found is None or path is None or not isinstance(found.node, ast.FunctionDef | ast.AsyncFunctionDef):
        return []
    node = found.node
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = (definitions.sources.folder / path).read_text(encoding="utf-8").splitlines()
    return lines[first - 1 : node.end_lineno]


def differences(contract: Contract, ours: Path, other: Path) -> dict[str, list[str]]:
    """Return, by name, the changes to each function of the contract that reads otherwise or is missing in ``other``."""
    with without_collector():
        before, after = Definitions(Sources(ours)), Definitions(Sources(other))
        names = sorted({finding.name for finding in contract.findings(after.sources)})
        changes = {}
        for name in names:
            one, two = source_of(before, name), source_of(after, name)
            changes[name] = list(difflib.unified_diff(one, two, lineterm="", n=2))[2:]
    return changes


def main(argv: list[str]) -> int:
    """Print all of them; returns the exit status."""
    other, ours = unpacked_folder(Path(argv[0])) if len(argv) == 1 else None, installed_folder()
    if other is None or ours is None:
        print("usage: python -m devtools.contract_diff FOLDER, one with an sglang in it", file=sys.stderr)
        return 2
    changes = differences(Contract.load(), ours, other)
    for name, lines in changes.items():
        print(f"== {name}")
        print("\n".join(lines) if lines else "no function: see `rkv-sglang doctor --contract`")
    count = sum(line[:1] in "+-" for lines in changes.values() for line in lines)
    print(f"{len(changes)} names and {count} lines differ between {version_in(ours)} and {version_in(other)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
