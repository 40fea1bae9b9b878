"""Servers that are started at the same time and run side by side on one GPU."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.common.asking import entered_side_by_side
from benchmarks.common.settings import Setting
from devtools.launch import Server, has_gpu, launched_server


def groups_that_fit(settings: Sequence[Setting], gib_each: float) -> list[list[Setting]]:
    """Return the settings in order, in groups whose servers fit on the GPU together; alone on a machine without one.

    Args:
        gib_each: What one server takes, in GiB.
    """
    at_once = 1
    if has_gpu():
        import torch

        at_once = max(1, int(torch.cuda.mem_get_info()[0] / 2**30 / gib_each))
    return [list(settings[start : start + at_once]) for start in range(0, len(settings), at_once)]


def servers_side_by_side(
    model: str, flags: Sequence[str], logs: Mapping[Setting, Path], environment: Mapping[str, str]
) -> AbstractContextManager[dict[Setting, Server]]:
    """Run one server of each setting for the length of a ``with`` block; all have ended after it.

    Args:
        model: Folder or hub name.
        flags: Flags of all servers.
        logs: Where the server of each setting writes what it prints.
        environment: Variables of all servers.

    Raises:
        ServerError: One of them did not start.
    """
    # Servers whose turn it is not would take the cores of a small machine.
    shared = [*(() if has_gpu() else ("--sleep-on-idle",)), *flags]
    contexts = {
        setting: launched_server(
            model, *shared, *setting.flags, log_path=log_path, environment={**environment, **setting.environment}
        )
        for setting, log_path in logs.items()
    }
    return entered_side_by_side(contexts)
