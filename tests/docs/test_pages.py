"""Pages hold what they point to: links, commands, modules; and the README stays short."""

import argparse
import importlib.util
import re
from pathlib import Path

import pytest

from rkv_sglang import cli
from tests.docs.pages import PAGES, README, ROOT, anchors, fences, links, spans, table

MOST_BYTES = 8192


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_readme_is_short() -> None:
    assert len(README.read_bytes()) <= MOST_BYTES


def test_the_readme_has_both_commands_and_the_demos_output() -> None:
    from devtools.demo import Run
    from devtools.demo import table as demo_table

    commands, output = fences(README.read_text())[:2]
    assert [line.split("#")[0].strip() for line in commands.splitlines()] == ["make demo", "make test"]
    runs = [
        Run(policy=policy, prompt_tokens=1, output_ids=[1], text="", peak_kv_tokens=1, tokens_per_s=1.0, stats={})
        for policy in ("none", "rkv")
    ]
    labels = [line[:20].strip() for line in demo_table(runs).splitlines()]
    shown = output.splitlines()
    assert [line[:20].strip() for line in shown[: len(labels)]] == labels
    assert shown[len(labels) + 1].startswith("The two answers are identical")


def test_the_demos_figures_in_the_readme_keep_the_promise() -> None:
    rows = {line[:20].strip(): line[20:].split() for line in fences(README.read_text())[1].splitlines()[:7]}
    prompt, generated = (int(rows[name][1]) for name in ("prompt tokens", "tokens generated"))
    budget, buffer = 192, 64
    assert int(rows["peak KV tokens held"][1]) == prompt + budget + buffer
    assert int(rows["KV tokens evicted"][1]) == buffer * int(rows["compactions"][1])
    assert int(rows["compactions"][1]) == (generated - 2 - budget) // buffer


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_relative_link_resolves(path: Path) -> None:
    for link in links(path.read_text()):
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{link} leads nowhere"
        assert target.is_relative_to(ROOT)
        assert not anchor or anchor in anchors(target.read_text()), f"{link}: there is no such heading"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_no_line_is_long(path: Path) -> None:
    # Tables cannot be wrapped, and the page of hooks is generated.
    lines = [line for line in path.read_text().splitlines() if not line.startswith("|")]
    assert path.name == "hooks.md" or [line for line in lines if len(line) > 120] == []


def code_of(path: Path) -> list[str]:
    text = path.read_text()
    return [*spans(text), *(line for block in fences(text) for line in block.splitlines())]


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_module_that_is_run_exists(path: Path) -> None:
    for code in code_of(path):
        for module in re.findall(r"python3? -m ([\w.]+)", code):
            assert importlib.util.find_spec(module) is not None, module


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_script_that_is_run_exists(path: Path) -> None:
    for code in code_of(path):
        for script in re.findall(r"(?:bash|python3?) ([\w/]+\.(?:sh|py))", code):
            assert (ROOT / script).is_file(), script


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_target_of_make_exists(path: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for code in code_of(path):
        if found := re.match(r"make ([a-z-]+)", code):
            assert found[1] in targets, code


def commands_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit):
        cli.main([*argv, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_command_line_of_the_package_is_one(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for code in code_of(path):
        if found := re.match(r"rkv-sglang (\w+)(.*)", code):
            shown = commands_of(capsys, found[1])
            for flag in re.findall(r"(?<=\s)--?[\w-]+", found[2].split("#")[0].replace('"', "")):
                assert re.search(rf"(?<![\w-]){flag}(?![\w-])", shown), f"{code}: no {flag}"


@pytest.mark.parametrize("header, folder", [("folder", "rkv_sglang"), ("room", "rkv_sglang/integration")])
def test_the_map_of_folders_is_complete(header: str, folder: str) -> None:
    rows = table((ROOT / "docs" / "how-it-works.md").read_text(), f"{header} of `{folder}/`")
    folders = {path.parent.name for path in (ROOT / folder).glob("*/*.py")}
    assert {row[0].strip("`") for row in rows} == folders


def test_every_page_is_reached_from_the_readme() -> None:
    reached, new = set(), {README}
    while new:
        reached |= new
        found = {
            (path.parent / link.partition("#")[0]).resolve()
            for path in new
            for link in links(path.read_text())
            if link.partition("#")[0].endswith(".md") and "://" not in link
        }
        new = found - reached
    assert {path for path in PAGES if path.is_relative_to(ROOT / "docs")} <= reached


def test_the_files_that_contributors_are_sent_to_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = [span for span in spans(text) if re.fullmatch(r"[\w./-]+\.(py|toml|md|txt)", span) and "NAME" not in span]
    assert len(paths) > 10
    roots = [ROOT, ROOT / "rkv_sglang", ROOT / "devtools" / "env"]
    assert [path for path in paths if not any((root / path).exists() for root in roots)] == []


def test_the_tests_that_promises_rest_on_exist() -> None:
    text = (ROOT / "docs" / "trust.md").read_text()
    for promise, how in table(text, "promise", "how it is tested"):
        paths = [span for span in spans(how) if "/" in span or span.endswith(".py")]
        assert paths, promise
        assert [path for path in paths if not any((ROOT / base / path).exists() for base in ("", "tests/e2e"))] == []


def test_the_tests_readme_names_every_folder_and_only_what_exists() -> None:
    text = (ROOT / "tests" / "README.md").read_text()
    named = {row[0].strip("`") for row in table(text, "folder", "what is tested")}
    folders = {path.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").glob("*/**/test_*.py")}
    assert named == folders
    helpers = [row[0].strip("`") for row in table(text, "helper")]
    assert [name for name in helpers if not (ROOT / "tests" / name).exists()] == []


def test_flags_in_examples_are_known() -> None:
    # A page may not promise a flag that argparse would refuse.
    from rkv_sglang.integration.startup.server_args import RKVServerArgs

    parser = argparse.ArgumentParser()
    RKVServerArgs.add_cli_args(parser)
    known = {option for option in parser._option_string_actions if re.match(r"--r?kv-", option)}
    for path in PAGES:
        for code in code_of(path):
            for flag in re.findall(r"--r?kv-(?!gib|itemsize|cache|canary)[\w-]+", code):
                assert flag in known, f"{name_of(path)}: {flag}"
