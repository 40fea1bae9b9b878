"""Imports point down, only the integration knows SGLang, names are public on purpose, modules stay small."""

import ast
import re
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkv_sglang.integration.hooking.releases import SUPPORTED_SGLANG

PACKAGE = "rkv_sglang"
ROOT = Path(__file__).resolve().parents[1]
LAYERS = (
    "messages",
    "config",
    "user_files",
    "sizes",
    "algorithm",
    "policy_names",
    "policies",
    "kernels",
    "cache",
    "client",
    "view",
    "prefix_command",
    "plan_command",
    "patching",
    "integration",
    "cli",
)
# The package itself re-exports settings only, so it may be imported from everywhere but from them.
RANKS = {layer: 2 * rank for rank, layer in enumerate(LAYERS)} | {"": 2 * LAYERS.index("config") + 1}
SGLANG_LAYER = "integration"
# Inside the integration: each of these imports only itself and what comes before it.
ROOMS = ("hooking", "startup", "runtime", "hooks", "doctor", "plugin")
MOST_LINES = 300
MOST_MODULES = 12
IMPORT_FUNCTIONS = {"import_module", "__import__", "find_spec", "resolve_name"}


def package_sources() -> dict[str, str]:
    """Return every module of the package by its dotted name; packages end with ``.__init__``."""
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text() for path in files}


def layer_of(module: str) -> str:
    """Return the layer of a dotted name; ``""`` is the package's own ``__init__``."""
    parts = module.removesuffix(".__init__").split(".")
    return parts[1] if len(parts) > 1 else ""


