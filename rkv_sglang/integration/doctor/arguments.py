"""SGLang's reading of its arguments, which goes on behind a mistake so that all of them are told at once."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from sglang.cli.serve import _extract_model_type_override, _normalize_positional_model_path
from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger

from rkv_sglang.integration.startup.server_args import RKVServerArgs, unread_config_file
from rkv_sglang.messages import one_line

MODEL_FLAG = "--model-path"
# The name for which SGLang looks at no model.
NO_MODEL = "dummy"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def server_parser() -> argparse.ArgumentParser:
    """Return a parser of SGLang's flags and the policy's, as a server builds it, that raises ``ValueError``."""
    parser = _Parser(prog="sglang serve", add_help=False, exit_on_error=False)
    RKVServerArgs.add_cli_args(parser)
    return parser


def read_arguments(
    parser: argparse.ArgumentParser, arguments: Sequence[str], *, is_serve: bool = False
) -> tuple[argparse.Namespace, list[str]]:
    """Parse the arguments of a server, and those of its ``--config`` file.

    Args:
        parser: From ``server_parser``.
        arguments: What a user wrote behind the command.
        is_serve: Whether ``sglang serve`` gets them.

    Returns:
        What could be parsed, and one line for every problem. A flag that could not be parsed has its default.
    """
    problems: list[str] = []
    words = list(arguments)
    if is_serve:
        words = _without_model_type(words, problems)
        words, _ = _normalize_positional_model_path(words)
    words = _with_config_file(parser, words, problems)
    seen: set[str] = set()
    while True:
        try:
            options, unknown = parser.parse_known_args(words)
        # An action may end the process or raise what it likes.
        except (argparse.ArgumentError, ValueError, SystemExit) as error:
            message = _told(error)
            flags, is_missing = _flags_of(message)
            left = list(_without(flags, words, parser))
            if not flags & seen:
                problems.append(f"{message}; {'add it' if is_missing else 'mend it or leave it out'}")
            if left == words and not is_missing:
                # Nothing that could be left out to see more.
                return argparse.Namespace(), problems
            # A name stands for the model that is missing, so that the rest can be looked at.
            words = left + ([MODEL_FLAG, NO_MODEL] if is_missing else [])
            seen |= flags
        else:
            unread = unread_config_file(options)
            if unread:
                problems.append(unread)
                options.config = None
            return options, problems + [_unknown(group, parser) for group in _groups(unknown)]


def _without_model_type(words: list[str], problems: list[str]) -> list[str]:
    try:
        backend, words = _extract_model_type_override(words)
    except ValueError as error:
        problems.append(f"{_told(error)} leave --model-type out")
        return [word for word in words if not word.startswith("--model-type")]
    if backend not in ("auto", "llm"):
        problems.append(f"--model-type {one_line(backend)} serves no language model: leave --model-type out")
    return list(words)


def _with_config_file(parser: argparse.ArgumentParser, words: list[str], problems: list[str]) -> list[str]:
    if "--config" not in words:
        return words
    try:
        return list(ConfigArgumentMerger(parser).merge_config_with_args(words))
    # Whatever a file may hold: SGLang looks at little of it before it uses it.
    except Exception as error:
        problems.append(f"--config cannot be used ({_told(error)}): name one YAML file of flags and values")
        where = words.index("--config")
        return words[:where] + words[where + 2 :]


def _flags_of(message: str) -> tuple[set[str], bool]:
    """Return the flags that argparse complains of, in all their spellings, and whether they are missing."""
    found = re.match(r"argument (\S+): |ambiguous option: (\S+) ", message)
    if found:
        return set((found[1] or found[2]).split("/")), False
    return ({MODEL_FLAG}, True) if message.startswith("the following arguments are required") else (set(), False)


def _without(flags: set[str], words: list[str], parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the words but for these flags, abbreviated or not, and their values."""
    is_left_out = False
    for word in words:
        if word.startswith("--"):
            name = word.partition("=")[0]
            is_known = name in parser._option_string_actions
            is_left_out = name in flags or (not is_known and any(flag.startswith(name) for flag in flags))
        if not is_left_out:
            yield word


def _groups(unknown: list[str]) -> list[list[str]]:
    groups: list[list[str]] = []
    for word in unknown:
        if word.startswith("-") or not groups:
            groups.append([])
        groups[-1].append(word)
    return groups


def _unknown(group: list[str], parser: argparse.ArgumentParser) -> str:
    # In argparse's words, which a user may search for.
    name = group[0].partition("=")[0]
    known: dict[str, Any] = parser._option_string_actions
    close = difflib.get_close_matches(name, known, 1, 0.8)
    return f"unrecognized arguments: {one_line(' '.join(group))}; " + (f"write {close[0]}" if close else "leave it out")


def _told(error: BaseException) -> str:
    return one_line(error) or type(error).__name__
