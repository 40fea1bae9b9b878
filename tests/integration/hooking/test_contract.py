"""The contract names every place where the package touches SGLang, and every difference from it is found and judged."""

import ast
import copy
import dataclasses
import random
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from devtools import contract as maker
from rkv_sglang import cli
from rkv_sglang.integration.hooking import releases
from rkv_sglang.integration.hooking.contract import Contract, Finding, make_contract
from rkv_sglang.integration.hooking.definitions import Definitions
from rkv_sglang.integration.hooking.releases import SUPPORTED_SGLANG, judge
from rkv_sglang.integration.hooking.shapes import bare_parameters, body_hash, parameters_differ
from rkv_sglang.integration.hooking.sources import Sources, without_collector
from rkv_sglang.integration.hooks import processes, steps
from rkv_sglang.integration.hooks.table import HOOKS
from rkv_sglang.integration.startup.errors import RefusedError
from rkv_sglang.integration.startup.server_args import RKVServerArgs
from rkv_sglang.patching.folders import installed_folder, unpacked_folder
from tests.integration.hooking.touch_points import Place, touch_points
from tests.test_layering import heavy_imports, package_sources

CONTRACT = Contract.load()
SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
TARGETS = [hook.target for hook in HOOKS]


@pytest.fixture(scope="module")
def sources() -> Iterator[Sources]:
    """The installed SGLang's, every file of the contract read; tests change the trees and put them back."""
    folder = installed_folder()
    assert folder is not None
    with without_collector():
        read = Sources(folder)
        assert CONTRACT.findings(read) == []
    yield read


def only(name: str) -> Contract:
    """The contract of one name."""
    parts = {
        field: {key: value for key, value in getattr(CONTRACT, field).items() if key == name}
        for field in ("names", "parameters", "functions")
    }
    return dataclasses.replace(CONTRACT, **parts)


def function_of(sources: Sources, name: str) -> ast.FunctionDef:
    found = Definitions(sources).find(name)
    assert found is not None and isinstance(found.node, ast.FunctionDef | ast.AsyncFunctionDef), name
    return found.node


# Every touch point is in the contract.


Touched = tuple[list[Place], list[Place]]


@pytest.fixture(scope="module")
def own_touch_points() -> Touched:
    modules = package_sources()
    return touch_points({name: text for name, text in modules.items() if name.startswith("rkv_sglang.integration.")})


def unlisted(touched: list[Place], gaps: list[Place]) -> list[str]:
    """Return one line for every touch point that no hook lists, and for every gap in what is known."""
    listed = {name for hook in HOOKS for name in (hook.target, *hook.uses)}
    lines = [f"{place.where}: {place.name}" for place in gaps]
    for place in touched:
        # Of a class or module that is imported, an attribute may stand in the table.
        if place.name not in listed and not any(name.startswith(f"{place.name}.") for name in listed):
            lines.append(f"{place.where}: add {place.name} to the `uses` of the hook that gets there (hooks/*.py)")
    return lines


def test_every_place_where_the_package_touches_sglang_is_in_the_table_of_hooks(own_touch_points: Touched):
    assert len(own_touch_points[0]) > 400
    problems = unlisted(*own_touch_points)
    assert problems == [], "\n" + "\n".join([*problems, "then run: python -m devtools.contract"])


