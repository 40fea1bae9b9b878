"""How much does each KV policy at each budget change what a real pretrained model says?

    python -m benchmarks.quality --model .cache/models/SmolLM2-135M-Instruct
        [--policies rkv,random] [--budgets 64,128,256] [--num-prompts 32] [--num-tokens 336]
        [--parts forced,free,recall] [--recall-form mixed|early] [--batch-size 32] [--num-servers 1] [--prompts FILE]
        [--flags "..."] [--smoke] [--fresh]
    python -m benchmarks.quality --plot-only FOLDER

Real servers with the plugin generate every token, one server a policy; each request asks for its own budget (the
buffer is 16 tokens), or for none. The reference is the greedy answer of uncompressed requests; only the tokens
that would end it are passed over, so that every answer has ``--num-tokens`` tokens. A small model then often repeats
itself, which every cache can do: ``fresh`` rows leave repeated text out.

- forced: the reference's tokens are written for compressed requests too (``forcing.py``), so that both have the same
  past; their distributions are compared at every step. Rows ``none`` are uncompressed requests forced the same way on
  the same server: they must agree with the reference, or the run ends with an error.
- free: compressed requests answer greedily.
- recall: requests write a notebook (also forced) that states codes and repeats them later; recall is judged by the
  model's own choice of the digits that repeat a code. Where every digit is the most likely token, the unforced
  continuation is that code. With ``--recall-form early`` all codes are stated in the first quarter and asked for up to
  the end, behind lines like them of other stations; with ``--num-tokens`` 1000 or more they are then as many as 60
  compactions old.

Each server's part is kept in ``--work`` when done, and an interrupted run goes on behind it. The reference's
distributions take num_prompts * num_tokens * vocabulary * 4 bytes there until the run is complete.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common.arguments import add_model_arguments, benchmark_parser
from benchmarks.common.asking import entered_side_by_side
from benchmarks.common.prompts import PROMPTS, load_prompts
from benchmarks.common.schema import hardware_folder, run_info, write_table
from benchmarks.common.statistics import compactions_before
from benchmarks.common.tables import QUALITY_FORCED, QUALITY_FREE, QUALITY_POSITION, QUALITY_RECALL
from benchmarks.quality.report import markdown, plot
from benchmarks.quality.rows import forced_rows, free_rows, position_rows, recall_rows
from benchmarks.quality.run import Study, buffer_of, policy_server, run_part
from benchmarks.quality.statistics import first_compacted_step
from benchmarks.quality.texts import RECALL_FORMS, RECALL_QUESTION, recall_text
from devtools.chat import chat_ids
from devtools.launch import Server, ServerError, exit_on_first_signal
from rkv_sglang.config import NO_POLICY

PARTS = ("forced", "free", "recall")
ROWS = {
    "forced": ((QUALITY_FORCED, forced_rows), (QUALITY_POSITION, position_rows)),
    "free": ((QUALITY_FREE, free_rows),),
    "recall": ((QUALITY_RECALL, recall_rows),),
}
ENOUGH_COMPACTIONS = 4
SMOKE = {"policies": "rkv,random", "budgets": "24", "num_prompts": 2, "num_tokens": 96}


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options, lists split."""
    from rkv_sglang.policies import policy_names

    policies = [name for name in policy_names() if name != NO_POLICY]
    parser = benchmark_parser(__doc__, smoke="two policies, one budget, two prompts; into --work")
    add_model_arguments(parser, work=Path(".cache/quality"))
    parser.add_argument("--policies", default=",".join(policies), help="comma-separated, default %(default)s")
    parser.add_argument("--budgets", default="64,128,256", help="comma-separated, default %(default)s")
    parser.add_argument("--num-prompts", type=int, default=32, help="also of recall texts, default %(default)s")
    parser.add_argument("--num-tokens", type=int, default=336, help="of every answer, default %(default)s")
    parser.add_argument(
        "--recall-form", choices=RECALL_FORMS, default="mixed", help="where facts are stated, default %(default)s"
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, default %(default)s")
    parser.add_argument("--batch-size", type=int, default=32, help="requests at a time, default %(default)s")
    parser.add_argument("--num-servers", type=int, default=1, help="servers at a time, default %(default)s")
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="a question a line, or JSON lines with 'problem'")
    parser.add_argument("--flags", default="", help="further flags of all servers, in one string")
    parser.add_argument("--fresh", action="store_true", help="do not go on from what an earlier run left in --work")
    parser.set_defaults(all_policies=policies)
    options = parser.parse_args()
    if options.smoke:
        vars(options).update(SMOKE, out=options.out or options.work / "smoke")
    options.policies = options.policies.split(",")
    options.parts = options.parts.split(",")
    problem = _problem(options)
    if problem:
        parser.error(problem)
    return options


