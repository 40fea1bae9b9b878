"""Verdict on an SGLang, whether it may be served with: by its version and by what of the contract holds there."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rkv_sglang.integration.hooking.contract import Contract, Finding
from rkv_sglang.patching.folders import PACKAGE, installed_folder

SUPPORTED_SGLANG = ("0.5.23",)
ALLOW_UNTESTED = "RKV_SGLANG_ALLOW_UNTESTED"
_MEND = f"install {PACKAGE}=={SUPPORTED_SGLANG[-1]}"
_LIST = "`rkv-sglang doctor --contract` lists them"


@dataclass(frozen=True)
class Verdict:
    """Whether an SGLang may be served with.

    Attributes:
        problem: One line that names cause and mend; None if it may.
        warning: One line to log where it may; None if there is nothing to say.
    """

    problem: str | None = None
    warning: str | None = None


def is_untested_allowed() -> bool:
    """Return whether the user takes responsibility for an SGLang that this package was not tested with."""
    return os.environ.get(ALLOW_UNTESTED, "") == "1"


def judge(installed: str, findings: Sequence[Finding], *, allow_untested: bool) -> Verdict:
    """Decide by version and contract.

    What a hook cannot work with refuses always. Functions that read otherwise are a warning on a release that was
    tested, since somebody edited it knowingly; on any other version, and on a local, post or development version of
    it, they refuse, unless ``allow_untested``.

    Args:
        installed: SGLang's version.
        findings: Of ``Contract.check``.
        allow_untested: Of ``is_untested_allowed``.
    """
    breaks = [finding for finding in findings if finding.breaks]
    if breaks:
        return Verdict(
            f"SGLang {installed} lacks {_count(len(breaks), 'thing')} that this rkv_sglang uses, first: {breaks[0]} "
            f"({_LIST}); {_MEND}, or an rkv_sglang made for your version"
        )
    differing = _count(len(findings), "function") + " that this rkv_sglang counts on read otherwise"
    if not is_release_of_tested(installed):
        what = f"SGLang {installed} was not tested with this rkv_sglang"
        what += f", and {differing} there ({_LIST})" if findings else ", though all that it uses is there"
    elif findings:
        what = f"SGLang {installed} is not as released: {differing}, first {findings[0].name} ({_LIST})"
    else:
        return Verdict()
    if allow_untested:
        return Verdict(warning=f"{what}: allowed by {ALLOW_UNTESTED}=1")
    if installed in SUPPORTED_SGLANG:
        return Verdict(warning=what)
    return Verdict(f"{what}: {_MEND}, or set {ALLOW_UNTESTED}=1 once you have read what changed")


def is_release_of_tested(installed: str) -> bool:
    """Return whether a version is a tested release or one made of it, such as ``0.5.23.post1`` and ``0.5.23+cu130``.

    A development version comes before the release that it names, so ``0.5.23.dev4`` is none.
    """
    found = re.fullmatch(r"([\d.]*\d)(\.post\d+)?(\+[\w.-]+)?", installed)
    return found is not None and found[1] in SUPPORTED_SGLANG


@functools.cache
def findings_in(folder: Path) -> tuple[Finding, ...]:
    """Return what of the contract does not hold for the SGLang in a folder, looked at once a process."""
    return tuple(Contract.load().check(folder))


def judge_installed() -> Verdict:
    """Judge the SGLang of this environment. Reads its files, imports none of them.

    Raises:
        PackageNotFoundError: None is installed.
    """
    folder = installed_folder()
    installed = version(PACKAGE)
    if folder is None:
        return Verdict(f"SGLang {installed} has no folder of its own: install it anew")
    return judge(installed, findings_in(folder), allow_untested=is_untested_allowed())


def require_contract() -> str | None:
    """See that the installed SGLang is what the hooks were written for; return one line to log, or None.

    Raises:
        RuntimeError: It is not; one line.
    """
    verdict = judge_installed()
    if verdict.problem is not None:
        raise RuntimeError(verdict.problem)
    return verdict.warning


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
