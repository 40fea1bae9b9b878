"""Tables of the pages say what the code says: flags, fields, series, policies, refusals, messages, hooks."""

import argparse
import ast
import fnmatch
import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from benchmarks.common.registry import BENCHMARKS
from rkv_sglang.config import POLICY_FIELD
from rkv_sglang.integration.hooks import answers
from rkv_sglang.integration.hooks.table import HOOKS
from rkv_sglang.integration.runtime import metrics, requests
from rkv_sglang.integration.startup import refusals
from rkv_sglang.integration.startup.refused_settings import REFUSED_SETTINGS
from rkv_sglang.integration.startup.server_args import GROUP_TITLE, RKVServerArgs
from rkv_sglang.policies import POLICIES, ScoreInputs
from rkv_sglang.policy_names import BLIND_NAMES
from tests.docs.pages import README, ROOT, fences, page, spans, table

CONFIGURATION, COMPATIBILITY = page("docs/configuration.md"), page("docs/compatibility.md")

SERVED_BLINDLY = "served by " + ", ".join(f"`{name}`" for name in BLIND_NAMES)


@pytest.fixture(scope="module")
def options() -> list[argparse.Action]:
    """The policy's options as SGLang's parser gets them."""
    parser = argparse.ArgumentParser()
    RKVServerArgs.add_cli_args(parser)
    (group,) = [group for group in parser._action_groups if group.title == GROUP_TITLE]
    return group._group_actions


def shown_default(option: argparse.Action) -> str:
    """Return the default that ``--help`` shows; what has two spellings is parsed to None where it is not given."""
    found = re.search(r"Default: (.*)\.$", option.help or "")
    assert found is not None
    return "off" if found[1] == "False" else found[1]


def test_the_table_of_flags_is_that_of_the_parser(options: list[argparse.Action]) -> None:
    rows = table(CONFIGURATION, "flag", "default", "meaning")
    documented = [(spans(spelled), default.strip("`")) for spelled, default, _ in rows]
    assert documented == [(list(option.option_strings), shown_default(option)) for option in options]


def test_the_readmes_flags_are_among_them(options: list[argparse.Action]) -> None:
    rows = table(README.read_text(), "flag", "default", "meaning")
    defaults = {option.option_strings[0]: shown_default(option) for option in options}
    assert len(rows) == 4
    assert [default.strip("`") for _, default, _ in rows] == [defaults[spans(flag)[0]] for flag, _, _ in rows]


def test_the_table_of_custom_params_has_every_field() -> None:
    text = "".join(row[0] for row in table(CONFIGURATION, "`custom_params`"))
    named = {value for name, value in vars(requests).items() if name.endswith("_FIELD")}
    assert POLICY_FIELD in named and set(re.findall(r'"(\w+)":', text)) == named


def test_the_table_of_meta_info_has_every_field() -> None:
    rows = table(page("docs/observability.md"), "field", "meaning")
    assert [row[0].strip("`") for row in rows] == list(answers.KEYS)
    assert f"`{answers.TRACE_KEY}`" in page("docs/observability.md")


def test_the_table_of_series_has_every_metric_with_its_type() -> None:
    kinds = {f"{name}_total": "counter" for name in metrics.COUNTERS}
    kinds |= dict.fromkeys(metrics.GAUGES, "gauge") | {metrics.SECONDS[0]: "histogram"}
    rows = table(page("docs/observability.md"), "series", "type")
    assert {row[0].strip("`"): row[1] for row in rows} == {metrics.PREFIX + name: kind for name, kind in kinds.items()}


def test_the_table_of_policies_has_each_with_its_parameters_and_its_source() -> None:
    rows = table(page("docs/policies.md"), "policy", "keeps", "parameters", "source")
    assert [row[0].strip("`") for row in rows] == list(POLICIES)
    for name, _, parameters, source in rows:
        policy_class = POLICIES[name.strip("`")]
        assert spans(parameters) == [field.name for field in fields(policy_class)]  # type: ignore[arg-type]
        number = re.search(r"abs/([\d.]+)\)", source)
        assert (number is None) == (name == "`random`")
        assert number is None or number[1] in (inspect.getdoc(policy_class) or "")


def test_the_policies_named_with_the_flag_are_those_there_are() -> None:
    (row,) = [row for row in table(CONFIGURATION, "flag", "default") if "`--kv-policy`" in row[0]]
    assert set(spans(row[2])) == {"none", *POLICIES}


def test_the_example_of_a_policy_scores() -> None:
    (code,) = fences(page("docs/policies.md"), "python")
    names: dict[str, type] = {}
    exec(code, names)
    inputs = ScoreInputs(queries=torch.randn(4, 4, 8), keys=torch.randn(20, 2, 8), prompt_len=3)
    scores = names["EveryNth"](stride=3).score(inputs)
    assert scores.shape == (2, 16) and scores.dtype == torch.float32


def test_the_table_of_refusals_is_that_of_the_code() -> None:
    expected = [
        [
            f"`{refusal.setting}`",
            "refused",
            SERVED_BLINDLY if refusal.records_only else "refused",
            refusal.why,
            refusal.mend or ("leave it out" if refusal.setting.startswith("--") else "unset it"),
        ]
        for refusal in REFUSED_SETTINGS
    ]
    assert table(COMPATIBILITY, "setting", "`head`", "`request`", "why", "mend") == expected


