"""Start a server as trainers do: from a record made and resolved with no plugin loaded."""

import argparse
import sys

if __name__ == "__main__":
    from sglang.srt.entrypoints.http_server import launch_server
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    args = ServerArgs.from_cli_args(parser.parse_args(sys.argv[1:]))
    args.resolve_once()
    assert "rkv_sglang" not in sys.modules
    launch_server(args)
