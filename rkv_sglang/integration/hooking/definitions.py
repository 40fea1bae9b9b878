"""Look-up of names of SGLang: where each is defined, by the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from rkv_sglang.integration.hooking.sources import Sources

# SGLang gathers the fields of this record from the classes of that folder while it is imported.
GATHERED = {"sglang.srt.server_args.ServerArgs": "sglang.srt.arg_groups.fields"}
# Aliases and re-exports that are followed for one name.
MOST_STEPS = 40
_OWN = ("self", "cls")

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Definition:
    """One place that defines a name.

    Attributes:
        node: A module, a class, a function, or the statement that sets the name.
        module: The dotted name of the module that it stands in.
        name: The dotted name of the definition itself.
    """

    node: ast.AST
    module: str
    name: str


class Definitions:
    """Look-ups in one package's sources; what was looked at is kept."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self._tables: dict[int, dict[str, ast.AST]] = {}
        self._fields: dict[str, Definition] = {}
        self._set_on_self: dict[int, dict[str, ast.AST]] = {}

    def find(self, name: str) -> Definition | None:
        """Return where a dotted name is defined; None if nowhere.

        An attribute of a class is defined by the class or a base: by a statement of its body, or where one of its
        methods sets it on ``self``. Other names are followed through imports and aliases.
        """
        return self._find(name, MOST_STEPS)

    def _find(self, name: str, steps: int) -> Definition | None:
        if steps == 0:
            return None
        tree = self.sources.tree_of(name)
        if tree is not None:
            return Definition(tree, name, name)
        owner_name, _, attribute = name.rpartition(".")
        if not owner_name:
            return None
        owner = self._find(owner_name, steps - 1)
        if owner is None:
            # A folder without an __init__ holds modules only.
            return None
        return self._attribute(owner, attribute, steps - 1)

    def _attribute(self, owner: Definition, attribute: str, steps: int) -> Definition | None:
        if steps <= 0:
            return None
        node = owner.node
        if isinstance(node, ast.Module):
            return self._in_module(owner, attribute, steps)
        if isinstance(node, ast.ClassDef):
            return self._in_class(owner, attribute, steps)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Call):
            # An object made at import: what its class has.
            kind = self._of_expression(node.value.func, owner.module, steps)
            return None if kind is None else self._attribute(kind, attribute, steps - 1)
        return None

    def _in_module(self, owner: Definition, attribute: str, steps: int) -> Definition | None:
        node = self._table(owner.node).get(attribute)
        name = f"{owner.name}.{attribute}"
        if isinstance(node, ast.ImportFrom):
            return self._find(f"{self._base(node, owner.module)}.{self._imported(node, attribute)}", steps - 1)
        if isinstance(node, ast.Import):
            imported = next(alias for alias in node.names if (alias.asname or alias.name.split(".")[0]) == attribute)
            return self._find(imported.name if imported.asname else attribute, steps - 1)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name | ast.Attribute):
            return self._of_expression(node.value, owner.module, steps) or Definition(node, owner.module, name)
        if node is not None:
            return Definition(node, owner.module, name)
        for star in self._stars(owner.node):
            found = self._find(f"{self._base(star, owner.module)}.{attribute}", steps - 1)
            if found is not None:
                return found
        return None

    def _in_class(self, owner: Definition, attribute: str, steps: int) -> Definition | None:
        assert isinstance(owner.node, ast.ClassDef)
        name = f"{owner.name}.{attribute}"
        node = self._table(owner.node).get(attribute) or self._on_self(owner.node).get(attribute)
        if node is not None:
            return Definition(node, owner.module, name)
        for base in owner.node.bases:
            kind = self._of_expression(base, owner.module, steps)
            found = None if kind is None else self._attribute(kind, attribute, steps - 1)
            if found is not None:
                return found
        # Statements such as ``Class.attribute = value`` below the class.
        tree = self.sources.tree_of(owner.module)
        node = None if tree is None else self._table(tree).get(f"{owner.node.name}.{attribute}")
        if node is not None:
            return Definition(node, owner.module, name)
        return self._gathered(owner, attribute)

    def _gathered(self, owner: Definition, attribute: str) -> Definition | None:
        if owner.name not in GATHERED:
            return None
        if not self._fields:
            for module in self.sources.modules_in(GATHERED[owner.name]):
                tree = self.sources.tree_of(module)
                kinds = [node for node in (tree.body if tree is not None else ()) if isinstance(node, ast.ClassDef)]
                for kind in kinds:
                    for node in kind.body:
                        # Others are computed from these.
                        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                            field = node.target.id
                            self._fields[field] = Definition(node, module, f"{module}.{kind.name}.{field}")
        return self._fields.get(attribute)

    def _of_expression(self, node: ast.expr, module: str, steps: int) -> Definition | None:
        """Return what an expression of names with dots between them stands for in a module."""
        if isinstance(node, ast.Subscript):
            node = node.value
        if not isinstance(node, ast.Name | ast.Attribute):
            return None
        return self._find(f"{module}.{ast.unparse(node)}", steps - 1)

    def _base(self, node: ast.ImportFrom, module: str) -> str:
        if not node.level:
            return node.module or ""
        name = self.sources.file_of(module) or ""
        parts = module.split(".") if name.endswith("__init__.py") else module.split(".")[:-1]
        parts = parts[: len(parts) - node.level + 1]
        return ".".join([*parts, *([node.module] if node.module else [])])

    @staticmethod
    def _imported(node: ast.ImportFrom, name: str) -> str:
        return next(alias.name for alias in node.names if (alias.asname or alias.name) == name)

    @staticmethod
    def _stars(tree: ast.AST) -> Iterator[ast.ImportFrom]:
        for node in _statements(tree):
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                yield node

    def _table(self, owner: ast.AST) -> dict[str, ast.AST]:
        """Return what the statements of a module or class define, those under ``if`` and ``try`` too."""
        table = self._tables.get(id(owner))
        if table is None:
            table = self._tables[id(owner)] = {}
            for node in _statements(owner):
                for name in _defined_by(node):
                    # A class keeps its name where a record is made of it under the same one.
                    if not isinstance(table.get(name), ast.ClassDef):
                        table[name] = node
        return table

    def _on_self(self, owner: ast.ClassDef) -> dict[str, ast.AST]:
        """Return what a class's methods set on ``self``."""
        table = self._set_on_self.get(id(owner))
        if table is None:
            table = self._set_on_self[id(owner)] = {}
            for node in _statements(owner, within=_EVERYWHERE):
                for target in _targets(node):
                    owned_by = getattr(target, "value", None)
                    if isinstance(target, ast.Attribute) and isinstance(owned_by, ast.Name) and owned_by.id in _OWN:
                        table.setdefault(target.attr, target)
        return table


