"""The command ``rkv-sglang``."""

import argparse
import os
import sys
from collections.abc import Sequence

from rkv_sglang import __version__
from rkv_sglang.patching.command import add_patch_flags, run_patch
from rkv_sglang.plan_command import add_plan_flags, print_plan
from rkv_sglang.prefix_command import add_prefix_flags, run_prefix
from rkv_sglang.view.command import add_view_flags, run_view

# As a shell reports what SIGPIPE ended.
_OUTPUT_CUT = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status. ``argv`` is without the program's name."""
    parser = argparse.ArgumentParser(prog="rkv-sglang", description="SGLang with a bounded KV cache (R-KV).")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser(
        "doctor", help="check whether a server here could run with --kv-policy, and say why if not; --plan its memory"
    )
    doctor.add_argument("--details", action="store_true", help="then list hooks, and what is supported and refused")
    doctor.add_argument(
        "--command", dest="command_line", help="a command line that starts a server: print every reason to refuse it"
    )
    doctor.add_argument(
        "--contract",
        nargs="?",
        const="",
        metavar="FOLDER",
        help="print every difference between what the plugin expects of SGLang and the one installed, or the one "
        "unpacked in FOLDER; nothing of it is imported",
    )
    doctor.add_argument("--model-config", help="with --command: a config.json in the place of the model's own")
    doctor.add_argument(
        "--hardware", metavar="GPU", help="with --command: the GPU that the launch is for, such as B200 or MI300X"
    )
    add_plan_flags(doctor)
    doctor.set_defaults(run=_doctor)
    view = commands.add_parser("view", help="write an HTML page that shows which tokens of an answer the cache kept")
    add_view_flags(view)
    view.set_defaults(run=run_view)
    prefix = commands.add_parser(
        "prefix", help="have a server compress a document once, under a name that requests share; list, delete"
    )
    add_prefix_flags(prefix)
    prefix.set_defaults(run=run_prefix)
    patch = commands.add_parser("patch", help="put the patches for SGLang into one on disk, take them out, or look")
    add_patch_flags(patch)
    patch.set_defaults(run=run_patch)
    options = parser.parse_args(argv)
    try:
        status = int(options.run(options))
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read, such as `head`, has enough; Python must not try again as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = _OUTPUT_CUT
    return status


def _doctor(options: argparse.Namespace) -> int:
    problem = None
    questions = {"--plan": options.plan, "--command": options.command_line is not None}
    questions["--contract"] = options.contract is not None
    asked = [flag for flag, is_asked in questions.items() if is_asked]
    if len(asked) > 1:
        problem = f"{' and '.join(asked)} are {len(asked)} questions: ask one at a time"
    elif options.model_config is not None and options.command_line is None:
        problem = "--model-config stands for the model of a --command: add --command"
    elif options.hardware is not None:
        problem = _hardware_problem(options)
    if problem is not None:
        print(problem, file=sys.stderr)
        return 1
    if options.plan:
        return print_plan(options)
    if options.contract is not None:
        from rkv_sglang.integration.doctor.contract import print_contract

        return print_contract(options.contract)
    # Imported here so that --help does not wait for SGLang.
    if options.command_line is not None:
        from rkv_sglang.integration.doctor.launch import check_command

        return check_command(options.command_line, options.model_config, hardware=options.hardware)
    from rkv_sglang.integration.doctor.report import diagnose

    status = diagnose()
    if options.details and status == 0:
        from rkv_sglang.integration.doctor.details import print_details

        print_details()
    return status


def _hardware_problem(options: argparse.Namespace) -> str | None:
    from rkv_sglang.integration.doctor.hardware import HARDWARE
    from rkv_sglang.messages import shown

    if options.command_line is None:
        return "--hardware names the GPU that a --command is for: add --command"
    if options.hardware not in HARDWARE:
        return f"--hardware {shown(options.hardware)} is not known: name one of {', '.join(HARDWARE)}"
    return None


if __name__ == "__main__":
    raise SystemExit(main())
