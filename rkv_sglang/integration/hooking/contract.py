"""The contract with SGLang: every name that the plugin touches, and a check of all of them that imports nothing.

It stands in ``contract.json``, which ``python -m devtools.contract`` makes from the table of hooks.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rkv_sglang.integration.hooking.definitions import Definition, Definitions
from rkv_sglang.integration.hooking.shapes import bare_parameters, body_hash, parameters_differ
from rkv_sglang.integration.hooking.sources import Sources, without_collector
from rkv_sglang.patching.tree import TreeError, look

CONTRACT_FILE = Path(__file__).with_name("contract.json")


@dataclass(frozen=True)
class Finding:
    """One difference between an SGLang and the contract.

    Attributes:
        kind: ``missing``: the name is gone. ``changed``: it is another one under the same name.
        name: Dotted.
        detail: What of it; reads on after the name.
        breaks: Whether a hook cannot work with it; else it only has to be read.
    """

    kind: Literal["missing", "changed"]
    name: str
    detail: str
    breaks: bool

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.detail}"


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What the plugin expects of SGLang.

    Attributes:
        sglang: The release that it was written against.
        names: Every name of SGLang that is touched, with what touches it.
        parameters: Of each hooked function those that its hook uses, as ``shapes.parameters_differ`` takes them.
        functions: Hashes of the bodies of hooked, called and surrounding functions.
        files: Hashes of every file that was read to find all of these.
    """

    sglang: str
    names: dict[str, str]
    parameters: dict[str, str]
    functions: dict[str, str]
    files: dict[str, str]

    @classmethod
    def load(cls, file: Path = CONTRACT_FILE) -> Contract:
        """Read the contract that comes with this package."""
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return cls(**values)

    def to_json(self) -> str:
        """Return the text of the file."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def changed_files(self, sources: Sources) -> list[str]:
        """Return the files of the contract that are not as the release has them; without any, nothing differs."""
        texts, folder = sources.texts, sources.folder
        return [
            name
            for name, digest in self.files.items()
            if digest != (_hash(texts[name].encode()) if name in texts else _file_hash(folder / name))
        ]

    def sources_in(self, folder: Path) -> Sources:
        """Return the sources in a folder, as they are without this package's own patches if those are in there."""
        sources = Sources(folder)
        if self.changed_files(sources):
            with contextlib.suppress(TreeError, OSError):
                texts = look(folder, self.sglang).pristine
                return Sources(folder, {name: text for name, text in texts.items() if text is not None})
        return sources

    def findings(self, sources: Sources) -> list[Finding]:
        """Return every difference between an SGLang and this contract, what breaks first. Imports nothing.

        Args:
            sources: Of the SGLang in question.
        """
        with without_collector():
            found = list(self._differences(Definitions(sources)))
        return sorted(found, key=lambda finding: not finding.breaks)

    def check(self, folder: Path) -> list[Finding]:
        """Return what ``findings`` would, of the SGLang in a folder, at once if it is untouched."""
        sources = self.sources_in(folder)
        return self.findings(sources) if self.changed_files(sources) else []

    def _differences(self, definitions: Definitions) -> Iterator[Finding]:
        for name, user in self.names.items():
            if definitions.find(name) is None:
                yield Finding("missing", name, f"used by {user}", breaks=True)
        for name, used in self.parameters.items():
            function = _function(definitions.find(name))
            if function is not None and parameters_differ(used, function):
                detail = f"its parameters are {bare_parameters(function)}, and its hook uses {used}"
                yield Finding("changed", name, detail, breaks=True)
        for name, digest in self.functions.items():
            definition = definitions.find(name)
            function = _function(definition)
            if function is None:
                # What is touched was named above.
                if definition is not None or name not in self.names:
                    yield Finding("changed", name, "it is no function there", breaks=definition is not None)
            elif body_hash(function) != digest:
                yield Finding("changed", name, f"its body is not that of {self.sglang}", breaks=False)


def _function(definition: Definition | None) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    node = None if definition is None else definition.node
    return node if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else None


def _file_hash(path: Path) -> str | None:
    try:
        return _hash(path.read_bytes())
    except OSError:
        return None


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def make_contract(
    sglang: str, names: dict[str, str], parameters: dict[str, str], surroundings: list[str], sources: Sources
) -> Contract:
    """Write the contract against an SGLang, whose functions and files are hashed.

    Args:
        sglang: Its version.
        names: As in ``Contract``; those that are functions are hashed too.
        parameters: As in ``Contract``.
        surroundings: Further functions to hash.
        sources: Of that SGLang, fresh: what is read for the contract is what it depends on.

    Raises:
        ValueError: A surrounding function is none.
    """
    definitions = Definitions(sources)
    functions = {}
    for name in sorted({*names, *surroundings}):
        function = _function(definitions.find(name))
        if function is not None:
            functions[name] = body_hash(function)
        elif name in surroundings:
            raise ValueError(f"{name}, named as a surrounding function, is no function of SGLang {sglang}")
    files = {name: _file_hash(sources.folder / name) or "" for name in sorted(sources.read)}
    return Contract(
        sglang=sglang,
        names=dict(sorted(names.items())),
        parameters=dict(sorted(parameters.items())),
        functions=functions,
        files=files,
    )
