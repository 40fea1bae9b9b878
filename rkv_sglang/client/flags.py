"""Flags of the commands that talk to a running server."""

import argparse
import os

from rkv_sglang.client.server import API_KEY_VARIABLE


def add_server_flags(parser: argparse._ActionsContainer) -> None:
    """Add the flags that say which server, and its key."""
    parser.add_argument("--server", metavar="URL", help="its address, such as http://127.0.0.1:30000")
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"its --api-key; others cannot see it in the variable {API_KEY_VARIABLE}"
    )


def api_key_of(options: argparse.Namespace) -> str | None:
    """Return the server's key: the flag's, else the variable's; None if there is none."""
    return options.api_key or os.environ.get(API_KEY_VARIABLE)
