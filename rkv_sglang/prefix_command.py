"""``rkv-sglang prefix``: make, list and delete the named prefixes of a running server."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rkv_sglang.client.flags import add_server_flags, api_key_of
from rkv_sglang.client.prefixes import Prefixes
from rkv_sglang.config import BY_POLICY, BY_TASK, PREFIX_FIELD
from rkv_sglang.messages import one_line, shown
from rkv_sglang.user_files import check_flag_text, check_writable, read_flag_text
from rkv_sglang.view.record_text import text_trace
from rkv_sglang.view.trace import DOCUMENT, write_trace

ACTIONS = ("create", "list", "delete")


def add_prefix_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``prefix``."""
    parser.add_argument("action", choices=ACTIONS, help="make a prefix, show all there are, or give one up")
    add_server_flags(parser)
    parser.add_argument("--name", metavar="N", help="of the prefix; not with list")
    create = parser.add_argument_group("create")
    create.add_argument("--document", metavar="FILE", type=Path, help="what is compressed, a text file")
    create.add_argument("--budget", metavar="K", type=int, help="tokens of it that every layer and KV head keeps")
    create.add_argument("--task", metavar="FILE", type=Path, help="instructions and examples, which judge the document")
    create.add_argument(
        "--no-task", action="store_true", help="the document is judged by its own repetition, for whatever may come"
    )
    create.add_argument(
        "--judge",
        choices=(BY_POLICY, BY_TASK),
        help="by what the task judges: the server's policy (default), or all its attention",
    )
    create.add_argument(
        "--save-trace",
        metavar="FILE",
        type=Path,
        help="record what every head keeps, for rkv-sglang view --trace, on a server started with --kv-trace",
    )


def run_prefix(options: argparse.Namespace) -> int:
    """Do it and return the exit status: 1 after one line of what went wrong, 2 for flags that do not fit."""
    misuse = _misuse(options)
    if misuse is not None:
        print(f"rkv-sglang prefix: {misuse}", file=sys.stderr)
        return 2
    try:
        _run(options)
    except ValueError as error:
        print(f"rkv-sglang prefix: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"rkv-sglang prefix: {options.save_trace} cannot be written ({error.strerror})", file=sys.stderr)
        return 1
    return 0


def _misuse(options: argparse.Namespace) -> str | None:
    """Return what is wrong with the flags together, in one line; None if nothing is."""
    action = options.action
    of_create = {
        "--document": options.document,
        "--budget": options.budget,
        "--task": options.task,
        "--no-task": options.no_task or None,
        "--judge": options.judge,
        "--save-trace": options.save_trace,
    }
    wanted = {"--server": options.server}
    if action != "list":
        wanted["--name"] = options.name
    if action == "create":
        wanted |= {"--document": options.document, "--budget": options.budget}
    foreign = [flag for flag, value in of_create.items() if value is not None and action != "create"]
    foreign += ["--name"] if action == "list" and options.name is not None else []
    if foreign:
        return f"{foreign[0]} does not go with {action}: leave it out"
    missing = [flag for flag, value in wanted.items() if value is None]
    if missing:
        return f"{action} needs {' and '.join(missing)}"
    if action == "create" and (options.task is None) != options.no_task:
        return "create needs what judges the document: give either --task with a file, or --no-task"
    if options.no_task and options.judge is not None:
        return "--judge says how a task judges: leave it out with --no-task"
    return None


def _run(options: argparse.Namespace) -> None:
    if options.name is not None:
        check_flag_text("--name", options.name)
    texts = {flag: _text(flag, path) for flag, path in (("--document", options.document), ("--task", options.task))}
    if options.save_trace is not None:
        check_writable(options.save_trace)
    prefixes = Prefixes(options.server, api_key_of(options))
    if options.action == "create":
        made = _create(options, prefixes, texts["--document"] or "", texts["--task"])
        use = json.dumps({PREFIX_FIELD: options.name}, ensure_ascii=False)
        print(f"{_line(made)}; requests go on from it with custom_params {use}")
    elif options.action == "delete":
        prefixes.delete(options.name)
        print(f"{one_line(options.name)} is deleted")
    else:
        print("\n".join(map(_line, prefixes.list())) or "there are no named prefixes")


def _create(options: argparse.Namespace, prefixes: Prefixes, document: str, task: str | None) -> Any:
    """Make a prefix, keep the record of what it kept if that is wanted, and return what the server says of it."""
    path, tokenizer = options.save_trace, prefixes.tokenizer()
    ids = tokenizer.ids(document, special=True)
    task_ids = None if task is None else tokenizer.ids(task)
    meta_info = prefixes.create(options.name, ids, task_ids, options.budget, options.judge, traced=path is not None)
    if path is not None:
        write_trace(text_trace(options.server, DOCUMENT, prefixes.info, meta_info, ids, tokenizer), path)
    return meta_info[PREFIX_FIELD]


def _line(prefix: Any) -> str:
    """Return what the server says of a prefix as a line."""
    if not isinstance(prefix, Mapping) or not prefix.keys() >= {"name", "length", "budget"}:
        raise ValueError(f"the server speaks of a prefix unlike rkv_sglang: {shown(prefix)}")
    judge = f", judged by {one_line(prefix['judge'])}" if "judge" in prefix else ""
    return one_line(f"{prefix['name']}: {prefix['budget']} of {prefix['length']} tokens{judge}")


def _text(flag: str, path: Path | None) -> str | None:
    """Return a file's text; None without a file."""
    if path is None:
        return None
    text = read_flag_text(flag, path)
    if not text.strip():
        raise ValueError(f"{flag} {path} is empty: write some text into it")
    return text