_BLOCKS: tuple[type[ast.AST], ...] = (ast.If, ast.Try, ast.TryStar, ast.With, ast.For, ast.While, ast.Match)
_EVERYWHERE = (*_BLOCKS, ast.FunctionDef, ast.AsyncFunctionDef, ast.AsyncWith, ast.AsyncFor)


def _statements(owner: ast.AST, within: tuple[type[ast.AST], ...] = _BLOCKS) -> Iterator[ast.stmt]:
    """Yield the statements of a body, those of its blocks too; those of functions only if ``within`` has them."""
    for name in ("body", "orelse", "finalbody"):
        for node in getattr(owner, name, ()):
            yield node
            if isinstance(node, within):
                yield from _statements(node, within)
    for part in (*getattr(owner, "handlers", ()), *getattr(owner, "cases", ())):
        yield from _statements(part, within)


def _targets(node: ast.stmt) -> Iterator[ast.expr]:
    """Yield what a statement sets, the parts of tuples one by one."""
    targets = list(getattr(node, "targets", ())) if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    targets += [item.optional_vars for item in getattr(node, "items", ()) if isinstance(item, ast.withitem)]
    for target in targets:
        if isinstance(target, ast.Tuple | ast.List):
            yield from target.elts
        elif target is not None:
            yield target


def _defined_by(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Import):
        yield from (alias.asname or alias.name.split(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (alias.asname or alias.name for alias in node.names)
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        yield from (ast.unparse(target) for target in _targets(node) if isinstance(target, ast.Name | ast.Attribute))
