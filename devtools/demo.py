"""Ask one question of two real servers, without and with R-KV, and print what differed in one table.

Usage: ``python -m devtools.demo --model M``; ``make demo`` sets everything up and runs it on the small model.
"""

import argparse
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from devtools.chat import chat_ids
from devtools.launch import Server, ServerError, exit_on_first_signal, has_gpu, launched_server
from rkv_sglang.user_files import read_text, reason

LOG_DIR = Path(".cache/logs")
# SGLang prints the KV tokens in use at every decode step when asked to; nothing is sampled or estimated.
DECODE_LINE = re.compile(r"Decode batch.*?#(?:full )?token: (\d+)")


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one server did with the question. ``stats`` are the plugin's counters, empty without the plugin."""

    policy: str
    prompt_tokens: int
    output_ids: list[int]
    text: str
    peak_kv_tokens: int
    tokens_per_s: float
    stats: dict[str, int]


def policy_stats(server: Server) -> dict[str, int]:
    """Return the counters that the plugin adds to ``GET /server_info``, or nothing."""
    states: list[dict[str, Any]] = server.get_json("/server_info").get("internal_states") or [{}]
    return states[0].get("kv_policy_stats") or {}


def ask(server: Server, policy: str, input_ids: list[int], new_tokens: int) -> Run:
    """Generate greedily, with a progress bar, and read the server's own account of it."""
    log_start = server.log_path.stat().st_size
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    output_ids: list[int] = []
    text = ""
    first = last = (0, time.monotonic())
    # In a file every refresh is one more line, so there they are rare.
    refresh_s = 0.5 if sys.stdout.isatty() else 20
    with tqdm(total=new_tokens, desc=policy, unit="tok", file=sys.stdout, mininterval=refresh_s, ncols=80) as progress:
        for event in server.stream_generate({"input_ids": input_ids, "sampling_params": sampling}):
            output_ids, text = event["output_ids"], event["text"]
            last = (len(output_ids), time.monotonic())
            # The clock starts at the first token: reading the prompt is not part of the rate.
            first = first if first[0] else last
            progress.update(len(output_ids) - progress.n)
    stats = policy_stats(server)
    log = server.log_path.read_bytes()[log_start:].decode(errors="replace")
    counts = [int(count) for count in DECODE_LINE.findall(log)]
    if not counts:
        raise ServerError(f"the server logged no decode step; its log: {server.log_path}")
    return Run(
        policy=policy,
        prompt_tokens=len(input_ids),
        output_ids=output_ids,
        text=text,
        peak_kv_tokens=max(counts),
        tokens_per_s=(last[0] - first[0]) / max(last[1] - first[1], 1e-9),
        stats=stats,
    )


def common_prefix_len(first: Any, second: Any) -> int:
    """Return how many leading items two sequences share."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def table(runs: list[Run]) -> str:
    """Return the runs as aligned columns."""
    rows = [
        ("KV policy", [run.policy for run in runs]),
        ("prompt tokens", [run.prompt_tokens for run in runs]),
        ("tokens generated", [len(run.output_ids) for run in runs]),
        ("peak KV tokens held", [run.peak_kv_tokens for run in runs]),
        ("compactions", [run.stats.get("compactions", "-") for run in runs]),
        ("KV tokens evicted", [run.stats.get("evicted_tokens", "-") for run in runs]),
        ("tokens/s", [f"{run.tokens_per_s:.1f}" for run in runs]),
    ]
    width = max(12, *(len(run.policy) + 2 for run in runs))
    return "\n".join(f"{name:<20}" + "".join(f"{value!s:>{width}}" for value in values) for name, values in rows)


def comparison(first: Run, second: Run) -> str:
    """Return where two texts part, and how each one ends."""
    same_ids = common_prefix_len(first.output_ids, second.output_ids)
    same_chars = common_prefix_len(first.text, second.text)
    if first.output_ids == second.output_ids:
        verdict = f"The two answers are identical ({same_ids} tokens)."
    else:
        verdict = f"The two answers are identical for {same_ids} tokens ({same_chars} characters), then differ:"
    lines = [verdict]
    if first.output_ids != second.output_ids:
        lines += [
            f"  {run.policy:<6} ...{run.text[max(0, same_chars - 30) : same_chars + 50]!r}" for run in (first, second)
        ]
    lines.append("Last lines:")
    lines += [f"  {run.policy:<6} {(run.text.strip().splitlines() or [''])[-1][-110:]!r}" for run in (first, second)]
    return "\n".join(lines)


def broken_promise(run: Run, new_tokens: int, budget: int, buffer: int) -> str | None:
    """Return one line when a run did not do what it should have, so that a table never hides it."""
    if len(run.output_ids) != new_tokens:
        return f"{run.policy}: {len(run.output_ids)} tokens generated instead of {new_tokens}"
    if run.policy == "none":
        return None
    if new_tokens > budget + buffer and run.stats.get("compactions") == 0:
        return f"{run.policy}: the cache was never compacted"
    most = run.prompt_tokens + budget + buffer
    if run.peak_kv_tokens > most:
        return f"{run.policy}: {run.peak_kv_tokens} KV tokens held, more than prompt + budget + buffer = {most}"
    return None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--policies", default="none,rkv", help="comma-separated, default %(default)s")
    parser.add_argument("--prompt-file", type=Path, default=Path(__file__).with_name("demo_prompt.txt"))
    parser.add_argument("--new-tokens", type=int, default=1024)
    parser.add_argument("--kv-budget", type=int, default=192)
    parser.add_argument("--kv-buffer", type=int, default=64)
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    exit_on_first_signal()
    if Path(options.model).is_dir():
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    try:
        question = read_text(options.prompt_file).strip()
    except (OSError, ValueError) as error:
        print(f"demo: --prompt-file {options.prompt_file} cannot be read ({reason(error)})", file=sys.stderr)
        return 1
    input_ids = chat_ids(AutoTokenizer.from_pretrained(options.model), question)
    print(f"Question ({len(input_ids)} tokens with the chat template):\n{question}\n", flush=True)
    policy_flags = ["--kv-budget", str(options.kv_budget), "--kv-buffer", str(options.kv_buffer)]
    runs: list[Run] = []
    try:
        for policy in options.policies.split(","):
            print(f"starting SGLang on the {'GPU' if has_gpu() else 'CPU'}, KV policy {policy} ...", flush=True)
            # Without a policy no flag is given: that server is SGLang as it is.
            flags = [] if policy == "none" else ["--kv-policy", policy, *policy_flags]
            log_path = LOG_DIR / f"demo-{len(runs)}-{policy}.log"
            with launched_server(options.model, "--decode-log-interval", "1", *flags, log_path=log_path) as server:
                runs.append(ask(server, policy, input_ids, options.new_tokens))
    except ServerError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    print(f"\n{table(runs)}\n")
    for other in runs[1:]:
        print(comparison(runs[0], other))
    broken = [broken_promise(run, options.new_tokens, options.kv_budget, options.kv_buffer) for run in runs]
    for line in filter(None, broken):
        print(f"demo: {line}", file=sys.stderr)
    return 1 if any(broken) else 0


if __name__ == "__main__":
    sys.exit(main())
