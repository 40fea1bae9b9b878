"""``rkv-sglang view``: record an answer, or take recorded ones, and write a page that shows what the cache kept."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from rkv_sglang.client.flags import add_server_flags, api_key_of
from rkv_sglang.user_files import check_flag_text, check_writable, read_flag_text
from rkv_sglang.view.page import page_html
from rkv_sglang.view.record import record
from rkv_sglang.view.record_text import record_prompt
from rkv_sglang.view.trace import ANSWER, Trace, read_trace, write_trace


def add_view_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``view``."""
    live = parser.add_argument_group("record from a server started with --kv-policy and --kv-trace")
    add_server_flags(live)
    live.add_argument("--prompt", metavar="TEXT", help="the prompt, sent as it is, without a chat template")
    live.add_argument("--prompt-file", metavar="FILE", type=Path, help="the prompt as a text file, instead of --prompt")
    live.add_argument(
        "--prompt-budget", metavar="N", type=int, help="keep N tokens of the prompt, and show it instead of the answer"
    )
    live.add_argument("--max-new-tokens", metavar="N", type=int, help="tokens to generate at most; default 512")
    live.add_argument("--temperature", metavar="X", type=float, help="of the sampling; default 0, the likeliest token")
    live.add_argument("--save-trace", metavar="FILE", type=Path, help="also keep the recording, for --trace")
    saved = parser.add_argument_group("or show what was recorded")
    saved.add_argument(
        "--trace", metavar="FILE", type=Path, action="append", help="a recording; give two to compare them"
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, default=Path("kv-view.html"), help="the page; default %(default)s"
    )


def run_view(options: argparse.Namespace) -> int:
    """Write the page and return the exit status: 1 after one line of what went wrong, 2 for flags that do not fit."""
    misuse = _misuse(options)
    if misuse is not None:
        print(f"rkv-sglang view: {misuse}", file=sys.stderr)
        return 2
    try:
        # Before the recording, which may take minutes and would be lost.
        for path in filter(None, (options.output, options.save_trace)):
            check_writable(path)
        traces = [read_trace(path) for path in options.trace] if options.trace else [_recorded(options)]
        page = page_html(traces)
        if options.save_trace:
            write_trace(traces[0], options.save_trace)
        options.output.write_text(page, encoding="utf-8")
    except ValueError as error:
        print(f"rkv-sglang view: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        # A full disk names no file.
        print(f"rkv-sglang view: {error.filename or 'a file'} cannot be written ({error.strerror})", file=sys.stderr)
        return 1
    print(f"{options.output}: {' and '.join(_summary(trace) for trace in traces)}")
    return 0


def _misuse(options: argparse.Namespace) -> str | None:
    """Return what is wrong with the flags together, in one line; None if nothing is."""
    recording = {
        "--api-key": options.api_key,
        "--prompt": options.prompt,
        "--prompt-file": options.prompt_file,
        "--prompt-budget": options.prompt_budget,
        "--max-new-tokens": options.max_new_tokens,
        "--temperature": options.temperature,
        "--save-trace": options.save_trace,
    }
    given = [flag for flag, value in recording.items() if value is not None]
    if (options.server is None) == (options.trace is None):
        return "give either --server to record an answer or --trace to show a recorded one"
    if options.trace is not None and len(options.trace) > 2:
        return f"--trace is given {len(options.trace)} times: one trace is shown, or two side by side"
    if options.trace is not None and given:
        return f"{given[0]} belongs to --server: leave it out with --trace"
    if options.server is not None and (options.prompt is None) == (options.prompt_file is None):
        return "--server needs a prompt: give either --prompt or --prompt-file"
    files = [
        path.resolve() for path in [options.output, options.save_trace, *(options.trace or [])] if path is not None
    ]
    if options.output.resolve() in files[1:]:
        return f"-o {options.output} is the trace's own file: name another for the page"
    return None


def _recorded(options: argparse.Namespace) -> Trace:
    budget = options.prompt_budget
    return (record if budget is None else partial(record_prompt, budget=budget))(
        options.server,
        _prompt(options),
        max_new_tokens=512 if options.max_new_tokens is None else options.max_new_tokens,
        temperature=0.0 if options.temperature is None else options.temperature,
        api_key=api_key_of(options),
    )


def _prompt(options: argparse.Namespace) -> str:
    if options.prompt_file is None:
        prompt = str(options.prompt)
    else:
        prompt = read_flag_text("--prompt-file", options.prompt_file)
    if not prompt:
        raise ValueError("the prompt is empty: give --prompt or --prompt-file some text")
    check_flag_text("--prompt", prompt)
    return prompt


def _summary(trace: Trace) -> str:
    if trace.subject != ANSWER:
        return f"{trace.budget} of {len(trace.tokens)} tokens of the {trace.subject} ({trace.policy})"
    return f"{len(trace.tokens)} tokens, {len(trace.compactions)} compactions ({trace.policy})"
