"""Start a server as trainers do: a record made with no plugin loaded, handed to a spawned process that launches it."""

import argparse
import multiprocessing
import sys

if __name__ == "__main__":
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    assert "rkv_sglang" not in sys.modules
    args = ServerArgs.from_cli_args(parser.parse_args(sys.argv[1:]))
    process = multiprocessing.get_context("spawn").Process(target=launch_server, args=(args,))
    process.start()
    process.join()
    sys.exit(process.exitcode)
