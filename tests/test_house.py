"""The rooms beside the package: who may import whom, how full a folder may be, what is said once."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

from rkv_sglang.integration.hooking.releases import SUPPORTED_SGLANG
from tests.test_layering import imported_modules

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, TOOLS, BENCHMARKS, TESTS = "rkv_sglang", "devtools", "benchmarks", "tests"
# A tool among the tests.
SEARCH = "tests/fuzz"
# Which of them each may import, itself included; the package's own layers are another test's.
MAY_IMPORT = {
    PACKAGE: {PACKAGE},
    TOOLS: {TOOLS, PACKAGE},
    BENCHMARKS: {BENCHMARKS, TOOLS, PACKAGE},
    TESTS: {TESTS, BENCHMARKS, TOOLS, PACKAGE},
}
# What a folder of benchmarks may use of its neighbours.
SHARED = "common"
MOST_MODULES = 12
MOST_LINES = 300


def sources(room: str) -> dict[str, str]:
    """Return every module of a room by its dotted name."""
    files = sorted((ROOT / room).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text() for path in files}


def room_violations(modules: dict[str, str]) -> list[str]:
    """Return one line for every import of a room that the importing module's room may not use."""
    wrong = []
    for module, source in modules.items():
        room = module.split(".")[0]
        for line, target in imported_modules(module, source):
            top = target.split(".")[0]
            if top in MAY_IMPORT and top not in MAY_IMPORT[room]:
                wrong.append(f"{module}:{line}: {room} imports {target}")
    return wrong


def neighbour_violations(modules: dict[str, str]) -> list[str]:
    """Return one line for every import of one benchmark's folder by another's, ``common`` left out.

    A benchmark of one file uses ``common`` as well, but for the runner of all of them.
    """
    folders = {module.split(".")[1] for module in modules if module.count(".") > 1}
    wrong = []
    for module, source in modules.items():
        own = module.split(".")[1]
        for line, target in imported_modules(module, source):
            parts = target.split(".")
            if parts[0] == BENCHMARKS and len(parts) > 1 and parts[1] not in (own, SHARED):
                what = "folder" if parts[1] in folders else "file"
                wrong.append(f"{module}:{line}: imports {target}, another benchmark's {what}")
    return wrong


def test_no_room_imports_one_above_it():
    found = [line for room in MAY_IMPORT for line in room_violations(sources(room))]
    assert found == []


def test_benchmarks_import_only_themselves_and_what_they_share():
    assert neighbour_violations(sources(BENCHMARKS)) == []


def test_the_checks_find_what_is_forbidden():
    modules = {
        "benchmarks.serving.run": "from tests.support import harness\nfrom benchmarks.quality.run import Study",
        "benchmarks.quality.run": "from benchmarks.common.schema import Row\nimport devtools.launch",
        "benchmarks.memory": "def later():\n    from benchmarks.idle_cost import SETTINGS",
        "devtools.launch": "import benchmarks.common",
    }
    assert len(room_violations(modules)) == 2
    del modules["devtools.launch"]
    assert [line.split(":")[0] for line in neighbour_violations(modules)] == [
        "benchmarks.serving.run",
        "benchmarks.memory",
    ]


@pytest.mark.parametrize("room", [BENCHMARKS, TOOLS, SEARCH])
def test_no_folder_is_crowded(room: str):
    folders: dict[str, int] = {}
    for path in (ROOT / room).rglob("*.py"):
        folders[str(path.parent.relative_to(ROOT))] = folders.get(str(path.parent.relative_to(ROOT)), 0) + 1
    assert {folder: count for folder, count in folders.items() if count > MOST_MODULES} == {}


@pytest.mark.parametrize("room", [TOOLS, SEARCH])
def test_modules_of_tools_are_small(room: str):
    sizes = {module: len(source.splitlines()) for module, source in sources(room).items()}
    assert {module: size for module, size in sizes.items() if size > MOST_LINES} == {}


def test_names_that_benchmarks_share_are_said_once():
    # Each of these once stood in several of them.
    defined: dict[str, list[str]] = {"NO_POLICY": [], "Setting": [], "SMALL_MODEL": [], "parse_setting": []}
    for module, source in sources(BENCHMARKS).items():
        for node in ast.parse(source).body:
            names = [target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)]
            names += [node.name] if isinstance(node, ast.ClassDef | ast.FunctionDef) else []
            for name in defined.keys() & set(names):
                defined[name].append(module)
    assert defined == {
        "NO_POLICY": [],
        "Setting": ["benchmarks.common.settings"],
        "SMALL_MODEL": ["benchmarks.common.arguments"],
        # The serving benchmark knows two settings more.
        "parse_setting": ["benchmarks.common.settings", "benchmarks.serving.servers"],
    }


def test_servers_are_spoken_to_in_one_place_that_needs_no_proxy_for_this_machine():
    own, clients = "rkv_sglang.client.http", {"urllib.request", "http.client", "requests", "httpx", "urllib3"}
    for room in (TOOLS, PACKAGE, BENCHMARKS):
        for module, source in sources(room).items():
            imported = {target for _, target in imported_modules(module, source)}
            assert (module == own) == bool(imported & clients), module
            # An aiohttp session looks at no proxy unless it is told to.
            assert "trust_env" not in source, module


def test_nothing_else_names_another_version_of_sglang():
    (supported,) = SUPPORTED_SGLANG
    for room in (TOOLS, PACKAGE, BENCHMARKS):
        for module, source in sources(room).items():
            named = set(re.findall(r"(?:SGLang |sglang==)(\d+\.\d+\.\d+)", source))
            assert named <= {supported}, module


def test_the_extras_and_the_set_up_name_the_same_tools():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    name = re.compile(r"^[\w-]+")
    named = {name.match(line)[0] for lines in extras.values() for line in lines} - {"rkv-sglang", "sglang"}
    tools = (ROOT / "devtools" / "env" / "requirements-tools.txt").read_text().splitlines()
    # The package itself asks for tqdm.
    assert named == {name.match(line)[0] for line in tools if not line.startswith("#")} - {"tqdm"}
    assert extras["dev"][0] == "rkv-sglang[tests,benchmarks]"
