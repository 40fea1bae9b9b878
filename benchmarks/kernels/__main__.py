"""The compaction kernels against what memory allows, and against the quadratic formulation in torch.

    python -m benchmarks.kernels [--lengths 640 1152 ...] [--due 1 4 16 64] [--recorded FILE] [--out FOLDER]
    python -m benchmarks.kernels --device cpu [--smoke]

The shape is that of Llama-3.1-8B: 32 layers, 8 KV heads, 32 query heads, head_dim 128, bf16; window 8, and every
request has `buffer` = 128 tokens above its budget. Keys come in two kinds: *clustered*, each one of 32 directions plus
noise, cosine about 0.7 within a cluster, so that a token finds its most recent near-duplicate among the newest few
hundred, as the keys of trained models do; and *random*, where no pair is above the threshold and every row is scanned
to the end: the worst case. With ``--recorded`` there is a third kind, in the shape of the model that cached it
(``python -m benchmarks.kernels.record_keys``). Slots are scattered at random over the pool.

Bounds are taken at the copy bandwidth measured in the same run. A decode step is modelled, not run: 64 requests read
the weights (8.03e9 of 2 bytes) and their KV once, at that bandwidth, nothing else: a real step takes longer.

Writes ``kernels.csv`` (one row per measurement; columns in ``common/tables.py``), ``kernels.json`` and ``kernels.png``
to ``benchmarks/results/<hardware>/``, and takes under 8 minutes. ``--device cpu`` times the torch path alone, on one
small layer, and then runs ``benchmarks.kernels.scoring``: the closed form against the quadratic one, on keys of the
small model (which ``make setup`` fetches) and on random keys.
"""

import argparse
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.common.device import DEVICE, REHEARSAL, captured, gpu_times, peak_extra_bytes, stand_in_for_gpu
from benchmarks.common.schema import RESULTS, hardware_folder
from benchmarks.kernels.kit import (
    BUFFER,
    HEAD_DIM,
    KV_BYTES_PER_TOKEN,
    NUM_LAYERS,
    NUM_QO_HEADS,
    SETTINGS,
    WINDOW,
    Pool,
    RecordedKeys,
    Report,
    Row,
    plot,
    quadratic_scores,
    wall_times,
)
from benchmarks.kernels.long_prompt import LONG_LEN, measure_long_prompt
from rkv_sglang.algorithm.scoring import rkv_scores
from rkv_sglang.cache.compact import WORKING_BYTES, split_requests
from rkv_sglang.cache.query_window import QueryWindow
from rkv_sglang.kernels.dispatch import working_bytes_per_token
from rkv_sglang.kernels.move import move_kept_paged
from rkv_sglang.kernels.paged_batch import PagedBatch
from rkv_sglang.kernels.score.attention import rkv_scores_paged
from rkv_sglang.kernels.score.config import ScoreConfig, choose_factor_dtype, score_config
from rkv_sglang.kernels.select import select_kept_paged

DECODE_BATCH = 64
WEIGHT_BYTES = 8.03e9 * 2
# Beyond this many requests the worst case teaches nothing new.
MOST_RANDOM_DUE = 4
WALL_ROUNDS = 2 if REHEARSAL else 10
# The scoring kernels' warps, and the newest keys that all are compared with, that are held against each other.
NUM_WARPS = (4, 8)
FIRST_COLUMNS = (16, 64)
SMOKE = {"lengths": [640], "due": [1]}


