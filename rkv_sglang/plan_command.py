"""``rkv-sglang doctor --plan``: how many requests fit into a KV cache, by arithmetic on a model's configuration."""

from __future__ import annotations

import argparse
import math
import re
import sys
from typing import Any, TextIO

from rkv_sglang.config import GRANULARITIES, REQUEST, PolicyConfig
from rkv_sglang.policy_names import BLIND_NAMES, OWN_NAMES
from rkv_sglang.sizes.compaction_plan import block_of_pages
from rkv_sglang.sizes.memory_plan import ModelShape, pool_tokens, requests_at_once

GIB = 2**30


def add_plan_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``--plan`` to the doctor's parser."""
    group = parser.add_argument_group("plan")
    group.add_argument("--plan", action="store_true", help="print how many requests fit at once, instead of the check")
    group.add_argument("--model-path", help="a folder with a config.json, or a name on the Hugging Face Hub")
    group.add_argument(
        "--kv-gib", type=float, nargs="+", default=[8.0, 24.0, 60.0], help="memory for the KV cache of one rank, in GiB"
    )
    group.add_argument("--policy", choices=OWN_NAMES, default=PolicyConfig.policy, help="as the server's --kv-policy")
    group.add_argument(
        "--granularity",
        choices=GRANULARITIES,
        default=PolicyConfig.granularity,
        help="as the server's --kv-granularity",
    )
    group.add_argument("--budget", type=int, nargs="+", default=[512, 1024, 2048], help="budgets, in tokens")
    group.add_argument("--buffer", type=int, default=PolicyConfig.buffer, help="buffer, in tokens")
    group.add_argument("--window", type=int, default=PolicyConfig.window, help="window, in tokens")
    group.add_argument(
        "--prompt-budget", type=int, default=0, help="as the server's --kv-prompt-budget, 0 to keep prompts whole"
    )
    group.add_argument("--prompt-len", type=int, default=512, help="tokens of a prompt")
    group.add_argument("--output-len", type=int, default=16384, help="tokens that a request generates")
    group.add_argument("--page-size", type=int, default=1, help="as the server's")
    group.add_argument("--tp-size", type=int, default=1, help="as the server's")
    group.add_argument(
        "--kv-itemsize",
        type=int,
        default=None,
        help="bytes of a cached number, 1 for fp8; by default what the server takes for the model by itself",
    )


def _check_sizes(options: argparse.Namespace) -> None:
    """Refuse sizes out of range, by the flags of this command.

    Raises:
        ValueError: The first one, in one line.
    """
    for name in ("prompt_len", "output_len", "page_size", "tp_size", "kv_itemsize"):
        value, flag = getattr(options, name), "--" + name.replace("_", "-")
        if value is not None and value < 1:
            raise ValueError(f"{flag} {value} is not an integer of at least 1: set {flag} 1 or more")
    for gib in options.kv_gib:
        if not (gib > 0 and math.isfinite(gib * GIB)):
            raise ValueError(f"--kv-gib {gib:g} is no amount of memory: set --kv-gib to a number above 0")


def _check_heads(num_qo_heads: int, num_kv_heads: int, tp_size: int) -> None:
    """Refuse to share heads among ranks in a way that SGLang would not.

    Raises:
        ValueError: They cannot be shared; one line.
    """

    def fits(ranks: int) -> bool:
        return num_qo_heads % ranks == 0 and (num_kv_heads % ranks == 0 or ranks % num_kv_heads == 0)

    if not fits(tp_size):
        sizes = [str(ranks) for ranks in range(1, num_qo_heads + 1) if fits(ranks)]
        raise ValueError(
            f"--tp-size {tp_size} does not share {num_qo_heads} query heads and {num_kv_heads} KV heads evenly: "
            f"set --tp-size to one of {', '.join(sizes)}"
        )


def asks_for_fp8_kv(config: Any) -> bool:
    """Return whether a checkpoint's configuration asks for its KV to be kept in fp8, as SGLang reads it."""
    asked = getattr(config, "quantization_config", None)
    if not isinstance(asked, dict):
        return False
    scheme, method = asked.get("kv_cache_scheme"), str(asked.get("quant_method", "modelopt"))
    if not isinstance(scheme, dict) or not method.startswith(("modelopt", "compressed")):
        return not method.startswith("compressed") and str(asked.get("kv_cache_quant_algo")).upper() == "FP8"
    is_fp8 = scheme.get("type") == "float" and scheme.get("num_bits") == 8
    is_one_factor = scheme.get("strategy") == "tensor" and scheme.get("symmetric", True) and not scheme.get("dynamic")
    return bool(is_fp8 and (is_one_factor or method.startswith("modelopt")))


