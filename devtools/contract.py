"""Write the contract with SGLang, ``contract.json``, from the table of hooks and the installed SGLang.

And with it the hashes of what the patches touch. ``python -m devtools.contract`` writes both, with ``--check`` it only
says whether they are current.
"""

import ast
import inspect
import json
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from rkv_sglang.integration.hooking.contract import CONTRACT_FILE, Contract, make_contract
from rkv_sglang.integration.hooking.definitions import Definitions
from rkv_sglang.integration.hooking.hook import Hook
from rkv_sglang.integration.hooking.shapes import bare_parameters
from rkv_sglang.integration.hooking.sources import Sources, without_collector
from rkv_sglang.patching.folders import PACKAGE, installed_folder
from rkv_sglang.patching.tree import PATCHES, PRISTINE_FILE, read_series, text_hash

# How many of its parameters each kind of hook has before those of its target, and after them.
_BEFORE_AND_AFTER = {"BEFORE": (0, 0), "AFTER": (1, 0), "AROUND": (1, 0), "STEP": (0, 1), "REPLACE": (0, 0)}


def used_parameters(hook: Hook, target: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return those parameters of a hooked function that the hook names, as SGLang names them, in parentheses.

    Raises:
        ValueError: The hook names one otherwise, so that it would not get it where it is given by name.
    """
    before, after = _BEFORE_AND_AFTER[hook.kind]
    parameters = list(inspect.signature(hook.function).parameters.values())
    parameters = [one.replace(annotation=inspect.Parameter.empty) for one in parameters[before:]]
    parameters = parameters[: len(parameters) - after]
    theirs = [one.arg for one in target.args.args]
    if theirs[:1] in (["self"], ["cls"]) and parameters and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
        parameters[0] = parameters[0].replace(name=theirs[0])
    places = [one.name for one in parameters if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    first = theirs[: len(places)]
    if places != first:
        raise ValueError(f"the hook on {hook.target} names its parameters {places}: name them as SGLang does, {first}")
    text = str(inspect.Signature(parameters))
    # As ``bare_parameters`` writes them.
    function = ast.parse(f"def f{text}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    return bare_parameters(function)


def contract_of(hooks: Iterable[Hook], sglang: str, folder: Path) -> Contract:
    """Return the contract of some hooks with the SGLang in a folder, of a version."""
    names: dict[str, str] = {}
    parameters, surroundings = {}, []
    hooks, sources = tuple(hooks), Sources(folder)
    with without_collector():
        definitions = Definitions(sources)
        for hook in hooks:
            names[hook.target] = "a hook on it"
            surroundings += hook.surroundings
            found = definitions.find(hook.target)
            if found is not None and isinstance(found.node, ast.FunctionDef | ast.AsyncFunctionDef):
                parameters[hook.target] = used_parameters(hook, found.node)
        for hook in hooks:
            for name in hook.uses:
                names.setdefault(name, f"the hook on {hook.target.removeprefix(f'{PACKAGE}.')}")
        return make_contract(sglang, names, parameters, surroundings, sources)


def current() -> Contract:
    """Return what the contract should be."""
    from rkv_sglang.integration.hooks.table import HOOKS

    folder = installed_folder()
    assert folder is not None, "SGLang is not installed"
    return contract_of(HOOKS, version(PACKAGE), folder)


def pristine_hashes(folder: Path, release: str) -> str:
    """Return the text of ``pristine.json``: the hashes, as released, of all files that the patches touch."""
    series = read_series(release)
    made = frozenset().union(*(patch.new_files for patch in series))
    paths = sorted({path for patch in series for path in patch.hunks} - made)
    hashes = {path: text_hash((folder / path).read_text(encoding="utf-8")) for path in paths}
    return json.dumps(hashes, indent=1) + "\n"


def main(argv: list[str]) -> int:
    """Write or check the files; returns the exit status."""
    if argv not in ([], ["--check"]):
        print("usage: python -m devtools.contract [--check]", file=sys.stderr)
        return 2
    contract = current()
    folder = installed_folder()
    assert folder is not None
    files = {
        CONTRACT_FILE: contract.to_json(),
        PATCHES / contract.sglang / PRISTINE_FILE: pristine_hashes(folder, contract.sglang),
    }
    for file, text in files.items():
        if not argv:
            file.write_text(text, encoding="utf-8")
        elif not file.exists() or file.read_text(encoding="utf-8") != text:
            print(f"{file.name} is out of date: run python -m devtools.contract", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