def measure_parts(report: Report, pool: Pool, num_tokens: int, num_requests: int) -> None:
    """Time scoring, selection, move and the whole of one compaction."""
    requests = pool.requests(num_tokens, num_requests)
    pool.fill(requests)
    keys, values = pool.buffers.keys, pool.buffers.values
    most_tokens = WORKING_BYTES // working_bytes_per_token(keys, WINDOW)
    batches = []
    for part in split_requests([num_tokens] * num_requests, most_tokens):
        lens = {name: [n] * len(requests[part]) for name, n in (("kv_lens", num_tokens), ("prompt_lens", 0))}
        slots = torch.cat([request.slots for request in requests[part]])
        budgets = [num_tokens - BUFFER] * len(requests[part])
        batches.append(PagedBatch.from_slots(slots, **lens, budgets=budgets, window=WINDOW))

    def score(config: ScoreConfig | None = None) -> list[Tensor]:
        kept = []
        for batch in batches:
            queries = pool.queries.expand(-1, batch.num_requests, -1, -1, -1)
            kept = [rkv_scores_paged(keys, batch, queries, **SETTINGS, config=config)]
        return kept

    where = (pool.kind, num_tokens, num_requests)
    key_bytes = num_requests * num_tokens * pool.key_bytes_per_token
    extra = peak_extra_bytes(score)
    report.add(Row("score", *where, *gpu_times(score), extra_bytes=extra, note="bound: read K once"), key_bytes)
    shipped = score_config(keys.head_dim, keys.dtype, choose_factor_dtype(keys.dtype, pool.queries.dtype))
    for num_warps in NUM_WARPS:
        if num_warps != shipped.num_warps:
            other = partial(score, replace(shipped, num_warps=num_warps))
            note = f"{num_warps} warps instead of {shipped.num_warps}"
            report.add(Row(f"score_{num_warps}_warps", *where, *gpu_times(other), note=note), key_bytes)
    for columns in FIRST_COLUMNS:
        other = partial(score, replace(shipped, first_columns=columns))
        note = f"rows are listed after {columns} columns instead of {shipped.first_columns or shipped.block_columns}"
        report.add(Row(f"score_{columns}_first", *where, *gpu_times(other), note=note), key_bytes)

    batch, scores = batches[-1], score()[-1]
    kept = select_kept_paged(scores, batch)
    last = (pool.kind, num_tokens, batch.num_requests)
    report.add(Row("select", *last, *gpu_times(lambda: select_kept_paged(scores, batch))), scores.nbytes + kept.nbytes)
    moved_rows = int((kept > torch.arange(kept.shape[-1], device=kept.device)).sum())
    moved_bytes = moved_rows * keys.head_dim * keys.storage_dtype.itemsize * 2 * 2
    move_times = gpu_times(lambda: move_kept_paged(keys, values, batch, kept))
    report.add(Row("move", *last, *move_times, note="bound: read and write what moves"), moved_bytes)

    if pool.kind != "clustered":
        # Compacting again and again leaves copies of keys behind, which would end a scan early.
        return
    whole = gpu_times(lambda: pool.compact(requests))
    report.add(Row("compact", *where, *whole, note="GPU"))
    wall = wall_times(partial(pool.compact, requests), WALL_ROUNDS)
    report.add(Row("compact_wall", *where, *wall, note="launches included"))
    if num_requests in (1, DECODE_BATCH):
        # In lockstep all come due at once, staggered one by one.
        per_step = wall[1] * DECODE_BATCH / num_requests / BUFFER
        step_ms = decode_step_bytes(num_tokens) / report.bandwidth * 1e3
        note = f"{per_step / step_ms:.2%} of a modelled step of {step_ms:.2f} ms"
        order = "lockstep" if num_requests > 1 else "staggered"
        report.add(Row(f"spread_over_steps_{order}", *where, per_step, per_step, per_step, note=note))


def decode_step_bytes(num_tokens: int) -> float:
    """Return what a modelled decode step reads."""
    return WEIGHT_BYTES + DECODE_BATCH * num_tokens * KV_BYTES_PER_TOKEN


def measure_quadratic(report: Report, pool: Pool, num_tokens: int) -> None:
    """Time the formulation with the full matrix, layer by layer as published code does, for one request."""
    (request,) = pool.requests(num_tokens, 1)
    layers = [tensor[request.slots, 0] for tensor in pool.buffers.keys.tensors]

    def run() -> None:
        for keys, queries in zip(layers, pool.queries[:, 0], strict=True):
            quadratic_scores(queries, keys, **SETTINGS)

    extra = peak_extra_bytes(run)
    row = Row("quadratic", pool.kind, num_tokens, 1, *gpu_times(run, rep_ms=500), extra_bytes=extra)
    for ours in report.rows:
        if (ours.op, ours.keys, ours.num_tokens, ours.num_requests) == ("score", pool.kind, num_tokens, 1):
            ratios = row.p50_ms / ours.p50_ms, ours.extra_bytes / extra
            row.note = f"{ratios[0]:.1f} x our time; ours takes {ratios[1]:.2%} of its memory"
    report.add(row)


