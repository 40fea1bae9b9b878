"""The closed form of the redundancy against the quadratic one: time and extra memory, one thread.

    python -m benchmarks.kernels.scoring [--lengths 1152 4224] [--model FOLDER] [--text FILE]
        [--random [--head-dim 128]] [--out FOLDER] [--smoke]

The keys are those that the model caches (after RoPE) while it reads a text: ``--text``, or its own answer of 450
tokens, repeated up to the length. With ``--random`` they are Gaussian and no pair is above the threshold, so that no
row leaves the scan early: the worst case of the closed form. Both forms run in every round, so that noise of the
machine hits both alike; ratios are taken within a round. Times are CPU time of the one thread, so that a process
beside it counts less. Writes ``scoring.csv`` or ``scoring_random.csv`` (one row per length and form; columns in
``tables.py``), its JSON and ``scoring.png``, and prints the ratios.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from benchmarks.common.arguments import SMALL_MODEL, benchmark_parser
from benchmarks.common.drawing import load_pyplot
from benchmarks.common.schema import RESULTS, Row, Table, read_table, run_info, write_table
from benchmarks.common.tables import SCORING, SCORING_RANDOM
from rkv_sglang.algorithm.reference import NORM_EPS
from rkv_sglang.algorithm.scoring import redundancy

PROMPT = "Explain step by step how to solve a quadratic equation, and check the result with an example."
ANSWER_LEN = 450
CHUNK_LEN = 512
THRESHOLD = 0.5
# Gaussian keys of 64 or 128 dimensions have no pair above this one.
RANDOM_THRESHOLD = 0.95
SMOKE = {"lengths": [128, 640], "num_heads": 4, "rounds": 3, "answer_len": 48}


def quadratic_redundancy(keys: Tensor, threshold: float) -> Tensor:
    """The same function with the full matrix, one head at a time, which is faster than all heads at once."""
    num_tokens = keys.shape[0]
    positions = torch.arange(num_tokens, dtype=torch.float32)
    rows = []
    for head_keys in keys.float().unbind(1):
        unit = head_keys / (head_keys.norm(dim=1, keepdim=True) + NORM_EPS)
        similarity = unit @ unit.T
        similarity.fill_diagonal_(0.0)
        most_recent = ((similarity > threshold) * positions).amax(dim=1, keepdim=True).long()
        similarity.scatter_(1, most_recent, 0.0)
        rows.append(similarity.mean(dim=0).softmax(dim=0))
    return torch.stack(rows)


FORMS: dict[str, Callable[[Tensor, float], Tensor]] = {"quadratic": quadratic_redundancy, "closed": redundancy}


def recorded_keys(folder: str, num_tokens: int, text: str | None, answer_len: int) -> Tensor:
    """Return the keys of every layer and head that a Hugging Face model caches, ``[num_tokens, heads, head_dim]``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        if text is None:
            chat = [{"role": "user", "content": PROMPT}]
            prompt = tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            torch.manual_seed(0)
            lengths = {"min_new_tokens": answer_len, "max_new_tokens": answer_len}
            ids = model.generate(**prompt, **lengths, do_sample=True, temperature=0.6, top_p=0.95)[0]
        else:
            ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
        ids = ids.repeat(-(-num_tokens // len(ids)))[:num_tokens]
        cache = None
        for chunk in tqdm(ids.split(CHUNK_LEN), desc="reading", unit="chunk"):
            cache = model(chunk[None], past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
    return torch.cat([layer.keys[0] for layer in cache.layers]).transpose(0, 1).clone()


def extra_bytes(form: Callable[[Tensor, float], Tensor], keys: Tensor, threshold: float) -> int:
    """Return the most memory held at once beyond ``keys``."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        form(keys, threshold)
    events = sorted(profiled.events(), key=lambda event: event.time_range.start)
    held = peak = 0
    for event in events:
        held += event.self_cpu_memory_usage
        peak = max(peak, held)
    return peak


def measure(kind: str, keys: Tensor, threshold: float, rounds: int) -> tuple[list[Row], list[float]]:
    """Return one row per form, and each round's time of the quadratic form over that of the closed one."""
    expected, actual = (form(keys, threshold) for form in FORMS.values())
    # A pair whose cosine is the threshold up to rounding moves a mean by 1/L: no difference between forms.
    if ((actual / expected - 1).abs() > 1e-5).float().mean() > 0.01:
        raise SystemExit("the two forms disagree: run the tests of rkv_sglang.algorithm first")
    times: dict[str, list[float]] = {name: [] for name in FORMS}
    for _ in tqdm(range(rounds), desc=f"{kind}, L = {len(keys)}", unit="round"):
        for name, form in FORMS.items():
            start = time.thread_time()
            form(keys, threshold)
            times[name].append((time.thread_time() - start) * 1e3)
    num_tokens, num_heads, head_dim = keys.shape
    rows: list[Row] = []
    for name, form in FORMS.items():
        p20, _, _, p80 = statistics.quantiles(times[name], n=5)
        rows.append(
            {
                "keys": kind,
                "num_tokens": num_tokens,
                "num_heads": num_heads,
                "head_dim": head_dim,
                "threshold": threshold,
                "form": name,
                "p20_ms": round(p20, 3),
                "p50_ms": round(statistics.median(times[name]), 3),
                "p80_ms": round(p80, 3),
                "rounds": rounds,
                "extra_bytes": extra_bytes(form, keys, threshold),
            }
        )
    return rows, [slow / fast for slow, fast in zip(times["quadratic"], times["closed"], strict=True)]


def plot(folder: Path) -> Path:
    """Draw ``scoring.png`` from ``scoring.csv`` and ``scoring_random.csv``, either of which may be missing."""
    pyplot = load_pyplot()
    rows = [row for table in (SCORING, SCORING_RANDOM) for row in _rows_of(folder, table)]
    figure, both = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for kind, form in dict.fromkeys((row["keys"], row["form"]) for row in rows):
        line = [row for row in rows if (row["keys"], row["form"]) == (kind, form)]
        lengths = [float(row["num_tokens"]) for row in line]
        style = {"label": f"{form}, {kind} keys", "linestyle": "--" if kind == "random" else "-"}
        times = [[float(row[name]) for row in line] for name in ("p20_ms", "p50_ms", "p80_ms")]
        spread = [
            [mid - low for low, mid in zip(*times[:2], strict=True)],
            [high - mid for mid, high in zip(*times[1:], strict=True)],
        ]
        both[0].errorbar(lengths, times[1], spread, marker=".", capsize=2, **style)
        both[1].plot(lengths, [int(row["extra_bytes"]) / 2**20 for row in line], marker=".", **style)
    for axes, title in zip(both, ("CPU time of one thread, ms (p20, p50, p80)", "extra memory, MiB"), strict=True):
        axes.set(xscale="log", yscale="log", xlabel="tokens", title=title)
    both[0].legend(fontsize=7)
    path = folder / "scoring.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _rows_of(folder: Path, table: Table) -> list[Row]:
    return read_table(folder, table) if (folder / f"{table.name}.csv").exists() else []


def main() -> None:
    """Run the benchmark from the command line."""
    parser = benchmark_parser(__doc__, smoke="short and few; into .cache/scoring unless told otherwise")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1152, 4224])
    parser.add_argument("--num-heads", type=int, default=8, help="heads scored together, drawn from all layers")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model", default=SMALL_MODEL)
    parser.add_argument("--text", type=Path, help="a text to read instead of the model's own answer")
    parser.add_argument("--random", action="store_true", help="Gaussian keys: nothing exits early")
    parser.add_argument("--head-dim", type=int, default=64, help="of random keys")
    parser.set_defaults(answer_len=ANSWER_LEN)
    args = parser.parse_args()
    if args.smoke:
        vars(args).update(SMOKE, out=args.out or Path(".cache/scoring"))
    out = args.out or RESULTS / "cpu"
    if args.rounds < 2:
        parser.error("--rounds must be at least 2 for percentiles")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    longest = max(args.lengths)
    if args.random:
        kind, threshold, keys = "random", RANDOM_THRESHOLD, torch.randn(longest, args.num_heads, args.head_dim)
    else:
        kind, threshold = "recorded", THRESHOLD
        keys = recorded_keys(args.model, longest, args.text.read_text() if args.text else None, args.answer_len)
        keys = keys[:, torch.randperm(keys.shape[1])[: args.num_heads]]
    rows: list[Row] = []
    for num_tokens in args.lengths:
        # As the server runs it.
        with torch.inference_mode():
            form_rows, ratios = measure(kind, keys[:num_tokens].contiguous(), threshold, args.rounds)
        rows += form_rows
        low, _, _, high = statistics.quantiles(ratios, n=5)
        memory = " and ".join(f"{row['form']} {int(row['extra_bytes']) / 2**20:.1f} MiB" for row in form_rows)
        print(
            f"{kind}, L = {num_tokens}: closed {statistics.median(ratios):.1f} times as fast "
            f"(p20 {low:.1f}, p80 {high:.1f}); extra memory {memory}"
        )
    info = run_info(model=None if args.random else args.model, threads=1)
    write_table(out, SCORING_RANDOM if args.random else SCORING, rows, info)
    plot(out)


if __name__ == "__main__":
    main()
