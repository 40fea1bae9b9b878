"""The policy's flags in an environment variable, for programs that make SGLang's server arguments themselves."""

from __future__ import annotations

import argparse
import functools
import os
import shlex
from collections.abc import Callable
from typing import Any, NoReturn

from rkv_sglang.config import ARGS_VARIABLE, NO_POLICY, PARAMETERS_FIELD, POLICY_FIELD
from rkv_sglang.integration.startup.errors import stop
from rkv_sglang.integration.startup.policy_parameters import read_parameters
from rkv_sglang.messages import one_line

# Of a record that came from a process with the plugin.
CARRIED_ATTRIBUTE = "_rkv_sglang_carried"
# Adds the policy's flags, and nothing else, to a parser.
AddFlags = Callable[[Any], None]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def environment_settings(add_flags: AddFlags) -> dict[str, Any]:
    """Return the record's fields as the variable sets them, those that it does not name at their defaults.

    Args:
        add_flags: ``server_args.add_policy_flags``.

    Raises:
        RefusedError: The variable cannot be read; one line.
    """
    try:
        return dict(_read(os.environ.get(ARGS_VARIABLE, ""), add_flags))
    except ValueError as error:
        problem = f"{ARGS_VARIABLE} cannot be used ({one_line(error)}): mend it or unset it"
    # Outside the handler, so that a caller sees one error and not a chain.
    stop(problem)


@functools.cache
def _read(text: str, add_flags: AddFlags) -> dict[str, Any]:
    parser = _Parser(prog=ARGS_VARIABLE, add_help=False, allow_abbrev=False)
    add_flags(parser)
    words = shlex.split(text)
    options, unknown = parser.parse_known_args(words)
    if unknown:
        raise ValueError(f"{unknown[0]} is no flag of the KV policy")
    if words and not any(word.partition("=")[0] == "--kv-policy" for word in words):
        raise ValueError("it names no --kv-policy")
    settings = vars(options)
    value = settings[PARAMETERS_FIELD]
    if not value.lstrip().startswith("{"):
        # Every process reads the variable for itself, and a file may be another, gone or empty then.
        raise ValueError("its --kv-policy-config is no JSON object, and a file's name goes with a flag only")
    return {**settings, PARAMETERS_FIELD: read_parameters(value)}


def adopt_environment(record: Any, add_flags: AddFlags) -> None:
    """Give a record, or parsed options, that name no setting those of the environment; mutates it.

    Args:
        record: Whatever has the record's fields of the policy.
        add_flags: ``server_args.add_policy_flags``.

    Raises:
        RefusedError: The variable is bad, or the record has settings of its own; one line.
    """
    settings = environment_settings(add_flags)
    given = {name: getattr(record, name) for name in settings}
    if given[PARAMETERS_FIELD] == "{}":
        given[PARAMETERS_FIELD] = {}
    # A record that comes from another process has them already.
    if given == settings or settings[POLICY_FIELD] == NO_POLICY:
        return
    defaults = _read("", add_flags)
    named = [name for name, value in given.items() if value != defaults[name]]
    if named:
        stop(
            f"{ARGS_VARIABLE} and {named[0]} are both set, and one place decides: unset {ARGS_VARIABLE} or leave the "
            "settings of the KV policy out of the server's arguments"
        )
    for name, value in settings.items():
        setattr(record, name, value)