def measure_capture(report: Report, batch_size: int) -> None:
    """Time a captured graph of a decode step's outline with and without query capture."""
    device, row_len = DEVICE, NUM_QO_HEADS * HEAD_DIM
    window = QueryWindow(
        num_layers=NUM_LAYERS,
        num_rows=8,
        window=WINDOW,
        num_qo_heads=NUM_QO_HEADS,
        head_dim=HEAD_DIM,
        max_requests=128,
        dtype=torch.bfloat16,
        device=device,
    )
    weights = torch.randn(NUM_LAYERS, row_len, row_len, device=device, dtype=torch.bfloat16) / row_len**0.5
    # Of 64 requests with a buffer of 128 tokens, about 4 are within 8 steps of their compaction.
    window.row_of_request[1:5] = torch.arange(1, 5)
    indices = torch.arange(1, batch_size + 1, device=device)
    hidden = torch.randn(batch_size, row_len, device=device, dtype=torch.bfloat16)
    times = {}
    for with_capture in (False, True):

        def step(with_capture: bool = with_capture) -> Tensor:
            states = hidden
            for layer in range(NUM_LAYERS):
                states = states @ weights[layer]
                if with_capture:
                    window.capture(layer, states, indices, indices)
            return states

        times[with_capture] = gpu_times(captured(step))
    added = [(after - before) for before, after in zip(times[False], times[True], strict=True)]
    step_ms = (WEIGHT_BYTES + batch_size * 1152 * KV_BYTES_PER_TOKEN) / report.bandwidth * 1e3
    note = (
        f"{added[1] / NUM_LAYERS * 1e3:.2f} us a layer, {added[1] / step_ms:.2%} of a modelled step of {step_ms:.2f} ms"
    )
    report.add(Row("capture_in_graph", "", 1152, batch_size, *added, note=note))