def model_shape(model_path: str, tp_size: int, kv_itemsize: int | None) -> ModelShape:
    """Read a model's shape from its Hugging Face configuration.

    Raises:
        ValueError: There is no configuration, it is not that of plain attention, or its heads cannot be shared among
            so many ranks; one line.
    """
    # transformers warns of missing files and versions on the way.
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--model-path {model_path} has no usable configuration ({reason}): name a folder with a "
            "config.json or a model on the Hub"
        ) from error
    own_kv_itemsize = 1 if asks_for_fp8_kv(config) else None
    config = config.get_text_config()
    num_qo_heads = getattr(config, "num_attention_heads", None)
    if num_qo_heads is None or getattr(config, "kv_lora_rank", None):
        raise ValueError(f"--model-path {model_path} has no plain attention heads, so no policy can serve it")
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_qo_heads
    _check_heads(num_qo_heads, num_kv_heads, tp_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_qo_heads
    dtype = getattr(config, "dtype", None)
    itemsize = dtype.itemsize if dtype is not None else 2
    return ModelShape(
        num_layers=config.num_hidden_layers,
        num_qo_heads=num_qo_heads // tp_size,
        # Fewer KV heads than ranks are held by several ranks each.
        num_kv_heads=max(1, num_kv_heads // tp_size),
        head_dim=head_dim,
        v_head_dim=head_dim,
        kv_itemsize=kv_itemsize or own_kv_itemsize or itemsize,
        query_itemsize=itemsize,
    )


def print_plan(options: argparse.Namespace, out: TextIO | None = None) -> int:
    """Print the table as Markdown and return the exit status; a bad option gives one line and 1."""
    try:
        if options.model_path is None:
            raise ValueError("--plan needs a model: add --model-path")
        _check_sizes(options)
        shape = model_shape(options.model_path, options.tp_size, options.kv_itemsize)
        configs = [
            PolicyConfig(
                policy=options.policy,
                granularity=options.granularity,
                budget=budget,
                buffer=options.buffer,
                window=options.window,
                prompt_budget=options.prompt_budget,
                block=block_of_pages(options.page_size) if options.granularity == REQUEST else 1,
            )
            for budget in options.budget
        ]
    except ValueError as error:
        # The settings name a server's flags.
        print(re.sub(r"--kv-(budget|buffer|granularity|prompt-budget|window)\b", r"--\1", str(error)), file=sys.stderr)
        return 1
    print(
        f"{shape.kv_bytes / 1024:.0f} KiB of KV per token and rank; requests of {options.prompt_len} prompt tokens and "
        f"{options.output_len} new ones, page size {options.page_size}, buffer {options.buffer}; "
        f"{'nothing' if _looks_at_nothing(options) else 'the queries of the window'} beside the cache\n",
        file=out,
    )
    print("| KV memory | without a policy |" + "".join(f" budget {config.budget} |" for config in configs), file=out)
    print("|---|---|" + "---|" * len(configs), file=out)
    for gib in options.kv_gib:
        counts = [_count(shape, int(gib * GIB), config, options) for config in [None, *configs]]
        cells = [str(counts[0])] + [
            f"{count} ({count / counts[0]:.1f}x)" if counts[0] else str(count) for count in counts[1:]
        ]
        print(f"| {gib:g} GiB | " + " | ".join(cells) + " |", file=out)
    return 0


def _count(shape: ModelShape, num_bytes: int, config: PolicyConfig | None, options: argparse.Namespace) -> int:
    return requests_at_once(
        pool_tokens(shape, num_bytes, config, options.page_size, looks_at_nothing=_looks_at_nothing(options)),
        prompt_len=options.prompt_len,
        output_len=options.output_len,
        page_size=options.page_size,
        config=config,
    )


def _looks_at_nothing(options: argparse.Namespace) -> bool:
    return options.granularity == REQUEST and options.policy in BLIND_NAMES