def _problem(options: argparse.Namespace) -> str | None:
    """Return one line on what is wrong with the options; splits the budgets."""
    for name, known in (("policies", options.all_policies), ("parts", PARTS)):
        unknown = [value for value in getattr(options, name) if value not in known]
        if unknown:
            return f"--{name} has {', '.join(unknown)}: choose from {', '.join(known)}"
    try:
        options.budgets = sorted({int(budget) for budget in options.budgets.split(",")})
    except ValueError:
        return f"--budgets {options.budgets!r} is no list of integers: give it as 64,128,256"
    most = options.budgets[-1]
    least_tokens = first_compacted_step(most, buffer_of(most)) + 1
    if options.num_tokens < least_tokens:
        return f"--num-tokens {options.num_tokens} ends before the first compaction: set it to {least_tokens} or more"
    return None


def make_study(options: argparse.Namespace) -> Study:
    """Return what is asked of every server; its folder is named by its contents, so other sizes get another.

    Raises:
        ValueError: There are too few prompts, or too little disk; one line.
    """
    from transformers import AutoConfig, AutoTokenizer

    if Path(options.model).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = [
        recall_text(tokenizer, options.num_tokens, seed, options.recall_form) for seed in range(options.num_prompts)
    ]
    prompts = [chat_ids(tokenizer, question) for question in load_prompts(options.prompts, options.num_prompts)]
    sizes = [(budget, buffer_of(budget)) for budget in options.budgets]
    content = (options.model, prompts, [text.tokens for text in texts], options.num_tokens, sizes)
    # Without, the folder has the name that it had before there were any.
    content += (options.flags,) if options.flags else ()
    folder = options.work / hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
    if options.fresh:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    size = options.num_prompts * options.num_tokens * AutoConfig.from_pretrained(options.model).vocab_size * 4
    if size > shutil.disk_usage(folder).free:
        raise ValueError(f"{folder} needs {size / 1e9:.1f} GB of free disk: name a folder on a larger one with --work")
    return Study(
        model=options.model,
        folder=folder,
        prompts=prompts,
        recall_prompt=chat_ids(tokenizer, RECALL_QUESTION),
        recall_texts=texts,
        end_ids=sorted(set(tokenizer.all_special_ids)),
        num_tokens=options.num_tokens,
        budgets=tuple(options.budgets),
        batch_size=options.batch_size,
        num_servers=options.num_servers,
        flags=tuple(shlex.split(options.flags)),
    )


