"""Every place where the package touches SGLang, found in its own syntax trees.

Kinds of objects are told by the names of variables and attributes, since the package keeps one name for one thing.
Where a name is not known and something is taken from it, that is a gap, and the test says what to write where.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from dataclasses import dataclass

from tests.integration.hooking.kinds import (
    FIELD_READERS,
    OF_PATCHES,
    OTHER,
    OWN_MEMBERS,
    OWNERS,
    PLAIN,
    SUBCLASSES,
    VALUES,
)

KINDS = "tests/integration/hooking/kinds.py"
# Of lists, which are told by what is in them.
LIST_METHODS = ("append", "extend")
ENVIRONMENT = "sglang.srt.environ.envs"


@dataclass(frozen=True, order=True)
class Place:
    """A line of the package, and the dotted name of SGLang that it touches, or what is not known of it."""

    where: str
    name: str


class _Unknown:
    """A value of which nobody has said what it is; ``mend`` says where to say it."""

    def __init__(self, mend: str) -> None:
        self.mend = mend


Kind = str | _Unknown


def is_sglang(kind: Kind) -> bool:
    return isinstance(kind, str) and kind.split(".")[0] == "sglang"


class Walker(ast.NodeVisitor):
    """Collects the touch points of one module in ``touched``, and in ``gaps`` what it could not tell."""

    def __init__(self, module: str, source: str, own_makers: set[str]) -> None:
        self._own_makers = own_makers
        self.file = module.replace(".", "/") + ".py"
        self.touched: set[Place] = set()
        self.gaps: set[Place] = set()
        self._scopes: list[dict[str, Kind]] = [{}]
        self._functions: list[str] = []
        self._bases: list[str | None] = []
        tree = ast.parse(source)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                self._scopes[0][node.name] = OTHER
        self.visit(tree)

    # What is touched.

    def _touch(self, node: ast.AST, name: str) -> None:
        owner, _, attribute = name.rpartition(".")
        if name.startswith(OF_PATCHES) or attribute.startswith(("__", *OWN_MEMBERS.get(owner, ()))):
            return
        self.touched.add(Place(f"{self.file}:{node.lineno}", name))  # type: ignore[attr-defined]

    def _gap(self, node: ast.AST, text: str) -> None:
        self.gaps.add(Place(f"{self.file}:{node.lineno}", text))  # type: ignore[attr-defined]

    def _imported(self, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, str]]:
        for alias in node.names:
            if isinstance(node, ast.ImportFrom):
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"
            else:
                yield alias.asname or alias.name.split(".")[0], alias.name if alias.asname else alias.name.split(".")[0]

    def _visit_import(self, node: ast.Import | ast.ImportFrom) -> None:
        for bound, name in self._imported(node):
            self._scopes[-1][bound] = name if is_sglang(name) else OTHER
            if is_sglang(name):
                self._touch(node, name)

    visit_Import = visit_ImportFrom = _visit_import

    def visit_If(self, node: ast.If) -> None:
        if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            # Only names of types: nothing of SGLang is touched.
            for statement in node.body:
                assert isinstance(statement, ast.ImportFrom)
                self._scopes[-1].update({k: v if is_sglang(v) else OTHER for k, v in self._imported(statement)})
            return
        self.visit(node.test)
        narrowed: dict[str, Kind] = {}
        test = node.test
        if isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id == "isinstance":
            name, kind = test.args[0], self._kind(test.args[1])
            if isinstance(name, ast.Name) and is_sglang(kind):
                narrowed[name.id] = kind
        elif isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Is) and isinstance(test.left, ast.Call):
            # type(name) is Class
            kind = self._kind(test.comparators[0])
            if ast.unparse(test.left.func) == "type" and isinstance(test.left.args[0], ast.Name) and is_sglang(kind):
                narrowed[test.left.args[0].id] = kind
        known = set(narrowed)
        self._scopes.append(narrowed)
        for statement in node.body:
            self.visit(statement)
        # What is bound under a condition is bound behind it, too.
        inner = self._scopes.pop()
        self._scopes[-1].update({name: kind for name, kind in inner.items() if name not in known})
        for statement in node.orelse:
            self.visit(statement)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and re.fullmatch(r"SGLANG_[A-Z0-9_]+", node.value):
            self._touch(node, f"{ENVIRONMENT}.{node.value}")

    # Scopes.

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        base = SUBCLASSES.get(node.name)
        for one in node.bases:
            if base is None and not (isinstance(kind := self._kind(one), str) and kind == OTHER):
                self._gap(one, f"say in SUBCLASSES of {KINDS} which class of SGLang {node.name} is made of")
        self._scopes[-1][node.name] = OTHER
        if base is not None:
            for member in node.body:
                targets = [getattr(member, "target", None), *getattr(member, "targets", ())]
                names = [getattr(member, "name", None), *(getattr(target, "id", None) for target in targets)]
                for name in filter(None, names):
                    self._touch(member, f"{base}.{name}")
        self._bases.append(base)
        for statement in [*node.decorator_list, *node.body]:
            self.visit(statement)
        self._bases.pop()

    def _visit_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> None:
        name = getattr(node, "name", "lambda")
        scope: dict[str, Kind] = {}
        arguments = node.args
        for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]:
            scope[argument.arg] = self._kind_of_parameter(argument, name)
        for rest in filter(None, (arguments.vararg, arguments.kwarg)):
            scope[rest.arg] = OTHER
        self._scopes[-1].setdefault(name, OTHER)
        for default in [*arguments.defaults, *filter(None, arguments.kw_defaults)]:
            self.visit(default)
        self._scopes.append(scope)
        self._functions.append(name)
        for statement in node.body if isinstance(node.body, list) else [node.body]:
            self.visit(statement)
        self._scopes.pop()
        self._functions.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _visit_function

    def _kind_of_parameter(self, argument: ast.arg, function: str) -> Kind:
        if argument.arg in ("self", "cls") and self._bases:
            return self._bases[-1] or OTHER
        if argument.annotation is not None and ast.unparse(argument.annotation) not in ("Any", "ArgsView"):
            kinds = {self._kind(node) for node in ast.walk(argument.annotation) if isinstance(node, ast.Name)}
            return next((kind for kind in kinds if is_sglang(kind)), OTHER)
        return self._kind_of_variable(argument.arg, function)

    def _kind_of_variable(self, name: str, function: str) -> Kind:
        for key in (f"{function}.{name}", name):
            if key in OWNERS or key in PLAIN:
                return OWNERS.get(key, OTHER)
        return _Unknown(f"say in OWNERS or PLAIN of {KINDS} what {name!r} is, or annotate it")

    def _bind(self, target: ast.expr, kind: Kind) -> None:
        if isinstance(target, ast.Name):
            function = self._functions[-1] if self._functions else ""
            known = self._kind_of_variable(target.id, function)
            self._scopes[-1][target.id] = known if isinstance(known, str) else kind
        elif isinstance(target, ast.Tuple | ast.List):
            for part in target.elts:
                self._bind(part, kind)
        elif isinstance(target, ast.Starred):
            self._bind(target.value, kind)
        else:
            self.visit(target)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        for target in node.targets:
            is_pairwise = isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple)
            if is_pairwise and len(target.elts) == len(node.value.elts):
                for part, value in zip(target.elts, node.value.elts, strict=True):
                    self._bind(part, self._kind(value))
            else:
                self._bind(target, self._kind(node.value))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)
        is_any = ast.unparse(node.annotation) == "Any"
        self._bind(node.target, self._kind(node.value) if is_any and node.value is not None else OTHER)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        self._bind(node.target, self._kind(node.value))

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        self._bind(node.target, self._kind(node.iter))
        for statement in [*node.body, *node.orelse]:
            self.visit(statement)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            self.visit(item.context_expr)
            if item.optional_vars is not None:
                self._bind(item.optional_vars, self._kind(item.context_expr))
        for statement in node.body:
            self.visit(statement)

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        if node.name:
            self._scopes[-1][node.name] = OTHER
        self.generic_visit(node)

    def _visit_comprehension(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> None:
        for part in node.generators:
            self.visit(part.iter)
            self._bind(part.target, self._kind(part.iter))
            for condition in part.ifs:
                self.visit(condition)
        for name in ("elt", "key", "value"):
            if hasattr(node, name):
                self.visit(getattr(node, name))

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _visit_comprehension

    # Values.

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self._attribute(node, self._kind(node.value), node.attr)
        self.visit(node.value)

    def _attribute(self, node: ast.AST, kind: Kind, attribute: str) -> None:
        if isinstance(kind, _Unknown):
            self._gap(node, f"touches {attribute!r}: {kind.mend}")
        elif is_sglang(kind) and attribute not in LIST_METHODS:
            self._touch(node, f"{kind}.{attribute}")

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func.id if isinstance(node.func, ast.Name) else ""
        first = node.args[0] if node.args else None
        if function in FIELD_READERS and isinstance(first, ast.Constant):
            self._touch(node, f"{FIELD_READERS[function]}.{first.value}")
        if function in ("getattr", "setattr", "hasattr") and first is not None and is_sglang(self._kind(first)):
            name = node.args[1]
            if isinstance(name, ast.Constant):
                self._attribute(node, self._kind(first), name.value)
            elif isinstance(name, ast.Name) and name.id.isupper():
                # A name that this package gives.
                pass
            elif not set(self._functions) & FIELD_READERS.keys():
                self._gap(
                    node,
                    f"takes a name that is no constant: name the function in FIELD_READERS of {KINDS}, which "
                    "reads its callers' first argument",
                )
        self.generic_visit(node)

    def _kind(self, node: ast.expr) -> Kind:
        if isinstance(node, ast.Name):
            for scope in reversed(self._scopes):
                if node.id in scope:
                    return scope[node.id]
            if hasattr(builtins, node.id):
                return OTHER
            return self._kind_of_variable(node.id, self._functions[-1] if self._functions else "")
        if isinstance(node, ast.Attribute):
            kind = self._kind(node.value)
            if is_sglang(kind):
                return self._held(str(kind), node.attr)
            # Of an object of this package that holds one of SGLang's.
            return OWNERS.get(node.attr, kind)
        if isinstance(node, ast.Call):
            return self._kind_of_call(node)
        if isinstance(node, ast.Subscript | ast.Starred | ast.Await | ast.NamedExpr):
            return self._kind(node.value)
        if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp):
            return self._first_of_sglang([node.elt])
        if isinstance(node, ast.IfExp):
            return self._first_of_sglang([node.body, node.orelse])
        if isinstance(node, ast.BoolOp):
            return self._first_of_sglang(node.values)
        return OTHER

    def _first_of_sglang(self, nodes: list[ast.expr]) -> Kind:
        kinds = [self._kind(node) for node in nodes]
        return next((kind for kind in kinds if is_sglang(kind)), OTHER)

    def _kind_of_call(self, node: ast.Call) -> Kind:
        function = node.func.id if isinstance(node.func, ast.Name) else ""
        if function == "super" and self._bases:
            return self._bases[-1] or OTHER
        if function == "getattr" and is_sglang(kind := self._kind(node.args[0])):
            name = node.args[1]
            return self._held(str(kind), name.value) if isinstance(name, ast.Constant) else OTHER
        if function in ("list", "sorted", "enumerate", "zip", "reversed", "iter", "next", "filter"):
            return self._first_of_sglang(node.args)
        if isinstance(node.func, ast.Lambda):
            return OTHER
        called = node.func.attr if isinstance(node.func, ast.Attribute) else function
        if called in self._own_makers and not is_sglang(self._kind(node.func)):
            return self._kind_of_variable(f"{called}()", "")
        kind = self._kind(node.func)
        if is_sglang(kind) and isinstance(node.func, ast.Name):
            return self._held(*str(kind).rsplit(".", 1))
        # What a method of SGLang's returns is told by its name, too.
        return kind

    @staticmethod
    def _held(owner: str, name: str) -> Kind:
        dotted = f"{owner}.{name}"
        if dotted in VALUES:
            return VALUES[dotted]
        if name[0].isupper() and not name.isupper():
            return dotted
        if name in OWNERS or name in PLAIN:
            return OWNERS.get(name, OTHER)
        return _Unknown(f"say in OWNERS, PLAIN or VALUES of {KINDS} what {dotted} holds or returns")


def touch_points(sources: dict[str, str]) -> tuple[list[Place], list[Place]]:
    """Return every touch point of some modules, and every gap in what is known of them."""
    own_makers = _makers(sources)
    walkers = [Walker(module, source, own_makers) for module, source in sources.items()]
    return (
        sorted({place for walker in walkers for place in walker.touched}),
        sorted({place for walker in walkers for place in walker.gaps}),
    )


def _makers(sources: dict[str, str]) -> set[str]:
    """Return the functions of these modules that do not say what they return."""
    nodes = [node for source in sources.values() for node in ast.walk(ast.parse(source))]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    return {node.name for node in functions if node.returns is not None and ast.unparse(node.returns) == "Any"}
