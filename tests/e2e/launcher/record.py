"""Start a server as trainers do: in a spawned process, from a record made and resolved with no plugin loaded."""

import argparse
import multiprocessing
import sys
from typing import Any


def serve(args: Any) -> None:
    # uvicorn has its workers, of which each tokenizer worker is one, open the number of its own standard input. In a
    # process that was spawned that is a file of this process alone, and they would die, whatever they serve.
    sys.stdin = None
    from sglang.srt.entrypoints.http_server import launch_server

    launch_server(args)


if __name__ == "__main__":
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    args = ServerArgs.from_cli_args(parser.parse_args(sys.argv[1:]))
    args.resolve_once()
    assert "rkv_sglang" not in sys.modules
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(args,))
    process.start()
    process.join()
    sys.exit(process.exitcode)