def texts_of(source: str) -> list[str]:
    """Return the string constants of a source; the parts of f-strings are joined by ``...``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
            found.append("".join(map(str, parts)))
    return found


def matches(message: str, text: str) -> bool:
    """Return whether a message of a page, ``...`` standing for anything, can be what a text of the code becomes."""
    pieces = [piece for piece in (part.strip() for part in message.split("...")) if piece]
    if not pieces:
        return False
    where = 0
    for piece in pieces:
        where = text.find(piece, where)
        if where < 0:
            return False
        where += len(piece)
    return True


def test_the_table_of_refused_models_has_every_reason() -> None:
    documented = [row[1:] for row in table(COMPATIBILITY, "refused", "`head`", "`request`", "reason in the message")]
    tree = ast.parse(inspect.getsource(refusals.model_problems))
    (problems,) = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "problems"
    ]
    assert len(problems.elts) == len(documented) > 5
    for pair in problems.elts:
        # What varies is written out as its most common value.
        pattern = re.escape(texts_of(ast.unparse(pair.elts[1]))[0]).replace(re.escape("..."), ".+")
        # Those that a policy that looks at places alone does not mind.
        conditions = {getattr(part, "id", "") for part in ast.walk(pair.elts[0])}
        in_blocks = SERVED_BLINDLY if {"records_nothing", "served"} & conditions else "refused"
        # Those that only a choice per head brings.
        in_blocks = "served" if "HEAD" in conditions else in_blocks
        assert [row for row in documented if row[:2] == ["refused", in_blocks] and re.fullmatch(pattern, row[2])], (
            pattern
        )


def said_by_the_package() -> list[str]:
    return [text for path in (ROOT / "rkv_sglang").rglob("*.py") for text in texts_of(path.read_text())]


def test_every_message_of_my_server_does_not_start_is_one_of_the_code() -> None:
    said = said_by_the_package()
    rows = table(COMPATIBILITY, "message", "who says it", "mend")
    # These two are argparse's.
    others = {"unrecognized arguments: --kv-policy", "argument --kv-policy: invalid choice: ..."}
    messages = [spans(row[0])[0] for row in rows]
    assert others <= set(messages)
    for message in set(messages) - others:
        # Some begin with a flag that the code fills in.
        assert any(matches(message, text) or matches(message.partition(" ")[2], text) for text in said), message


def test_every_error_that_ends_a_start_is_on_that_page() -> None:
    messages = [spans(row[0])[0] for row in table(COMPATIBILITY, "message", "who says it", "mend")]
    integration = ROOT / "rkv_sglang" / "integration"
    for path in sorted(integration.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            is_error = isinstance(node, ast.Raise) and "RefusedError" in ast.unparse(node)
            if is_error or (isinstance(node, ast.Yield) and path.name == "refusals.py"):
                texts = [text for text in texts_of(ast.unparse(node)) if len(text) > 20]
                for text in texts[:1]:
                    assert any(matches(message, text) for message in messages), text


def test_every_hook_has_its_place_in_how_it_works() -> None:
    text = page("docs/how-it-works.md")
    for hook in HOOKS:
        owner, _, name = hook.target.rpartition(".")
        short = f"{owner.rpartition('.')[2]}.{name}" if owner.rpartition(".")[2][0].isupper() else name
        assert f"`{short}`" in text, hook.target


def test_how_it_works_names_no_place_that_is_not_hooked() -> None:
    targets = [hook.target for hook in HOOKS]
    for heading in ("A server starts", "The life of a request", "Preemption"):
        section = page("docs/how-it-works.md").split(f"## {heading}\n")[1].split("\n## ")[0]
        for row in table(section, "where in SGLang"):
            for name in spans(row[0]):
                assert [target for target in targets if target.endswith(f".{name}")], name


def test_the_table_of_benchmarks_has_each_with_its_files() -> None:
    rows = {spans(row[1])[0].split()[2]: spans(row[3]) for row in table(page("benchmarks/README.md"), "question")}
    for benchmark in BENCHMARKS:
        assert benchmark.module in rows
    patterns = [name for names in rows.values() for name in names]
    for benchmark in BENCHMARKS:
        for written in benchmark.tables:
            assert any(fnmatch.fnmatch(written.name, pattern) for pattern in patterns), written.name


def test_the_versions_named_are_those_supported() -> None:
    from rkv_sglang.integration.hooking.releases import SUPPORTED_SGLANG

    assert f"SGLang {', '.join(SUPPORTED_SGLANG)}; Python" in COMPATIBILITY
    assert f"for SGLang {', '.join(SUPPORTED_SGLANG)}." in README.read_text()


def test_the_tables_reader_wants_one_table(tmp_path: Path) -> None:
    text = "| a | b |\n|---|---|\n| 1 | 2 |\n\n| a | c |\n|---|---|\n| 3 | 4 |\n"
    assert table(text, "a", "c") == [["3", "4"]]
    with pytest.raises(ValueError, match="2 tables"):
        table(text, "a")
    assert matches("x ... z", "x y z") and not matches("z ... x", "x y z") and not matches("...", "x")
