"""Ways in which programs start SGLang, each in a process that has not loaded any plugin yet.

``python -m tests.integration.startup.ways MODEL`` imports SGLang once, forks for every way, and prints a line of
JSON for each: what reached the schedulers, as another process reads it. The schedulers themselves are left out: what
would start them is a stand-in that keeps the pickled record of server arguments.
"""

import contextlib
import json
import os
import pickle
import runpy
import sys
import traceback
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from sglang.srt.server_args import ServerArgs as StockArgs

FLAGS = "--kv-policy snapkv --rkv-budget 96 --kv-buffer 32"


class OwnArgs(StockArgs, dict=True):  # type: ignore[misc, call-arg]
    """A program's own class of records, made before plugins are loaded."""


class Launched(BaseException):
    """Carries the record that the schedulers would get."""


def keep_record(cls: Any, server_args: Any, port_args: Any, *args: Any, **kwargs: Any) -> Any:
    raise Launched(pickle.dumps(server_args))


def common(model: str) -> dict[str, Any]:
    return {"model_path": model, "device": "cpu", "attention_backend": "torch_native", "max_total_tokens": 512}


def words(model: str) -> list[str]:
    return [word for name, value in common(model).items() for word in (f"--{name.replace('_', '-')}", str(value))]


def run_as_main(module: str, model: str) -> None:
    """Do as ``python -m module`` does."""
    sys.argv = [module, *words(model)]
    runpy.run_module(module, run_name="__main__")


def engine_from_keywords(model: str) -> None:
    import sglang

    sglang.Engine(**common(model))


def engine_from_a_record(model: str) -> None:
    import sglang
    from sglang.srt.server_args import ServerArgs

    sglang.Engine(server_args=ServerArgs(**common(model)))


def subclass_of_engine(model: str) -> None:
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.server_args import ServerArgs

    class Rollout(Engine):
        server_args_class = ServerArgs

    Rollout(**common(model))


def engine_from_a_record_of_a_class_of_its_own(model: str) -> None:
    import sglang

    sglang.Engine(server_args=OwnArgs(**common(model)))


def launch_of_a_record(model: str) -> None:
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.server_args import ServerArgs

    Engine._launch_subprocesses(
        ServerArgs(**common(model)),
        Engine.init_tokenizer_manager_func,
        Engine.run_scheduler_process_func,
        Engine.run_detokenizer_process_func,
    )


def launch_server_with_a_resolved_record(model: str) -> None:
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import ServerArgs

    args = ServerArgs(**common(model))
    args.resolve_once()
    launch_server(args)


def launch_server_in_a_spawned_process(model: str) -> None:
    """As ``multiprocessing`` hands a record over, to a process that has no plugin either."""
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import ServerArgs

    args = ServerArgs(**common(model))
    args.resolve_once()
    launch_server(pickle.loads(pickle.dumps(args)))


def parser_made_before_plugins(model: str) -> None:
    import argparse

    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    launch_server(ServerArgs.from_cli_args(parser.parse_args(words(model))))


def offline_benchmark(model: str) -> None:
    # A stand-in: its import of a package for data sets that the project has no other use for, and none is read here.
    sys.modules.setdefault("datasets", SimpleNamespace(load_dataset=None))  # type: ignore[arg-type]
    run_as_main("sglang.benchmark.offline_throughput", model)


def launch_module(model: str) -> None:
    run_as_main("sglang.launch_server", model)


WAYS: dict[str, Callable[[str], None]] = {
    way.__name__: way
    for way in (
        engine_from_keywords,
        engine_from_a_record,
        subclass_of_engine,
        engine_from_a_record_of_a_class_of_its_own,
        launch_of_a_record,
        launch_server_with_a_resolved_record,
        launch_server_in_a_spawned_process,
        parser_made_before_plugins,
        offline_benchmark,
        launch_module,
    )
}


def in_a_fork(work: Callable[[], Any]) -> Any:
    """Return what ``work`` returns, as JSON would, from a forked process; its error as ``{"error": line}``."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            answer = work()
        except BaseException as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        with contextlib.suppress(BrokenPipeError), os.fdopen(writer, "wb") as out:
            out.write(pickle.dumps(answer))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answers:
        data = answers.read()
    os.waitpid(pid, 0)
    return pickle.loads(data)


def record_of(way: Callable[[str], None], model: str) -> Any:
    from sglang.srt.entrypoints.engine import Engine

    Engine._launch_scheduler_processes = classmethod(keep_record)  # type: ignore[method-assign]
    try:
        way(model)
    except Launched as launched:
        return launched.args[0]
    raise AssertionError("it launched nothing")


class SilentScheduler:
    """What a launcher sees of a scheduler whose process loaded no plugin."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: True

    def recv(self) -> dict[str, Any]:
        return {"status": "ready", "max_total_num_tokens": 9, "max_req_input_len": 9}


