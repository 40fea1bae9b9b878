"""The command ``rkv-sglang``."""

import argparse
from collections.abc import Sequence

from rkv_sglang import __version__
from rkv_sglang.integration.plan_command import add_plan_flags, print_plan


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status. ``argv`` is without the program's name."""
    parser = argparse.ArgumentParser(prog="rkv-sglang", description="SGLang with a bounded KV cache (R-KV).")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser(
        "doctor", help="check whether a server here could run with --kv-policy, and say why if not; --plan its memory"
    )
    add_plan_flags(doctor)
    options = parser.parse_args(argv)
    if options.plan:
        return print_plan(options)
    # Imported here so that --help does not wait for SGLang.
    from rkv_sglang.integration.doctor import diagnose

    return diagnose()


if __name__ == "__main__":
    raise SystemExit(main())