def missing_parts(study: Study, policies: Sequence[str], parts: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Return by server the (policy, part) that it has yet to run; under ``none`` what is uncompressed."""
    missing = {
        policy: [(policy, part) for part in parts if not study.result(policy, part).exists()] for policy in policies
    }
    missing[NO_POLICY] = [
        *([(NO_POLICY, "reference")] if _needs_reference(study, missing, parts) else []),
        *([(NO_POLICY, "recall")] if "recall" in parts and not study.result(NO_POLICY, "recall").exists() else []),
    ]
    return {policy: todo for policy, todo in missing.items() if todo}


def _needs_reference(study: Study, missing: dict[str, list[tuple[str, str]]], parts: Sequence[str]) -> bool:
    if not {"forced", "free"} & set(parts):
        return False
    # The answers are kept; the distributions are deleted at the end of a run and made again when a part needs them.
    lost = not all(study.logprobs(i).exists() for i in range(len(study.prompts)))
    needed = any(part == "forced" for todo in missing.values() for _, part in todo)
    return not study.result(NO_POLICY, "reference").exists() or (needed and lost)


def measure(study: Study, policies: Sequence[str], parts: Sequence[str]) -> None:
    """Run what is missing, a server a policy and ``num_servers`` of them at a time; first what all others need."""
    missing = missing_parts(study, policies, parts)
    uncompressed = missing.pop(NO_POLICY, [])
    waits = study.num_servers > 1 and any(part == "reference" for _, part in uncompressed)
    if uncompressed and not waits:
        # No other server waits for it, so the first one goes on with its own parts: one start less.
        missing = {policies[0]: [*uncompressed, *missing.pop(policies[0], [])], **missing}
    elif uncompressed:
        _run_servers(study, {policies[0]: uncompressed})
    for policy in policies:
        if policy not in missing:
            print(f"{policy}: kept from an earlier run", flush=True)
    todo = list(missing.items())
    for start in range(0, len(todo), study.num_servers):
        _run_servers(study, dict(todo[start : start + study.num_servers]))


def _run_servers(study: Study, todo: dict[str, list[tuple[str, str]]]) -> None:
    """Run the (policy, part) of some servers side by side."""

    def run_all(server: Server, runs: Sequence[tuple[str, str]]) -> None:
        for whose, part in runs:
            run_part(server, whose, part, study)

    print(f"{', '.join(todo)}: starting ...", flush=True)
    # The servers end before the pool waits for its threads, so that an error or a signal ends them all.
    with (
        ThreadPoolExecutor(len(todo)) as pool,
        entered_side_by_side({policy: policy_server(study, policy) for policy in todo}) as servers,
    ):
        for done in as_completed([pool.submit(run_all, servers[policy], runs) for policy, runs in todo.items()]):
            done.result()


def write_results(study: Study, options: argparse.Namespace, folder: Path) -> None:
    """Write the CSVs and the plot, and print the tables."""
    made = {}
    for policy, part in [
        (NO_POLICY, "reference"),
        *((p, part) for p in [NO_POLICY, *options.policies] for part in PARTS),
    ]:
        if study.result(policy, part).exists():
            with np.load(study.result(policy, part)) as kept:
                made[f"{policy} {part}"] = json.loads(str(kept["made"]))
    wanted: dict[str, Any] = {name: str(value) for name, value in vars(options).items() if name != "all_policies"}
    info = run_info(**wanted, made=made)
    for part in options.parts:
        for table, rows_of in ROWS[part]:
            write_table(folder, table, rows_of(study, options.policies), info)
    print(f"\n{markdown(folder)}\n\n{plot(folder)}")


def main() -> int:
    """Run the benchmark from the command line."""
    options = parse_arguments()
    if options.plot_only:
        print(plot(options.plot_only))
        return 0
    exit_on_first_signal()
    try:
        study = make_study(options)
        for budget in study.budgets:
            count = compactions_before(study.num_tokens - 1, budget, buffer_of(budget))
            note = "" if count >= ENOUGH_COMPACTIONS else f" (fewer than {ENOUGH_COMPACTIONS}: give more --num-tokens)"
            print(f"budget {budget}: {count} compactions in {study.num_tokens} tokens{note}")
        measure(study, options.policies, options.parts)
    except (ServerError, ValueError) as error:
        print(f"quality: {error}", file=sys.stderr)
        return 1
    write_results(study, options, options.out or hardware_folder())
    shutil.rmtree(study.folder / "logprobs", ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
