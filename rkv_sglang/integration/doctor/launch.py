"""``rkv-sglang doctor --command``: would this launch be refused, and for which reasons?"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import TextIO

from rkv_sglang.integration.doctor.command_line import Launch, read_launch
from rkv_sglang.integration.doctor.hardware import as_on
from rkv_sglang.integration.doctor.report import PLUGIN_GROUP, check_plugin, check_sglang, import_problem


def check_command(
    text: str, model_config: str | None = None, out: TextIO | None = None, *, hardware: str | None = None
) -> int:
    """Print whether the launch would start, or every reason why not; return the exit status, 0 or 1.

    No server is started and no port opened. A model that is named by its place on the Hub is looked up there.

    Args:
        text: The command line, as a shell would get it.
        model_config: A model's config.json that stands for the model of the command.
        out: Where to write; None is standard output.
        hardware: The GPU that the launch is for, one of ``HARDWARE``; None for what this machine has.
    """
    try:
        launch = read_launch(text)
    except ValueError as error:
        print(error, file=out)
        return 1
    # Before SGLang is imported, because it reads variables then.
    with _environment(launch.environment), _quiet():
        problems, verdict = _look(launch, model_config, hardware)
    for line in problems or [verdict]:
        print(line, file=out)
    return 1 if problems else 0


def _look(launch: Launch, model_config: str | None, hardware: str | None) -> tuple[list[str], str]:
    sglang = check_sglang()
    if sglang.problem is not None:
        # Its flags are not known.
        return [sglang.problem], ""
    from rkv_sglang.config import ARGS_VARIABLE, NO_POLICY, POLICY_FIELD

    try:
        from rkv_sglang.integration.doctor.arguments import read_arguments, server_parser
        from rkv_sglang.integration.doctor.resolution import look_at_server
    # SGLang makes folders and asks the machine as it is imported.
    except Exception as error:
        return [import_problem(error)], ""

    parser = server_parser()
    options, problems = read_arguments(parser, launch.arguments, is_serve=launch.is_serve)
    if os.environ.get(ARGS_VARIABLE):
        problems += _problem_of_variable(options)
    policy = getattr(options, POLICY_FIELD, NO_POLICY)
    if policy == NO_POLICY:
        return problems, "would be stock SGLang: the command sets no --kv-policy"
    plugin = check_plugin(entry_points(group=PLUGIN_GROUP), os.environ.get("SGLANG_PLUGINS", ""))
    if plugin.problem is not None:
        problems.append(plugin.problem)
    with as_on(hardware):
        refusals, flags, unchecked = look_at_server(parser, options, model_config, hardware=hardware)
    added = "".join(f" {flag}, which it sets by itself," for flag in flags)
    verdict = (
        f"would start with --kv-policy {policy}{' and' if added else ','}{added} as far as this machine can tell; "
        f"not checked: {'; '.join(unchecked)}"
    )
    return list(dict.fromkeys(problems + refusals)), verdict


def _problem_of_variable(options: argparse.Namespace) -> list[str]:
    """Give the options the settings that the environment holds; return the problem if it cannot be."""
    from rkv_sglang.config import ARGS_VARIABLE
    from rkv_sglang.integration.startup.environment import adopt_environment
    from rkv_sglang.integration.startup.errors import RefusedError
    from rkv_sglang.integration.startup.server_args import add_policy_flags

    try:
        adopt_environment(options, add_policy_flags)
    except RefusedError as error:
        # The rest is looked at without it.
        del os.environ[ARGS_VARIABLE]
        return [str(error)]
    return []


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set variables for a while; afterwards all are as before, also those that SGLang sets."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what SGLang says of this machine and of flags that it will rename."""
    before, sink = logging.root.manager.disable, io.StringIO()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