def called_name(call: ast.Call) -> str:
    """Return the last name of what is called: ``b`` of ``b()`` and of ``a.b()``; empty if it has none."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def imported_modules(module: str, source: str) -> list[tuple[int, str]]:
    """Return (line, dotted name) of every import, at any depth, relative ones resolved, literal dynamic ones included.

    ``from a import b`` gives ``a.b``, since b may be a module.
    """
    package = module.split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            found += [(node.lineno, f"{prefix}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            target = node.args[0].value
            if called_name(node) in IMPORT_FUNCTIONS and isinstance(target, str):
                found.append((node.lineno, target.replace(":", ".")))
    return found


def layer_violations(sources: dict[str, str]) -> list[str]:
    """Return one line for every import that points up, and for every import of SGLang outside its layer."""
    wrong = []
    for module, source in sources.items():
        layer = layer_of(module)
        if layer not in RANKS:
            wrong.append(f"{module}: the layer {layer!r} is not in {LAYERS}")
            continue
        for line, target in imported_modules(module, source):
            top, *rest = target.split(".")
            if top == "sglang" and layer != SGLANG_LAYER:
                wrong.append(f"{module}:{line}: imports {target}; only {SGLANG_LAYER} may")
            if top != PACKAGE:
                continue
            # A name of the package that is no layer is one of its own names, such as __version__.
            target_layer = rest[0] if rest and rest[0] in RANKS else ""
            if RANKS[target_layer] > RANKS[layer]:
                wrong.append(
                    f"{module}:{line}: {layer or 'the package'} imports up from {target_layer or 'the package'}"
                )
    return wrong


def room_violations(sources: dict[str, str]) -> list[str]:
    """Return one line for every import between the rooms of the integration that points up."""
    wrong = []
    for module, source in sources.items():
        room, *_ = [*module.split(".")[2:], ""]
        if layer_of(module) != SGLANG_LAYER or room == "__init__":
            continue
        if room not in ROOMS:
            wrong.append(f"{module}: the room {room!r} is not in {ROOMS}")
            continue
        for line, target in imported_modules(module, source):
            other = target.split(".")[2] if target.startswith(f"{PACKAGE}.{SGLANG_LAYER}.") else ""
            if other in ROOMS and ROOMS.index(other) > ROOMS.index(room):
                wrong.append(f"{module}:{line}: {room} imports up from {other}")
    return wrong


def circle(sources: dict[str, str]) -> list[str]:
    """Return a circle of modules that import each other, at any depth and for types too; empty if there is none."""
    names = {module.removesuffix(".__init__"): module for module in sources}
    imports = {}
    for name, module in names.items():
        targets = [target for _, target in imported_modules(module, sources[module])]
        # Of ``from a import b`` the module is a.b or, where b is only a name in it, a.
        found = {target if target in names else target.rpartition(".")[0] for target in targets}
        # A package is imported by whoever imports from it, its own modules among them.
        imports[name] = {target for target in found & names.keys() if not f"{name}.".startswith(f"{target}.")}

    finished: set[str] = set()

    def search(path: list[str]) -> list[str]:
        for target in sorted(imports[path[-1]] - finished):
            if target in path:
                return path[path.index(target) :]
            if wrong := search([*path, target]):
                return wrong
        finished.add(path[-1])
        return []

    return next(filter(None, (search([name]) for name in sorted(names) if name not in finished)), [])


def modules_that_make_hooks(sources: dict[str, str]) -> set[str]:
    """Return the modules that call ``Hook``, by that name or as an attribute of its module."""
    calls = {
        module: [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
        for module, source in sources.items()
    }
    return {module for module, nodes in calls.items() if any(called_name(node) == "Hook" for node in nodes)}


def top_level_names(source: str) -> tuple[set[str], set[str], set[str]]:
    """Return the names a module defines, those it imports (both at its top level), and what its ``__all__`` lists."""
    defined: set[str] = set()
    imported: set[str] = set()
    listed: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {target.id for target in targets if isinstance(target, ast.Name)}
            if "__all__" in names and node.value is not None:
                listed = set(ast.literal_eval(node.value))
            defined |= names - {"__all__"}
    return defined, imported, listed


def unlisted_names(sources: dict[str, str]) -> list[str]:
    """Return one line for every package whose ``__all__`` lists a name it lacks, or lacks a public name it defines.

    A package may import names for its own use. The top package only re-exports, so there an import is public too.
    """
    wrong = []
    for module, source in sources.items():
        if module.endswith(".__init__"):
            defined, imported, listed = top_level_names(source)
            public = {name for name in defined if not name.startswith("_")}
            if module == f"{PACKAGE}.__init__":
                public |= {name for name in imported if not name.startswith("_")}
            if differing := (listed - defined - imported) | (public - listed):
                wrong.append(f"{module}: __all__ and the public names differ in {sorted(differing)}")
    return wrong


def test_imports_point_down_and_only_the_integration_imports_sglang():
    assert layer_violations(package_sources()) == []


def test_the_rooms_of_the_integration_are_entered_in_order():
    assert room_violations(package_sources()) == []
    up = {f"{PACKAGE}.integration.runtime.part": f"def later():\n    import {PACKAGE}.integration.hooks.table"}
    assert room_violations(up) == [f"{PACKAGE}.integration.runtime.part:2: runtime imports up from hooks"]
    assert "not in" in room_violations({f"{PACKAGE}.integration.attic.part": ""})[0]


def test_no_modules_import_each_other_in_a_circle_even_for_types():
    assert circle(package_sources()) == []
    there_and_back = {
        "rkv_sglang.a": "from rkv_sglang import b",
        "rkv_sglang.b": "def later():\n    import rkv_sglang.c.d",
        "rkv_sglang.c.__init__": "",
        "rkv_sglang.c.d": "if TYPE_CHECKING:\n    from rkv_sglang.a import name",
    }
    assert circle(there_and_back) == ["rkv_sglang.a", "rkv_sglang.b", "rkv_sglang.c.d"]


def test_what_goes_to_a_device_goes_where_it_is_seen_to_be_pinned():
    """A copy from other memory is waited for whatever it is asked for, which no test without a GPU would notice."""
    allowed = {f"{PACKAGE}.kernels.transfer", f"{PACKAGE}.algorithm.rope", f"{PACKAGE}.cache.host_copy"}
    assert {name for name, source in package_sources().items() if "non_blocking" in source} == allowed


def test_every_hook_is_made_in_the_room_of_hooks():
    makers = modules_that_make_hooks(package_sources())
    assert makers and all(module.startswith(f"{PACKAGE}.integration.hooks.") for module in makers)
    calls = {"bare": "Hook(1)", "dotted": "hook.Hook(1)", "deep": "x = [a.b.Hook(1)]", "none": "Hook; hook.Hooks(1)"}
    assert modules_that_make_hooks(calls) == {"bare", "dotted", "deep"}


def test_all_holds_exactly_the_public_names():
    assert unlisted_names(package_sources()) == []


def test_every_listed_name_exists():
    import rkv_sglang

    assert [name for name in rkv_sglang.__all__ if not hasattr(rkv_sglang, name)] == []


def test_modules_are_small():
    sizes = {module: len(source.splitlines()) for module, source in package_sources().items()}
    assert {module: size for module, size in sizes.items() if size > MOST_LINES} == {}


def test_folders_are_small():
    folders = Counter(path.parent for path in (ROOT / PACKAGE).rglob("*.py") if path.name != "__init__.py")
    assert {str(folder): count for folder, count in folders.items() if count > MOST_MODULES} == {}


def test_docstrings_of_modules_lead_with_a_noun_or_a_verb():
    first_words = {
        module: (ast.get_docstring(ast.parse(source)) or "-").split()[0] for module, source in package_sources().items()
    }
    questions = {"What", "Which", "Who", "How", "When", "Where", "Whether", "Within"}
    assert {module: word for module, word in first_words.items() if word in questions} == {}


def test_the_pins_of_sglang_agree():
    files = [ROOT / "pyproject.toml"]
    for folder in ("tests", "devtools"):
        files += [*(ROOT / folder).rglob("requirements*.txt"), *(ROOT / folder).rglob("setup.py")]
    pins = {
        (path.name, version) for path in files for version in re.findall(r"\bsglang[>=]=([\d.]+\d)", path.read_text())
    }
    pins |= {("patches", path.parent.name) for path in (ROOT / "patches").glob("*/*.patch")}
    assert {name for name, _ in pins} >= {"pyproject.toml", "requirements-cpu-nodeps.txt", "setup.py", "patches"}
    assert {version for _, version in pins} == set(SUPPORTED_SGLANG)
    # What pip may take: no release after it.
    *major, patch = map(int, max(SUPPORTED_SGLANG).split("."))
    assert f',<{".".join(map(str, [*major, patch + 1]))}"' in files[0].read_text()


def heavy_imports(statement: str) -> tuple[str, int]:
    """Run a statement in a process of its own; return the engine and GPU code it imported, and its exit status."""
    code = f"""
