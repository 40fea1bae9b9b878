"""``rkv-sglang doctor --contract``: every difference between an SGLang and what the plugin expects of it."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TextIO

from rkv_sglang.integration.hooking.contract import Contract
from rkv_sglang.integration.hooking.releases import is_untested_allowed, judge
from rkv_sglang.integration.hooking.sources import PACKAGE, Sources, installed_folder, unpacked_folder

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
    findings = contract.findings(Sources(folder))
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


def version_in(folder: Path) -> str:
    """Return the version of the SGLang in a folder, as its own files say, or those of its wheel; else ``unknown``."""
    wheels = [path.name for path in folder.parent.glob(f"{PACKAGE}-*.dist-info")]
    if len(wheels) == 1:
        return wheels[0].removeprefix(f"{PACKAGE}-").removesuffix(".dist-info")
    try:
        text = (folder / "_version.py").read_text(encoding="utf-8")
    except OSError:
        text = ""
    written = re.search(r"^__version__ = (?:version = )?'([^']+)'", text, re.MULTILINE)
    if written is not None:
        return written[1]
    if folder == installed_folder():
        try:
            return version(PACKAGE)
        except PackageNotFoundError:
            pass
    return "unknown"
