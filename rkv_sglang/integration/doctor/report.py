"""Look at an installation and say whether a server here could run with a KV policy, and if not, why."""

import os
import platform
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import TextIO

from rkv_sglang import __version__
from rkv_sglang.integration.hooking.contract import Contract
from rkv_sglang.integration.hooking.install import PLUGIN_NAME
from rkv_sglang.integration.hooking.releases import SUPPORTED_SGLANG, Verdict, findings_in, judge_installed
from rkv_sglang.messages import one_line
from rkv_sglang.patching.folders import PACKAGE, installed_folder

PLUGIN_GROUP = "sglang.srt.plugins"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: What was looked at.
        detail: What was found.
        problem: One line that names cause and mend; None if all is well.
    """

    subject: str
    detail: str
    problem: str | None = None


def diagnose(out: TextIO | None = None) -> int:
    """Write the report and return the exit status: 0, or 1 with the first problem as the last line.

    Args:
        out: Where to write; None is standard output.
    """
    with warnings.catch_warnings():
        # SGLang warns of kernels that a CPU lacks as it is imported.
        warnings.simplefilter("ignore")
        return report(_examine(), out)


def report(findings: Iterable[Finding], out: TextIO | None) -> int:
    """Write findings as they come; return 1 if there was a problem among them, else 0."""
    problem = None
    for finding in findings:
        print(f"{'ok  ' if finding.problem is None else 'FAIL'} {finding.subject:<11}{finding.detail}", file=out)
        problem = problem or finding.problem
    print("ready: start a server with --kv-policy rkv" if problem is None else problem, file=out)
    return 0 if problem is None else 1


def _examine() -> Iterable[Finding]:
    yield Finding(subject="rkv_sglang", detail=__version__)
    yield Finding(subject="python", detail=platform.python_version())
    yield check_sglang()
    for package in ("torch", "triton"):
        yield check_package(package)
    yield Finding(subject="flashinfer", detail=_version_or_none("flashinfer-python") or "not installed (optional)")
    yield check_device()
    yield check_plugin(entry_points(group=PLUGIN_GROUP), os.environ.get("SGLANG_PLUGINS", ""))
    contract = check_contract()
    yield contract
    if contract.problem is None:
        yield check_import()


def _version_or_none(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def check_sglang() -> Finding:
    """Judge the installed SGLang, by its version and by all that the plugin touches in it. Imports nothing of it."""
    installed = _version_or_none(PACKAGE)
    if installed is None:
        verdict = Verdict(f"SGLang is not installed: run pip install {PACKAGE}=={SUPPORTED_SGLANG[-1]}")
    else:
        verdict = judge_installed()
    detail = f"{installed or 'not installed'} (tested: {', '.join(SUPPORTED_SGLANG)})"
    if verdict.warning is not None:
        detail += f"; {verdict.warning}"
    return Finding(subject="sglang", detail=detail, problem=verdict.problem)


def check_package(package: str) -> Finding:
    """See that a package that the kernels need is installed."""
    installed = _version_or_none(package)
    problem = None if installed else f"{package} is not installed: run pip install {package}"
    return Finding(subject=package, detail=installed or "not installed", problem=problem)


def check_device() -> Finding:
    """Name the device that a server would use."""
    try:
        import torch
    # Whatever a library that does not fit this machine raises.
    except Exception as error:
        problem = f"torch cannot be imported ({_told(error)}): {_mend(error, 'reinstall torch for this machine')}"
        return Finding(subject="device", detail="unknown", problem=problem)
    if not torch.cuda.is_available():
        return Finding(subject="device", detail=f"CPU, the torch path ({torch.get_num_threads()} threads)")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    major, minor = torch.cuda.get_device_capability()
    return Finding(subject="device", detail=f"CUDA, sm_{major}{minor}: {', '.join(names)}")


def check_plugin(plugins: Iterable[EntryPoint], allowed: str) -> Finding:
    """See that SGLang would find and load this plugin.

    Args:
        plugins: The installed entry points of SGLang's plugin group.
        allowed: The value of ``SGLANG_PLUGINS``, a comma-separated list of names; empty allows all.
    """
    found = [plugin for plugin in plugins if plugin.name == PLUGIN_NAME]
    if not found:
        problem = f"SGLang would not find the plugin: no entry point {PLUGIN_NAME}; run pip install rkv-sglang again"
        return Finding(subject="plugin", detail="no entry point", problem=problem)
    names = {name.strip() for name in allowed.split(",") if name.strip()}
    if names and PLUGIN_NAME not in names:
        problem = f"SGLANG_PLUGINS={allowed} leaves this plugin out: add {PLUGIN_NAME} to it or unset it"
        return Finding(subject="plugin", detail="found, but not allowed", problem=problem)
    try:
        found[0].load()
    # Whatever an import raises, SGLang would log it and serve on without the plugin.
    except Exception as error:
        problem = f"the plugin cannot be loaded ({_told(error)}): {_mend(error, 'run pip install rkv-sglang again')}"
        return Finding(subject="plugin", detail="found, but it does not load", problem=problem)
    return Finding(subject="plugin", detail=f"found: {found[0].value}")


def check_contract() -> Finding:
    """Count what the plugin touches in the installed SGLang and what of it is as expected. Imports nothing of it."""
    folder = installed_folder()
    if folder is None:
        return Finding(subject="contract", detail="not looked at", problem="SGLang is not installed: install it")
    contract, findings = Contract.load(), findings_in(folder)
    breaks = [finding for finding in findings if finding.breaks]
    total = len(contract.names) + len(contract.parameters)
    detail = (
        f"{total - len(breaks)} of {total} names and signatures that the plugin uses, "
        f"{len(contract.functions) - len(findings) + len(breaks)} of {len(contract.functions)} functions as in "
        f"SGLang {contract.sglang}"
    )
    return Finding(subject="contract", detail=detail, problem=str(breaks[0]) if breaks else None)


def check_import() -> Finding:
    """See that all that is hooked can be imported."""
    try:
        from rkv_sglang.integration.hooks.table import HOOKS
    # Not only what is missing: SGLang makes folders and asks the machine as it is imported.
    except Exception as error:
        return Finding(subject="hooks", detail="cannot be imported", problem=import_problem(error))
    return Finding(subject="hooks", detail=f"{len(HOOKS)}, and what they go around can be imported")


def import_problem(error: Exception) -> str:
    """Return one line for an error that the import of what is hooked, or of SGLang's arguments, raised."""
    mend = _mend(error, f"install sglang=={SUPPORTED_SGLANG[-1]} unmodified")
    return f"SGLang cannot be imported, or lacks what the plugin needs ({_told(error)}): {mend}"


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def _mend(error: Exception, otherwise: str) -> str:
    """Return what to do about an import's error; a folder that cannot be made is no fault of the installation."""
    if not isinstance(error, OSError) or error.filename is None:
        return otherwise
    # Caches are below it.
    is_at_home = str(error.filename).startswith(os.path.expanduser("~"))
    return "set HOME to a folder that you may write to" if is_at_home else "make that a place that you may write to"
