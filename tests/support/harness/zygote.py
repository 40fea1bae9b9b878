"""The process that imports SGLang once and forks a job for every run. Started by ``scheduler.py``; two arguments, the
address of its socket, and whether it imports ``sglang`` or the ``libraries`` that SGLang imports. It must stay
single-threaded and must not run any torch operation, or forks would hang."""

import gc
import importlib
import os
import select
import signal
import sys
from multiprocessing.connection import Listener

import setproctitle

# What a scheduler of a small Llama or Qwen3 imports on the way to its first token, beyond its own module.
_PRELOAD = (
    "sglang.srt.managers.scheduler",
    "sglang.srt.entrypoints.engine",
    "sglang.srt.models.registry",
    "sglang.srt.layers.attention.torch_native_backend",
    "sglang.srt.arg_groups.pipeline",
    "sglang.srt.arg_groups.model_path_hook",
    "sglang.srt.arg_groups.resolution_hooks",
    "sglang.srt.distributed.device_communicators.custom_all_reduce",
    "sglang.srt.distributed.device_communicators.pymscclpp",
    "sglang.srt.distributed.device_communicators.shm_broadcast",
    "sglang.srt.distributed.device_communicators.torch_symm_mem",
    "sglang.srt.dllm.algorithm",
    "sglang.srt.layers.attention.qsa.config",
    "sglang.srt.mem_cache.prefill_budget",
    "sglang.srt.mem_cache.rust_tree_core.adapter",
    "sglang.srt.parser.template_detection",
)

# Of others, what SGLang imports that takes long, with what that imports. Not the client of Prometheus: it looks for its
# variable when it is imported.
_LIBRARIES = (
    "numpy",
    "torch",
    "torch._dynamo.repro.after_dynamo",
    "torch._inductor.compile_fx",
    "transformers.activations",
    "transformers.modeling_gguf_pytorch_utils",
    "transformers.modeling_layers",
    "aiohttp.web",
    "compressed_tensors.config",
    "fastapi",
    "gguf",
    "IPython.display",
    "openai.types.responses",
    "uvicorn",
    "xgrammar",
)


def main(address: str, imports: str) -> None:
    if imports == "libraries":
        for name in _LIBRARIES:
            importlib.import_module(name)
    else:
        _import_sglang()
    import tests.support.harness.job as job

    assert imports == "sglang" or not {"sglang", "prometheus_client"} & set(sys.modules)
    # It finds the place of a process's title as long as the environment is that of the start.
    setproctitle.getproctitle()
    # What is there now stays: no collection in a fork looks at it, nor copies the memory that it lies in.
    gc.collect()
    gc.freeze()
    # A job that ended is gone at once, and whoever waits for that goes on: nobody needs to collect it.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # Listen under another name first: the file's being there means "ready".
    listener = Listener(address + ".starting", family="AF_UNIX")
    os.rename(address + ".starting", address)
    while True:
        readable, _, _ = select.select([listener._listener._socket, sys.stdin], [], [])  # type: ignore[attr-defined]
        if sys.stdin in readable and not os.read(sys.stdin.fileno(), 1):
            break
        if listener._listener._socket in readable:  # type: ignore[attr-defined]
            connection = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener._listener._socket.close()  # type: ignore[attr-defined]
                job.main(connection)
            connection.close()
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _import_sglang() -> None:
    for name in _PRELOAD:
        importlib.import_module(name)
    from sglang.srt.models.registry import ModelRegistry

    assert ModelRegistry.models
    from tests.support.harness import stale_bindings

    stale_bindings.install()


if __name__ == "__main__":
    main(*sys.argv[1:])