import atexit, sys
atexit.register(lambda: print(sorted({{'sglang', 'torch', 'triton'}} & sys.modules.keys())))
{statement}"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    return done.stdout.splitlines()[-1] if done.stdout else done.stderr, done.returncode


def test_importing_the_package_imports_no_engine_and_no_gpu_code():
    assert heavy_imports("import rkv_sglang") == ("[]", 0)


def test_the_arithmetic_of_sizes_imports_no_engine_and_no_gpu_code():
    modules = [module for module in package_sources() if layer_of(module) in ("config", "sizes", "plan_command")]
    assert len(modules) > 6
    names = ", ".join(module.removesuffix(".__init__") for module in modules)
    assert heavy_imports(f"import {names}") == ("[]", 0)


@pytest.mark.parametrize(
    "argv",
    [["--help"], ["doctor", "--help"], ["patch", "--help"], ["view", "--help"], ["prefix", "--help"], ["--version"]],
)
def test_the_command_shows_its_help_without_engine_and_gpu_code(argv: list[str]):
    assert heavy_imports(f"from rkv_sglang.cli import main; main({argv})") == ("[]", 0)


IMPORT_STYLES = (
    "import rkv_sglang.{layer}.part",
    "import rkv_sglang.{layer}.part as other",
    "from rkv_sglang import {layer}",
    "from rkv_sglang.{layer} import part",
    "from rkv_sglang.{layer}.part import name as other",
    "from .. import {layer}",
    "from ..{layer} import part",
    "def later():\n    from rkv_sglang.{layer} import part",
    "if TYPE_CHECKING:\n    import rkv_sglang.{layer}",
    "importlib.import_module('rkv_sglang.{layer}.part')",
)


@settings(deadline=None)
@given(st.sampled_from(LAYERS), st.sampled_from(LAYERS), st.sampled_from(IMPORT_STYLES))
def test_the_check_finds_exactly_the_imports_that_point_up(importer: str, imported: str, style: str):
    sources = {f"{PACKAGE}.{importer}.some_module": style.format(layer=imported)}
    points_up = LAYERS.index(imported) > LAYERS.index(importer)
    assert len(layer_violations(sources)) == points_up


@settings(deadline=None)
@given(
    st.sampled_from(LAYERS),
    st.sampled_from(
        [
            "import sglang",
            "import sglang.srt.utils as utils",
            "from sglang.srt import server_args",
            "def later():\n    import sglang",
            "importlib.import_module('sglang.srt')",
            "pkgutil.resolve_name('sglang.srt.server_args:ServerArgs')",
        ]
    ),
)
def test_the_check_finds_sglang_everywhere_but_in_the_integration(layer: str, statement: str):
    assert len(layer_violations({f"{PACKAGE}.{layer}.some_module": statement})) == (layer != SGLANG_LAYER)


@pytest.mark.parametrize("innocent", ["import rkv_sglang_tools", "import sglangish", "import torch", "'sglang.srt'"])
def test_the_check_leaves_other_names_alone(innocent: str):
    assert layer_violations({f"{PACKAGE}.config": innocent}) == []


def test_the_checks_report_a_new_layer_an_unlisted_name_and_the_package_in_its_own_settings():
    assert "not in" in layer_violations({f"{PACKAGE}.extras.tool": ""})[0]
    assert layer_violations({f"{PACKAGE}.config": "from rkv_sglang import __version__"}) != []
    source = textwrap.dedent(
        """
        from rkv_sglang.config import PolicyConfig, POLICY_NAMES
        import os as _os
        __all__ = ["PolicyConfig", "Missing"]
        __version__ = "1"
        def helper(): ...
        """
    )
    (top,) = unlisted_names({f"{PACKAGE}.__init__": source})
    assert "['Missing', 'POLICY_NAMES', 'helper']" in top
    (inner,) = unlisted_names({f"{PACKAGE}.cache.__init__": source})
    assert "['Missing', 'helper']" in inner