def test_what_the_table_lists_is_touched(own_touch_points: Touched):
    touched = {place.name for place in own_touch_points[0]}
    used = {name for hook in HOOKS for name in hook.uses} - {hook.target for hook in HOOKS}
    # What a class shares with another, or takes as an argument, is touched under that name.
    text = "\n".join(package_sources().values())
    assert {name for name in used - touched if not re.search(rf"[.(, ]{name.rpartition('.')[2]}\b", text)} == set()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("req.brand_new = 1", "schedule_batch.Req.brand_new to the `uses`"),
        ("x = [other.kv.brand_new for other in batch.reqs]", "ReqKvInfo.brand_new to the `uses`"),
        ("getattr(scheduler.tree_cache, 'brand_new', None)", "UnifiedRadixCache.brand_new to the `uses`"),
        ("scheduler.tree_cache.page_size.bit_length()", "say in OWNERS, PLAIN or VALUES"),
        ("stranger.touched", "what 'stranger' is, or annotate it"),
        ("from sglang.srt.managers import brand_new", "add sglang.srt.managers.brand_new to"),
        ("x = os.environ['SGLANG_BRAND_NEW']", "envs.SGLANG_BRAND_NEW to the `uses`"),
        ("found=_is_on('brand_new')", "ServerArgs.brand_new to the `uses`"),
        ("scheduler.server_args.brand_new", "ServerArgs.brand_new to the `uses`"),
        ("get_runtime().parts.scheduler.brand_new()", "Scheduler.brand_new to the `uses`"),
        ("class PolicyPrefillAdder(base):\n  def brand_new(self): ...", "PrefillAdder.brand_new to the `uses`"),
        ("class PolicyPrefillAdder(base):\n  def add_one_req(self): return self.brand_new", "PrefillAdder.brand_new"),
        ("class Other(scheduler_class): ...", "say in SUBCLASSES"),
    ],
)
def test_a_new_touch_point_is_named_with_what_to_write_where(line: str, words: str):
    body = line.replace("\n", "\n    ")
    source = "import os\nfrom rkv_sglang.runtime.current import get_runtime\n"
    source += f"def later(scheduler: Any, req: Any, batch: Any, stranger: Any) -> None:\n    {body}"
    problems = unlisted(*touch_points({"rkv_sglang.integration.runtime.later": source}))
    assert problems and words in problems[0] and problems[0].startswith("rkv_sglang/integration/runtime/later.py:")


def test_the_contract_is_that_of_the_table_and_of_the_installed_sglang():
    assert maker.main(["--check"]) == 0, "run: python -m devtools.contract"
    assert SUPPORTED_SGLANG[-1] == CONTRACT.sglang
    assert set(TARGETS) <= CONTRACT.names.keys() and len(set(TARGETS)) == len(TARGETS)
    assert all(hook.why and hook.upstream for hook in HOOKS)


def test_the_signatures_of_the_table_are_those_of_the_installed_sglang(sources: Sources):
    for hook in HOOKS:
        if hook.target in CONTRACT.parameters:
            found = bare_parameters(function_of(sources, hook.target))
            assert found.replace("(cls, ", "(") == hook.signature, hook.target


def test_a_hook_that_names_a_parameter_otherwise_is_refused():
    def hook(_: None, scheduler: object, request: object) -> None: ...

    row = dataclasses.replace(HOOKS[0], kind="AFTER", function=hook, target="m.f")
    target = ast.parse("def f(self, req): ...").body[0]
    assert isinstance(target, ast.FunctionDef)
    with pytest.raises(ValueError, match=r"name them as SGLang does, \['self', 'req'\]"):
        maker.used_parameters(row, target)


# Every difference is found.


def occurrences(sources: Sources) -> dict[str, list[tuple[ast.AST, str]]]:
    """Return, by identifier, every place in the trees that bears it."""
    places = defaultdict(list)
    # A name that is found nowhere has every base of its class read.
    definitions = Definitions(sources)
    for owner in {name.rpartition(".")[0] for name in CONTRACT.names}:
        assert definitions.find(f"{owner}.no_such_name") is None
    for file in sorted(sources.read):
        module = ".".join(["sglang", *Path(file).with_suffix("").parts]).removesuffix(".__init__")
        tree = sources.tree_of(module)
        assert tree is not None
        for node in ast.walk(tree):
            for field in ("name", "id", "attr", "arg", "asname"):
                if isinstance(value := getattr(node, field, None), str):
                    # An import by its last part.
                    places[value.rpartition(".")[2]].append((node, field))
    return places


def test_each_touch_point_that_sglang_renames_is_found_missing_by_its_name(sources: Sources):
    places = occurrences(sources)
    not_found = []
    for name in CONTRACT.names:
        last = name.rpartition(".")[2]
        before = [(node, field, getattr(node, field)) for node, field in places[last]]
        assert before, name
        for node, field, value in before:
            setattr(node, field, f"{value}_renamed")
        # The name of a module is that of its file.
        findings = only(name).findings(sources)
        for node, field, value in before:
            setattr(node, field, value)
        if [(finding.kind, finding.name, finding.breaks) for finding in findings] != [("missing", name, True)]:
            not_found.append(name)
    assert not_found == [] and len(CONTRACT.names) > 250
    assert CONTRACT.findings(sources) == []


