"""What is a named prefix worth to many requests over one document, and what does it lose?

    python -m benchmarks.prefixes [--parts load,recall] [--out FOLDER] [--smoke]
        [--model M] [--setting rkv:64:32] [--document-len 4000] [--kept 250,500,1000] [--num-requests 64]
        [--prompt-len 32] [--num-tokens 256] [--pool 6144] [--rounds 3]
        [--models M,M] [--policies rkv,snapkv,random_attention] [--documents 24] [--facts 10] [--recall-len 1000]
        [--recall-kept 125,250,500] [--flags "--attention-backend triton"]

- load: 64 requests at once over one document, each with a prompt of its own. The document stands in front of every
  prompt and in the radix cache, on a server without a policy and on one with it; or it is held in a named prefix of so
  many tokens. All servers have the same pool. Throughput, time to the first token, slots in use. Tokens are random, so
  nothing is said of answers.
- recall: notebooks in which codes of stations stand among remarks; each code is asked for behind the whole document,
  the last tokens of it as text (truncated), or a named prefix. The prefix is made with the task known (the same words
  as in front of every question, with two examples that are not asked for), judged by the policy of the server or by all
  of the task (task); or without, by a repetition of the document (repeat). ``random_attention`` is a random draw in
  every head. The greedy answer must begin with the code.

Writes ``prefix_load.csv`` and ``prefix_recall.csv`` (columns in ``common/tables.py``), a JSON of each and
``prefixes.png``.
"""

import argparse
import shlex
import sys
from pathlib import Path

from benchmarks.common.arguments import SMALL_MODEL, benchmark_parser
from benchmarks.common.schema import hardware_folder, run_info, write_table
from benchmarks.common.settings import parse_setting
from benchmarks.common.tables import PREFIX_LOAD, PREFIX_RECALL
from benchmarks.prefixes import load, recall
from benchmarks.prefixes.report import markdown, plot
from benchmarks.prefixes.servers import Servers
from devtools.launch import ServerError, exit_on_first_signal

PARTS = ("load", "recall")
NUMBERS = {
    "--document-len": 4000,
    "--num-requests": 64,
    "--prompt-len": 32,
    "--num-tokens": 256,
    "--pool": 6144,
    "--rounds": 3,
    "--documents": 24,
    "--facts": 10,
    "--recall-len": 1000,
}
SMOKE = {
    "document_len": 200,
    "kept": "40,80",
    "num_requests": 8,
    "prompt_len": 16,
    "num_tokens": 48,
    "pool": 1024,
    "rounds": 1,
    "setting": "rkv:24:16:window=8",
    "policies": "rkv",
    "documents": 2,
    "facts": 2,
    "recall_len": 150,
    "recall_kept": "60",
}


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options, lists split and settings made."""
    parser = benchmark_parser(__doc__, smoke="both parts with a tiny model and two servers; into .cache/prefixes")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, default %(default)s")
    for flag, default in NUMBERS.items():
        parser.add_argument(flag, type=int, default=default, help="default %(default)s")
    parser.add_argument("--model", help="of load: folder or hub name, default a tiny random one")
    parser.add_argument("--setting", default="rkv:64:32", help="of load, default %(default)s")
    parser.add_argument("--kept", default="250,500,1000", help="of load, comma-separated, default %(default)s")
    parser.add_argument("--models", default=SMALL_MODEL, help="of recall, comma-separated, default %(default)s")
    parser.add_argument(
        "--policies", default="rkv,snapkv,random_attention", help="of recall, comma-separated, default %(default)s"
    )
    parser.add_argument("--recall-kept", default="125,250,500", help="comma-separated, default %(default)s")
    parser.add_argument("--flags", default="", help="further flags of all servers, in one string")
    parser.add_argument("--plot-only", type=Path, metavar="FOLDER", help="only draw the CSVs of a folder again")
    options = parser.parse_args()
    if options.smoke:
        vars(options).update(SMOKE, out=options.out or Path(".cache/prefixes"))
    try:
        _split(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def _split(options: argparse.Namespace) -> None:
    """Make lists and settings of the options' texts.

    Raises:
        ValueError: One of them is none, or does not fit another; one line.
    """
    options.parts = options.parts.split(",")
    if unknown := [part for part in options.parts if part not in PARTS]:
        raise ValueError(f"--parts has {', '.join(unknown)}: choose from {', '.join(PARTS)}")
    for name in ("kept", "recall_kept"):
        text, flag = getattr(options, name), f"--{name.replace('_', '-')}"
        try:
            setattr(options, name, sorted({int(number) for number in text.split(",")}))
        except ValueError:
            raise ValueError(f"{flag} {text!r} is no list of integers: give it as 250,500") from None
    if any(getattr(options, flag[2:].replace("-", "_")) < 1 for flag in NUMBERS):
        raise ValueError(f"{', '.join(NUMBERS)} are numbers of at least 1")
    options.setting = parse_setting(options.setting)
    options.server_flags = tuple(shlex.split(options.flags))
    options.models = options.models.split(",")
    options.policies = recall.policy_servers(options.policies.split(","))
    if problem := load.setting_problem(options.setting):
        raise ValueError(problem)
    for kept, length, flag in (
        (options.kept, options.document_len, "--kept"),
        (options.recall_kept, options.recall_len, "--recall-kept"),
    ):
        if not kept[-1] < length:
            raise ValueError(f"{flag} {kept[-1]} leaves nothing out of a document of {length} tokens: set it lower")
    if options.pool < (least := load.least_pool(options)):
        raise ValueError(f"--pool {options.pool} has no room to make the largest prefix: set it to {least} or more")


def main() -> int:
    """Run the benchmark from the command line."""
    options = parse_arguments()
    if options.plot_only:
        print(plot(options.plot_only))
        return 0
    exit_on_first_signal()
    if options.model is None:
        from devtools.tiny_models import BENCHMARK_MODEL, tiny_model_path

        options.model = str(tiny_model_path(BENCHMARK_MODEL))
    pool = ("--max-total-tokens", str(options.pool), "--max-running-requests", str(options.num_requests))
    load_flags = (*pool, "--context-length", str(load.context_len(options)), *options.server_flags)
    recall_flags: tuple[str, ...] = options.server_flags
    if options.smoke:
        # One server serves both parts: a start takes longer than all else.
        options.models, options.policies = [options.model], [options.setting]
        load_flags = recall_flags = (*pool, "--context-length", str(options.pool), *options.server_flags)
    out = options.out or hardware_folder()
    told = {
        name: str(value) for name, value in vars(options).items() if name not in ("setting", "policies", "server_flags")
    }
    told |= {"setting": options.setting.name, "policies": ",".join(setting.name for setting in options.policies)}
    try:
        with Servers.ended_at_last() as servers:
            if "load" in options.parts:
                rows = load.measure(options, servers, load_flags)
                write_table(out, PREFIX_LOAD, rows, run_info(**told))
            if "recall" in options.parts:
                rows = recall.measure(options, servers, recall_flags)
                write_table(out, PREFIX_RECALL, rows, run_info(**told))
    except (ServerError, ValueError) as error:
        print(f"prefixes: {error}", file=sys.stderr)
        return 1
    print(f"\n{markdown(out)}\n\n{plot(out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
