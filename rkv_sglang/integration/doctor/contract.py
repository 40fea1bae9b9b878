"""``rkv-sglang doctor --contract``: every difference between an SGLang and what the plugin expects of it."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from rkv_sglang.integration.hooking.contract import Contract
from rkv_sglang.integration.hooking.releases import is_untested_allowed, judge
from rkv_sglang.patching.folders import PACKAGE, installed_folder, unpacked_folder, version_in

INSTALLED = ""
"""The value of the flag that stands for the SGLang of this environment."""


def print_contract(path: str, out: TextIO | None = None) -> int:
    """Print one line for every difference, then whether that SGLang may be served with; return 0 if it may, else 1.

    Reads source files and imports nothing of SGLang.

    Args:
        path: A folder with an unpacked SGLang, a wheel's or a checkout's; ``INSTALLED`` for the one installed.
        out: Where to write; None is standard output.
    """
    folder = installed_folder() if path == INSTALLED else unpacked_folder(Path(path).expanduser())
    if folder is None:
        where = "here: install it, or name a folder" if path == INSTALLED else f"in {path}: name an unpacked wheel"
        print(f"there is no {PACKAGE} {where} or a checkout", file=out)
        return 1
    contract = Contract.load()
    # Read in any case, so that this says what it looked at.
    findings = contract.findings(contract.sources_in(folder))
    for finding in findings:
        print(finding, file=out)
    found = version_in(folder)
    verdict = judge(found, findings, allow_untested=is_untested_allowed())
    counted = (
        f"{len(contract.names)} names, {len(contract.parameters)} signatures and {len(contract.functions)} functions "
        f"of SGLang {contract.sglang} looked up in {found}"
    )
    print(f"{counted}: {verdict.problem or verdict.warning or 'all as expected'}", file=out)
    return 0 if verdict.problem is None else 1