@pytest.mark.parametrize("target", sorted(CONTRACT.parameters))
def test_of_every_hooked_function_a_used_parameter_and_the_body_are_watched(target: str, sources: Sources, seed: int):
    function = function_of(sources, target)
    arguments, body = copy.deepcopy(function.args), list(function.body)

    def judged() -> tuple[str, bool, bool]:
        """Return the first finding's kind, whether a release is refused for it, and whether a local version is."""
        findings = only(target).findings(sources)
        versions = (CONTRACT.sglang, f"{CONTRACT.sglang}+own")
        refused = [judge(one, findings, allow_untested=False).problem is not None for one in versions]
        assert all(finding.name == target for finding in findings)
        return findings[0].kind if findings else "", refused[0], refused[1]

    try:
        assert judged() == ("", False, False)
        function.body.append(ast.Pass())
        assert judged() == ("changed", False, True)
        function.body[:] = body
        used = parameters_of(CONTRACT.parameters[target])
        renamed = random.Random(seed).choice(used) if used else None
        for argument in [*function.args.args, *function.args.kwonlyargs]:
            if argument.arg == renamed:
                argument.arg = f"{renamed}_renamed"
                assert judged() == ("changed", True, True)
                argument.arg = renamed
        # A further one with a default is the hook's matter only if it takes no others.
        function.args.kwonlyargs.append(ast.arg(arg="brand_new"))
        function.args.kw_defaults.append(ast.Constant(value=None))
        is_closed = "**kwargs" not in CONTRACT.parameters[target]
        assert judged() == ("changed", is_closed, True)
    finally:
        function.args, function.body = arguments, body
    assert judged() == ("", False, False)


