"""Does a bounded KV cache serve more, at equal memory, and from which pool size on?

    python -m benchmarks.serving [--model FOLDER] [--settings none,rkv:64:32] [--pools 640,1280,...] [--rounds 3]
        [--arrivals lockstep,poisson] [--rate 2] [--num-requests 24] [--prompt-len 32:64] [--output-len 256:512]
        [--shared-prompts 2] [--shared-len 32] [--turns 1] [--seed 0] [--out FOLDER] [--smoke]
    python -m benchmarks.serving --plot-only FOLDER

Starts one server per setting and pool and replays the same trace on each. Settings:

- ``none``: production SGLang, with radix cache, overlap scheduler and (on a GPU) CUDA graphs on. It is "the same flags"
  too: a server with a policy has these flags and ``--kv-policy``, budget and buffer; a policy turns nothing off.
- ``stock``: the same without the plugin's package loaded at all (``benchmarks.idle_cost`` measures that difference).
- ``fp8``: ``none`` with an fp8 KV cache, on a GPU only.
- ``POLICY:BUDGET:BUFFER``, such as ``rkv:1024:128``; with ``--kv-stagger`` if ``:stagger`` follows, and so on.

All have equal memory in total: a pool of 1 or more is a number of tokens without a policy, and a policy's own buffers
are taken off its pool; a pool below 1 is ``--mem-fraction-static``, for GPUs, and the plugin takes them off itself.
On a CPU the servers of one pool are up together and take turns; on a GPU each run has a server of its own. Every round
has a new trace, the same for all; the order of the settings turns round from round to round, the prefix cache is
emptied before each run, and ratios are taken within a round.

Writes ``serving.csv`` (columns in ``common/tables.py``), ``serving.json`` and ``serving.png``.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.common.arguments import benchmark_parser, refuse_to_overwrite
from benchmarks.common.schema import hardware_folder, read_table, run_info
from benchmarks.common.tables import SERVING
from benchmarks.serving.report import plot, summary
from benchmarks.serving.run import make_bench, measure, trace_spec
from benchmarks.serving.servers import parse_setting
from benchmarks.serving.trace import ARRIVALS
from devtools.launch import ServerError, exit_on_first_signal, has_gpu

SMOKE: dict[str, Any] = {
    "pools": "768",
    "rounds": 1,
    "num_requests": 4,
    "turns": 2,
    "prompt_len": (8, 16),
    "output_len": (64, 96),
    "settings": "none,rkv:24:16",
}


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options, lists split and checked."""
    parser = benchmark_parser(__doc__, smoke="one small pool and round, two turns; needs --out")
    parser.add_argument("--model", help="folder or hub name; the default is a tiny random Llama")
    parser.add_argument("--settings", default="none,rkv:64:32", help="comma-separated, default %(default)s")
    parser.add_argument("--pools", default="640,1280,2560,5120,8192,12288", help="comma-separated, default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--arrivals", default="lockstep", help="lockstep, poisson or both, default %(default)s")
    parser.add_argument("--rate", type=float, default=2.0, help="conversations a second (poisson), default %(default)s")
    parser.add_argument("--num-requests", type=int, default=24, help="conversations of a trace, default %(default)s")
    parser.add_argument("--turns", type=int, default=1, help="requests of a conversation, default %(default)s")
    parser.add_argument("--prompt-len", type=_range, default=(32, 64), help="new tokens of a turn, default 32:64")
    parser.add_argument("--output-len", type=_range, default=(256, 512), help="tokens of an answer, default 256:512")
    parser.add_argument("--shared-prompts", type=int, default=2, help="prompts shared by conversations, default 2")
    parser.add_argument("--shared-len", type=int, default=32, help="tokens of a shared prompt, default %(default)s")
    parser.add_argument(
        "--questions", type=Path, help="real prompts instead of random tokens: one a line, or JSON lines"
    )
    parser.add_argument("--natural-end", action="store_true", help="answers may end before their length")
    parser.add_argument("--server-flags", default="", help="more flags of every server, in one string")
    parser.add_argument("--seed", type=int, default=0, help="of the traces, default %(default)s")
    parser.add_argument(
        "--timeout", type=float, default=3600, help="seconds that one run may take, default %(default)s"
    )
    parser.add_argument("--plot-only", type=Path, metavar="FOLDER", help="only read and draw the CSV of a folder again")
    options = parser.parse_args()
    if options.smoke:
        refuse_to_overwrite(parser, options)
        vars(options).update(SMOKE)
    try:
        check(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def _range(text: str) -> tuple[int, int]:
    """Return the ends of ``a:b`` or ``a``."""
    ends = [int(end) for end in text.split(":")]
    if len(ends) > 2 or not 1 <= ends[0] <= ends[-1]:
        raise argparse.ArgumentTypeError(f"{text!r} is not LEAST:MOST")
    return ends[0], ends[-1]


def check(options: argparse.Namespace) -> None:
    """Split the lists of the options.

    Raises:
        ValueError: They make no sense together; one line.
    """
    options.arrivals = options.arrivals.split(",")
    unknown = sorted(set(options.arrivals) - set(ARRIVALS))
    if unknown:
        raise ValueError(f"--arrivals has {', '.join(unknown)}: choose from {', '.join(ARRIVALS)}")
    options.pools = sorted({float(pool) for pool in options.pools.split(",")})
    options.settings = [parse_setting(name) for name in options.settings.split(",")]
    longest = trace_spec(options, options.arrivals[0]).longest
    # SGLang admits a request only if two slots stay free behind it.
    too_small = [pool for pool in options.pools if 1 <= pool < longest + 2]
    if too_small and not options.questions:
        raise ValueError(
            f"--pools {too_small[0]:g} does not hold one conversation of up to {longest} tokens without a policy: "
            f"leave out what is below {longest + 2}"
        )
    if options.pools[0] < 1 and not has_gpu():
        raise ValueError(f"--pools {options.pools[0]:g} is a share of GPU memory: give numbers of tokens on a CPU")


def main() -> int:
    """Run the benchmark from the command line."""
    options = parse_arguments()
    if options.plot_only:
        print(f"{summary(read_table(options.plot_only, SERVING))}\n\n{plot(options.plot_only)}")
        return 0
    exit_on_first_signal()
    out = options.out or hardware_folder()
    try:
        bench = make_bench(options)
        settings = {name: str(value) for name, value in vars(options).items() if name != "settings"}
        flags = {setting.name: [*bench.server_flags, *setting.flags] for setting in options.settings}
        measure(bench, out, run_info(**settings, server_flags_by_setting=flags))
    except (ServerError, ValueError, OSError) as error:
        print(f"serving: {error}", file=sys.stderr)
        return 1
    print(f"\n{summary(read_table(out, SERVING))}\n\n{plot(out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
