"""The bodies of the two kinds of process of a run: what a server's launcher does, and what its scheduler does."""

import os
import pickle
import pkgutil
import signal
import sys
import traceback
from typing import Any

from tests.support.harness.gate import Gate


def launcher_process(flags: list[str], writer: int) -> None:
    try:
        from sglang.srt.plugins import load_plugins

        load_plugins()
        from sglang.srt.entrypoints.engine import _set_envs_and_config
        from sglang.srt.parser.template_detection import resolve_auto_parsers
        from sglang.srt.server_args import PortArgs, prepare_server_args

        before = dict(os.environ)
        server_args = prepare_server_args(flags)
        server_args.resolve_once()
        _set_envs_and_config(server_args)
        server_args.check_server_args()
        resolve_auto_parsers(server_args)
        # With data-parallel attention SGLang talks over numbered ports; one of no such server uses files.
        port_args = PortArgs.init_new(type(server_args)(model_path=server_args.model_path))
        env = {name: value for name, value in os.environ.items() if before.get(name) != value}
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(pickle.dumps({"arguments": pickle.dumps((server_args, port_args)), "env": env}))
        code = 0
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def num_dp_ranks_of(server_args: Any) -> int:
    """Return how many ranks of data-parallel attention there are, each with requests of its own."""
    from sglang.srt.arg_groups.overrides import resolving_view

    return int(resolving_view(server_args).attn_dp_size)


def input_of(port_args: Any, dp_rank: int) -> str:
    """Return where such a rank reads its requests."""
    return f"{port_args.scheduler_input_ipc_name}.{dp_rank}"


def scheduler_process(job: dict[str, Any], arguments: bytes, tp_rank: int, writer: Any) -> None:
    import torch
    from sglang.srt.managers.scheduler import run_scheduler_process

    torch.set_num_threads(job["num_threads"])
    if os.environ.get("TRITON_INTERPRET") == "1":
        from triton.runtime import interpreter

        from tests.support.interpreted import patch_language, patch_nothing

        patch_language()
        interpreter._patch_lang = patch_nothing
    # As in a spawned child, the arguments are unpickled before the plugins are loaded.
    server_args, port_args = pickle.loads(arguments)
    dp_rank, arrivals, controls = None, job["arrivals"], job["controls"]
    if (num_dp_ranks := num_dp_ranks_of(server_args)) > 1:
        dp_rank = tp_rank * num_dp_ranks // server_args.tp_size
        port_args.scheduler_input_ipc_name = input_of(port_args, dp_rank)
        # Controls of the first go to all.
        arrivals, controls = arrivals[dp_rank::num_dp_ranks], [] if dp_rank else controls
    if "driver" in job:
        # Decides in this process what arrives when, instead of the gate.
        pkgutil.resolve_name(job["driver"])(job, tp_rank)
    else:
        Gate(arrivals, controls).register()
    # It swallows its exception after printing it; the parent sees the exit code.
    failed: list[bool] = []
    signal.signal(signal.SIGQUIT, lambda signum, frame: None)
    from sglang.srt.managers import scheduler

    def get_exception_traceback() -> str:
        failed.append(True)
        return traceback.format_exc()

    scheduler.get_exception_traceback = get_exception_traceback
    gpu_id = server_args.base_gpu_id + tp_rank * server_args.gpu_id_step
    try:
        run_scheduler_process(server_args, port_args, gpu_id, tp_rank, 0, dp_rank, writer)
    except BaseException:
        traceback.print_exc()
        failed.append(True)
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: the sockets of a scheduler that failed may wait for a reader for ever.
    os._exit(1 if failed else 0)
