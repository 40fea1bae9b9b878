"""The score of a request whose prompt is much longer than what it generates between two compactions."""

from functools import partial

from benchmarks.common.device import REHEARSAL, gpu_times
from benchmarks.kernels.kit import BUFFER, SETTINGS, WINDOW, Pool, Report, Row
from rkv_sglang.algorithm.near_duplicates import PromptHits
from rkv_sglang.kernels.paged_batch import PagedBatch
from rkv_sglang.kernels.score.attention import rkv_scores_paged

LONG_PROMPT, GENERATED = (24, 136) if REHEARSAL else (8192, 1152)
LONG_LEN = LONG_PROMPT + GENERATED


def measure_long_prompt(report: Report, pool: Pool) -> None:
    """Time the score of one request with a long prompt: at its first compaction, later, and without what is kept."""
    (request,) = due = pool.requests(LONG_LEN, 1)
    pool.fill(due)
    keys = pool.buffers.keys
    batch = PagedBatch.from_slots(
        request.slots,
        kv_lens=[LONG_LEN],
        prompt_lens=[LONG_PROMPT],
        budgets=[GENERATED - BUFFER],
        window=WINDOW,
    )
    hits = PromptHits.empty(keys.num_layers, keys.num_kv_heads, LONG_PROMPT, keys.device)
    key_bytes = LONG_LEN * pool.key_bytes_per_token
    for name, is_filled in (("first", False), ("later", True), ("whole", None)):
        hits.is_filled = bool(is_filled)
        given = [hits if is_filled is not None else None]
        times = gpu_times(partial(rkv_scores_paged, keys, batch, pool.queries, **SETTINGS, prompt_hits=given))
        note = f"a prompt of {LONG_PROMPT} tokens; bound: read K once"
        report.add(Row(f"score_long_prompt_{name}", pool.kind, LONG_LEN, 1, *times, note=note), key_bytes)