def parameters_of(text: str) -> list[str]:
    function = ast.parse(f"def f{text}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    return [one.arg for one in [*function.args.args, *function.args.kwonlyargs] if one.arg not in ("self", "cls")]


@pytest.mark.parametrize(
    ("used", "found", "differs"),
    [
        ("(self, a, *args, **kwargs)", "(self, a, b, c=1, *, d, e=2)", False),
        ("(self, a, *args, **kwargs)", "(self, b, a)", True),
        ("(self, a, *args, **kwargs)", "(self, a=None)", True),
        ("(self, a)", "(self, a)", False),
        ("(self, a)", "(self, a, b=None)", True),
        ("(self, a)", "(self, a, *, b=None)", True),
        ("(self, a=1)", "(self, a=1)", False),
        ("(self, a=1)", "(self, a=2)", True),
        ("(*, a, **kwargs)", "(*, b=1, a)", False),
        ("(*, a, **kwargs)", "(*, b=1)", True),
        ("(*, a, **kwargs)", "(a)", True),
        ("(*args, **kwargs)", "(anything, at, all=1)", False),
        ("()", "(*args)", True),
        ("()", "(**kwargs)", True),
    ],
)
def test_only_the_parameters_that_a_hook_uses_are_compared(used: str, found: str, differs: bool):
    function = ast.parse(f"def f{found}: ...").body[0]
    assert isinstance(function, ast.FunctionDef)
    assert parameters_differ(used, function) == differs


def test_comments_docstrings_and_layout_are_not_part_of_a_body_and_all_else_is():
    plain = "def f(a, b=1):\n    def g():\n        return a\n    return g() + b * 2.0"
    same = (
        "def f(a,   b = 1):\n    'says'\n    # why\n    def g():\n        '''and more'''\n        return (a)\n\n\n"
        "    return (g() + (b * 2.0))"
    )
    others = [plain.replace("2.0", "2"), plain.replace("b=1", "b=2"), plain.replace("+", "-"), f"@o\n{plain}"]
    others += [f"async {plain}", plain.replace("return a", "'text'; return 'a'"), plain.replace("(a, ", "(a: int, ")]

    def hash_of(text: str) -> str:
        node = ast.parse(text).body[0]
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        return body_hash(node)

    assert hash_of(plain) == hash_of(same)
    assert len({hash_of(text) for text in [plain, *others]}) == len(others) + 1


# A package of a few lines, in every way in which SGLang defines names.

SMALL = {
    "__init__.py": "",
    "srt/base.py": (
        "class Base:\n    kind: int = 1\n    def __init__(self):\n        if self:\n            self.depth, x = 1, 2\n"
    ),
    "srt/star.py": "from sglang.srt.base import *\nLIMIT = 3",
    "srt/part.py": (
        "from .base import Base as Root\nimport sglang.srt.base as b\n"
        "class Part(Root, list):\n    def work(self, a):\n        with open(a) as self.file: pass\n"
        "    @property\n    def size(self): return 1\n"
        "Alias = Part\nPart.late = 4\nthing = Part()\n"
        "try:\n    from .star import LIMIT\nexcept ImportError:\n    LIMIT = 0\n"
    ),
    "srt/loop.py": "from .pool import ring\n",
    "srt/pool.py": "from .loop import ring\n",
}


@pytest.fixture
def small(tmp_path: Path) -> Path:
    for name, text in SMALL.items():
        file = tmp_path / "sglang" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "sglang"


def test_names_are_found_through_bases_aliases_imports_stars_and_self(small: Path):
    definitions = Definitions(Sources(small))
    there = ["Part", "Part.work", "Part.file", "Part.size", "Part.kind", "Part.depth", "Part.late", "Root.depth"]
    there += ["Alias.work", "thing.depth", "LIMIT", "b.Base.kind"]
    assert [name for name in there if definitions.find(f"sglang.srt.part.{name}") is None] == []
    assert definitions.find("sglang.srt.star.Base.depth") is not None
    gone = ["part.Part.x", "part.Part.a", "part.nothing", "part.LIMIT.x", "star.kind", "nowhere.Part", "loop.ring"]
    assert [name for name in gone if definitions.find(f"sglang.srt.{name}") is not None] == []
    assert definitions.find("othersglang.srt.part") is None


def test_an_untouched_tree_is_seen_at_once_and_a_touched_one_is_looked_through(
    small: Path, monkeypatch: pytest.MonkeyPatch
):
    names = dict.fromkeys(("sglang.srt.part.Part.work", "sglang.srt.part.LIMIT"), "a test")
    contract = make_contract("1.0", names, {"sglang.srt.part.Part.work": "(self, a)"}, [], Sources(small))
    assert contract.files.keys() == {"srt/part.py"}
    # Nothing is parsed.
    with monkeypatch.context() as patch:
        patch.setattr(Contract, "findings", None)
        assert contract.check(small) == []
    file = small / "srt" / "part.py"
    file.write_text(f"# touched\n{SMALL['srt/part.py']}")
    assert contract.check(small) == []
    file.write_text(SMALL["srt/part.py"].replace("def work(self, a)", "def work(self)").replace("LIMIT", "MOST"))
    found = [str(finding) for finding in contract.check(small)]
    assert found == [
        "missing sglang.srt.part.LIMIT: used by a test",
        "changed sglang.srt.part.Part.work: its parameters are (self), and its hook uses (self, a)",
        "changed sglang.srt.part.Part.work: its body is not that of 1.0",
    ]
    file.write_text("def broken(:")
    assert {finding.kind for finding in contract.check(small)} == {"missing"}
    shutil.rmtree(small / "srt")
    assert len([finding for finding in contract.check(small) if finding.breaks]) == 2
    with pytest.raises(ValueError, match="named as a surrounding function, is no function"):
        make_contract("1.0", names, {}, ["sglang.srt.part.gone"], Sources(small))


# Every difference is judged.

GONE = Finding("missing", "sglang.a.b", "used by c", breaks=True)
READS_OTHERWISE = Finding("changed", "sglang.a.f", "its body is not that of 0.5.23", breaks=False)


@pytest.mark.parametrize(
    ("installed", "findings", "allowed", "outcome"),
    [
        ("0.5.23", [], False, "served"),
        ("0.5.23+cu130", [], False, "served"),
        ("0.5.23.post1", [], False, "served"),
        ("0.5.23.post1+cu130.abc", [], False, "served"),
        ("0.5.23.dev4+g123", [], False, "refused"),
        ("0.5.23rc1", [], False, "refused"),
        ("0.5.24", [], False, "refused"),
        ("0.5.24", [], True, "warned"),
        ("0.5.2", [], False, "refused"),
        ("0.5.230", [], False, "refused"),
        ("unknown", [], False, "refused"),
        ("0.5.23", [READS_OTHERWISE], False, "warned"),
        ("0.5.23+cu130", [READS_OTHERWISE], False, "refused"),
        ("0.5.23+cu130", [READS_OTHERWISE], True, "warned"),
        ("0.5.23.post1", [READS_OTHERWISE], False, "refused"),
        ("0.5.24.dev4", [READS_OTHERWISE], True, "warned"),
        ("0.5.24", [READS_OTHERWISE], False, "refused"),
        ("0.5.23", [GONE], False, "refused"),
        ("0.5.23", [GONE], True, "refused"),
        ("0.5.24.dev4", [GONE, READS_OTHERWISE], True, "refused"),
    ],
)
def test_a_version_and_what_differs_in_it_are_served_warned_of_or_refused(
    installed: str, findings: list[Finding], allowed: bool, outcome: str
):
    verdict = judge(installed, findings, allow_untested=allowed)
    said = verdict.problem or verdict.warning
    assert outcome == ("refused" if verdict.problem else "warned" if verdict.warning else "served")
    assert said is None or ("\n" not in said and said.startswith(f"SGLang {installed} "))
    if verdict.problem:
        assert "install sglang==0.5.23" in said
        # What cannot work is not offered to be allowed.
        assert ("RKV_SGLANG_ALLOW_UNTESTED=1" in said) == (GONE not in findings)


def test_a_server_with_another_sglang_is_refused_before_its_flags_are_looked_at(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RKV_SGLANG_ALLOW_UNTESTED", "1")
    monkeypatch.setattr(steps, "_refuse_flags", lambda args: pytest.fail("looked at the flags"))
    monkeypatch.setattr(releases, "findings_in", lambda folder: (GONE,))
    args = RKVServerArgs(model_path="dummy", kv_policy="rkv")
    with pytest.raises(RefusedError, match=r"lacks 1 thing .*first: missing sglang\.a\.b"):
        steps.refuse_early(args, lambda args: None)
    steps.refuse_early(RKVServerArgs(model_path="dummy"), lambda args: None)


@pytest.mark.parametrize("process", ["scheduler", "tokenizer", "launcher"])
def test_with_another_sglang_no_process_applies_a_hook(monkeypatch: pytest.MonkeyPatch, process: str):
    monkeypatch.setattr(releases, "findings_in", lambda folder: (GONE,))
    monkeypatch.setattr(processes, "install", lambda hooks: pytest.fail("a hook was applied"))
    args = RKVServerArgs(model_path="dummy", kv_policy="rkv")
    start = {
        "scheduler": lambda: processes.start_scheduler(lambda *given: pytest.fail("it was built"), None, args),
        "tokenizer": processes.install_answer_hooks,
        "launcher": processes.check_before_launch,
    }[process]
    with pytest.raises((RuntimeError, RefusedError), match=r"lacks 1 thing .*first: missing sglang\.a\.b"):
        start()


def test_what_reads_otherwise_is_warned_of_and_served_if_the_user_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(releases, "findings_in", lambda folder: (READS_OTHERWISE,))
    monkeypatch.setattr(releases, "version", lambda package: "0.5.23+own")
    args = RKVServerArgs(model_path="dummy", kv_policy="rkv")
    for value in ("", "0", "true"):
        monkeypatch.setenv("RKV_SGLANG_ALLOW_UNTESTED", value)
        with pytest.raises(RefusedError, match="read otherwise"):
            steps.refuse_early(args, lambda args: None)
    monkeypatch.setenv("RKV_SGLANG_ALLOW_UNTESTED", "1")
    steps.refuse_early(args, lambda args: None)
    assert [record.levelname for record in caplog.records if "allowed by RKV_SGLANG" in record.message] == ["WARNING"]


# The command.


def test_the_command_reads_an_sglang_and_imports_none():
    assert heavy_imports("from rkv_sglang.cli import main; main(['doctor', '--contract'])") == ("[]", 0)


def test_the_command_prints_each_difference_in_a_folder(small: Path, capsys: pytest.CaptureFixture[str]):
    assert unpacked_folder(small) == unpacked_folder(small.parent) == small
    (small.parent / "sglang-0.5.23+own.dist-info").mkdir()
    assert cli.main(["doctor", "--contract", str(small.parent)]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) >= len(CONTRACT.names)
    assert all(line.startswith(("missing sglang.", "changed sglang.")) for line in lines)
    assert "looked up in 0.5.23+own: SGLang 0.5.23+own lacks" in last
    assert cli.main(["doctor", "--contract", str(small / "srt")]) == 1
    assert capsys.readouterr().out.startswith("there is no sglang in ")


def test_the_command_asks_one_question_at_a_time(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["doctor", "--contract", "--plan"]) == 1
    assert capsys.readouterr().err == "--plan and --contract are 2 questions: ask one at a time\n"