def wait_for_silence(cls: Any, *args: Any, **kwargs: Any) -> Any:
    from sglang.srt.entrypoints import engine

    engine._wait_for_scheduler_ready([SilentScheduler()], [SilentScheduler()])
    raise AssertionError("it serves though its scheduler has no policy")


def with_a_silent_scheduler(way: Callable[[str], None], model: str) -> Any:
    from sglang.srt.entrypoints.engine import Engine

    Engine._launch_scheduler_processes = classmethod(wait_for_silence)  # type: ignore[method-assign]
    way(model)


def without_the_plugin_in_the_launcher(way: Callable[[str], None], model: str) -> Any:
    """Hand over what such a launcher sends to a scheduler in a process with the plugin."""
    os.environ["SGLANG_PLUGINS"] = "another"
    record = record_of(way, model)
    del os.environ["SGLANG_PLUGINS"]

    from rkv_sglang.integration.hooks.processes import start_scheduler

    return start_scheduler(lambda *args: None, None, pickle.loads(record))


def arrived(record: bytes) -> dict[str, Any]:
    """Read a record as a tokenizer worker does, which loads no plugins of its own."""
    import sglang.srt.managers.tokenizer_manager  # noqa: F401

    args = pickle.loads(record)

    from rkv_sglang.config import NO_POLICY
    from rkv_sglang.integration.hooking.install import is_applied
    from rkv_sglang.integration.hooks.answers import META_INFO_HOOKS
    from rkv_sglang.integration.startup.server_args import config_from_args, policy_name

    if policy_name(args) == NO_POLICY:
        return {"policy": NO_POLICY}
    config = config_from_args(args)
    return {
        "policy": config.policy,
        "budget": config.budget,
        "buffer": config.buffer,
        "hooks": all(map(is_applied, META_INFO_HOOKS)),
    }


def scheduler_of_a_launcher_without_the_plugin(model: str) -> Any:
    """Build a scheduler, in a process with the plugin, from a record that was pickled in one without it."""
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    args = ServerArgs(**common(model))
    load_plugins()
    return Scheduler(args, None)


def engine_whose_schedulers_say_nothing(model: str) -> Any:
    """Start as Ray's engine does: schedulers that are started and waited for in another way."""
    from sglang.srt.entrypoints.engine import Engine

    class Elsewhere(Engine):
        @classmethod
        def _launch_scheduler_processes(cls, *args: Any, **kwargs: Any) -> Any:
            infos = [{"max_req_input_len": 9}]
            return SimpleNamespace(scheduler_infos=infos, all_child_pids=[], wait_for_ready=lambda: None), None

        @classmethod
        def _launch_detokenizer_subprocesses(cls, **kwargs: Any) -> Any:
            return [], []

    Elsewhere(**common(model))


def refused_late(model: str) -> Any:
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import ServerArgs

    args = ServerArgs(**common(model), enable_lmcache=True)
    return record_of(lambda _: launch_server(args), model)


def main(model: str) -> None:
    import sglang
    import sglang.launch_server
    import sglang.srt.entrypoints.http_server
    import sglang.srt.managers.scheduler  # noqa: F401

    lines: dict[str, Any] = {}
    for variable, ways in ((FLAGS, list(WAYS)), ("", ["engine_from_a_record", "launch_of_a_record"])):
        os.environ["RKV_SGLANG_ARGS"] = variable
        records = {name: in_a_fork(lambda name=name: record_of(WAYS[name], model)) for name in ways}
        # Errors of those that launched nothing.
        found = {name: record for name, record in records.items() if isinstance(record, dict)}
        sent = {name: record for name, record in records.items() if name not in found}
        found |= in_a_fork(lambda sent=sent: {name: arrived(record) for name, record in sent.items()})
        lines |= {name if variable else f"{name} without the variable": result for name, result in found.items()}
    os.environ["RKV_SGLANG_ARGS"] = FLAGS
    for name, way in WAYS.items():
        for refused in (with_a_silent_scheduler, without_the_plugin_in_the_launcher):
            lines[f"{name} {refused.__name__}"] = in_a_fork(lambda way=way, refused=refused: refused(way, model))
    for refused in (scheduler_of_a_launcher_without_the_plugin, engine_whose_schedulers_say_nothing, refused_late):
        lines[refused.__name__] = in_a_fork(lambda refused=refused: refused(model))
    os.environ["RKV_SGLANG_ARGS"] = "--kv-policy rvk"
    lines["bad variable"] = in_a_fork(lambda: record_of(launch_of_a_record, model))
    print("RESULT" + json.dumps(lines, default=repr))


if __name__ == "__main__":
    main(sys.argv[1])