def measure_copy(folder: Path, settings: dict[str, Any]) -> Report:
    """Return a report that knows the copy bandwidth."""
    block = torch.empty(2**20 if REHEARSAL else 2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(block)
    copy_ms = gpu_times(lambda: target.copy_(block))
    report = Report(2 * block.nbytes / copy_ms[1] * 1e3, folder, settings)
    report.add(Row("copy", "", 0, 0, *copy_ms, note=f"{report.bandwidth / 1e9:.0f} GB/s"))
    return report


def measure_gpu(
    lengths: list[int], due: list[int], recorded: Path | None, folder: Path, settings: dict[str, Any]
) -> None:
    """Run everything on a GPU; every row is written as it comes."""
    report = measure_copy(folder, settings)
    for batch_size in (1, DECODE_BATCH):
        measure_capture(report, batch_size)
    kinds: dict[str, RecordedKeys | None] = {"clustered": None, "random": None}
    if recorded is not None:
        kinds = {"recorded": RecordedKeys.load(recorded), **kinds}
    for kind, saved in kinds.items():
        counts = [count for count in due if kind != "random" or count <= MOST_RANDOM_DUE]
        longest = [num_tokens for num_tokens in lengths if saved is None or num_tokens <= saved.num_tokens]
        wanted = max(longest) * max(counts)
        num_slots = wanted if REHEARSAL else min(wanted, int(0.6 * torch.cuda.mem_get_info()[0] / KV_BYTES_PER_TOKEN))
        pool = Pool(kind, num_slots, NUM_LAYERS, DEVICE, torch.bfloat16, saved)
        check_scores(pool, min(longest))
        for num_tokens in tqdm(longest, desc=kind, unit="length"):
            for count in counts:
                if num_tokens * count <= pool.num_slots:
                    measure_parts(report, pool, num_tokens, count)
                else:
                    tqdm.write(f"left out: {count} requests of {num_tokens} tokens do not fit beside their copies")
            if saved is None:
                measure_quadratic(report, pool, num_tokens)
        if saved is None and pool.num_slots >= LONG_LEN:
            measure_long_prompt(report, pool)
        del pool
        torch.cuda.empty_cache()


def check_scores(pool: Pool, num_tokens: int) -> None:
    """Refuse to time a wrong answer: the closed form, the quadratic one and the kernels must agree."""
    (request,) = due = pool.requests(num_tokens, 1)
    pool.fill(due)
    lens = {"kv_lens": [num_tokens], "prompt_lens": [0], "budgets": [num_tokens - BUFFER], "window": WINDOW}
    keys = pool.buffers.keys.tensors[0][request.slots, 0].float()
    queries = pool.queries[0, 0].float()
    found = [rkv_scores(queries, keys, **SETTINGS), quadratic_scores(queries, keys, **SETTINGS)]
    if pool.device == DEVICE:
        batch = PagedBatch.from_slots(request.slots, **lens)
        found.append(rkv_scores_paged(pool.buffers.keys, batch, pool.queries, **SETTINGS)[0, :, :-WINDOW])
    for scores in found[1:]:
        # A pair whose cosine is the threshold up to rounding moves a mean by 1 / L: no difference between forms.
        if ((scores - found[0]).abs() > 1e-3 * found[0].abs()).float().mean() > 0.01:
            raise SystemExit("the forms of the score disagree: run the tests of rkv_sglang.kernels first")


def measure_cpu(lengths: list[int], folder: Path, settings: dict[str, Any]) -> None:
    """Run the torch path on one layer, one thread; every row is written as it comes."""
    torch.set_num_threads(1)
    block = torch.empty(2**28, dtype=torch.uint8)
    copy_ms = wall_times(block.clone, 5)
    report = Report(2 * block.nbytes / copy_ms[1] * 1e3, folder, settings)
    for kind in ("clustered", "random"):
        pool = Pool(kind, max(lengths), 1, "cpu", torch.float32)
        check_scores(pool, min(lengths))
        for num_tokens in lengths:
            requests = pool.requests(num_tokens, 1)
            compact = wall_times(partial(pool.compact, requests), 5)
            report.add(Row("compact", kind, num_tokens, 1, *compact))
            keys, queries = pool.buffers.keys.tensors[0][requests[0].slots, 0], pool.queries[0, 0]
            closed, quadratic = (
                wall_times(partial(form, queries, keys, **SETTINGS), 5) for form in (rkv_scores, quadratic_scores)
            )
            report.add(Row("score", kind, num_tokens, 1, *closed))
            note = f"{quadratic[1] / closed[1]:.1f} x the closed form"
            report.add(Row("quadratic", kind, num_tokens, 1, *quadratic, note=note))


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+")
    parser.add_argument("--due", type=int, nargs="+", default=[1, 4, 16, 64], help="requests due at once")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--recorded", type=Path, help="keys that `record_keys` wrote, measured too")
    parser.add_argument("--out", type=Path, help="folder of the results; by default that of this machine")
    parser.add_argument(
        "--smoke", action="store_true", help="one short length; into .cache/kernels unless told otherwise"
    )
    args = parser.parse_args()
    if args.smoke:
        vars(args).update(SMOKE, out=args.out or Path(".cache/kernels"))
    on_gpu = args.device == "cuda"
    if on_gpu and not REHEARSAL and not torch.cuda.is_available():
        sys.exit(
            "benchmarks.kernels needs a CUDA GPU and found none: run it on one, or give --device cpu for the torch path"
        )
    stand_in_for_gpu()
    torch.manual_seed(0)
    default_lengths = [640, 1152, 2176, 4224, 8320] if on_gpu else [640, 1152]
    lengths = args.lengths or default_lengths
    out = args.out or (hardware_folder() if on_gpu else RESULTS / "cpu")
    settings = {"device": args.device, "lengths": lengths, "due": args.due}
    with torch.inference_mode():
        if on_gpu:
            recorded = {"recorded_keys": args.recorded.name} if args.recorded else {}
            measure_gpu(lengths, args.due, args.recorded, out, settings | recorded)
        else:
            measure_cpu(lengths, out, settings)
    plot(out)
    if not on_gpu:
        # The closed form against the quadratic one, on the keys of a real model and on random ones.
        size = ["--smoke"] if args.smoke else []
        for flags in (size, [*size, "--random", "--head-dim", "128"]):
            subprocess.run([sys.executable, "-m", "benchmarks.kernels.scoring", *flags, "--out", str(out)], check=True)


if __name__ == "__main__":
    main()
