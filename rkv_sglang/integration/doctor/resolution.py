"""SGLang's resolution of arguments, and every refusal on the way, without starting anything."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from typing import Any

from sglang.srt.arg_groups.overrides import model_config_of, resolving_view
from sglang.srt.utils import get_device

from rkv_sglang.config import PARAMETERS_FIELD
from rkv_sglang.integration.doctor.arguments import MODEL_FLAG, NO_MODEL
from rkv_sglang.integration.doctor.hardware import fp8_problems
from rkv_sglang.integration.doctor.model_folder import folder_of
from rkv_sglang.integration.startup.policy_parameters import read_parameters
from rkv_sglang.integration.startup.refusals import flag_problems, model_problems, refused_values
from rkv_sglang.integration.startup.server_args import RKVServerArgs
from rkv_sglang.integration.startup.sliding import ONE_POOL_FLAG, keep_in_one_pool
from rkv_sglang.messages import one_line
from rkv_sglang.plan_command import asks_for_fp8_kv

NEVER_CHECKED = "the weights and the memory that they leave; the pools and layers that the scheduler builds"
GPU_UNCHECKED = "what SGLang would choose for a GPU, as there is none here"


def look_at_server(
    parser: argparse.ArgumentParser,
    options: argparse.Namespace,
    model_config: str | None,
    *,
    hardware: str | None = None,
) -> tuple[list[str], list[str], list[str]]:
    """Resolve the arguments of a server with a policy as its launcher does, and collect what it would refuse.

    Args:
        parser: From which ``options`` come.
        options: The arguments as they were given.
        model_config: A model's config.json that stands for the model's own.
        hardware: The GPU that SGLang is told of, whatever this machine has; None for what it has.

    Returns:
        One line for every reason to refuse, in the order of a start; flags that would be set; what was not checked.
    """
    problems: list[str] = []
    options = _with_parameters(options, problems)
    unchecked = [NEVER_CHECKED]
    # As far as SGLang gets before it looks at the model, which is where flags are refused.
    early = _args(options, model_path=NO_MODEL)
    with contextlib.suppress(Exception):
        early.resolve_once()
    problems += flag_problems(resolving_view(early))
    # What SGLang says then is not about what was refused already.
    mended = _without_refused(parser, options, resolving_view(early))
    if mended.device is None and (hardware is not None or not _has_accelerator()):
        mended.device = "cuda"
        if hardware is None:
            unchecked.append(GPU_UNCHECKED)
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(folder_of(model_config, options)) if model_config else options.model_path
        except ValueError as error:
            return [*problems, str(error)], [], unchecked
        flags: list[str] = []
        problems += _look_at_resolved(mended, folder, options.model_path, flags, hardware)
    return problems, flags, unchecked


def _with_parameters(options: argparse.Namespace, problems: list[str]) -> argparse.Namespace:
    """Return the options with the content of a file of parameters, which can be read but once, in its name's place."""
    try:
        parameters = read_parameters(getattr(options, PARAMETERS_FIELD))
    except ValueError as error:
        problems.append(str(error))
        parameters = {}
    return argparse.Namespace(**{**vars(options), PARAMETERS_FIELD: parameters})


def _look_at_resolved(
    options: argparse.Namespace, folder: str, model_path: str, flags: list[str], hardware: str | None
) -> Iterator[str]:
    """Yield what is refused once model and defaults are known; add to ``flags`` those that would be set.

    ``model_path`` is the name of the model in messages.
    """

    def told(error: Exception) -> str:
        # A folder that stands for the model is gone when this is read.
        return one_line(error).replace(folder, model_path)

    names = {"model_path": folder, "served_model_name": options.served_model_name or model_path}
    is_dummy, asks_for_fp8 = folder.lower() in ("none", NO_MODEL), False
    if not is_dummy:
        looked_at = _args(options, **names)
        try:
            model = model_config_of(looked_at)
        # Of transformers, of the Hub, of code that comes with a model.
        except Exception as error:
            is_named = folder != model_path
            mend = "name another config.json than that of" if is_named else "name its config.json with"
            yield f"{MODEL_FLAG} {model_path} has no usable configuration here ({told(error)}): {mend} --model-config"
            names["model_path"], is_dummy = NO_MODEL, True
        else:
            flags += [ONE_POOL_FLAG] if keep_in_one_pool(looked_at) else []
            model.model_path = model_path
            asks_for_fp8 = asks_for_fp8_kv(model.hf_config)
            yield from model_problems(model, resolving_view(looked_at))
    args = _args(options, **names)
    problem = None
    try:
        args.resolve_once()
        if not is_dummy:
            args.check_server_args()
    # SGLang refuses by assertions and by errors of every kind.
    except Exception as error:
        problem = f"SGLang itself refuses the command ({type(error).__name__}: {told(error)}): mend what it names"
    yield from flag_problems(resolving_view(args))
    yield from fp8_problems(resolving_view(args), hardware, asks_for_fp8=asks_for_fp8)
    if problem is not None:
        yield problem


def _args(options: argparse.Namespace, **changed: Any) -> Any:
    return RKVServerArgs.from_cli_args(argparse.Namespace(**{**vars(options), **changed}))


def _without_refused(parser: argparse.ArgumentParser, options: argparse.Namespace, view: Any) -> argparse.Namespace:
    """Return the options with every refused flag at its default; unset refused variables."""
    defaults = {}
    for refused, _ in refused_values(view):
        if refused.setting.startswith("--"):
            field = parser._option_string_actions[refused.setting].dest
            defaults[field] = parser.get_default(field)
        else:
            os.environ.pop(refused.setting, None)
    return argparse.Namespace(**{**vars(options), **defaults})


def _has_accelerator() -> bool:
    try:
        get_device()
    except RuntimeError:
        return False
    return True
