"""The scan with what a prompt found within itself: the reference's scores, and the pairs that are compared, counted."""

from typing import Any

import pytest
import torch

from rkv_sglang.algorithm import near_duplicates, scoring
from rkv_sglang.algorithm.near_duplicates import PromptHits
from rkv_sglang.kernels.score import key_passes, scan
from rkv_sglang.kernels.score.attention import rkv_scores_paged
from rkv_sglang.kernels.score.config import ScoreConfig
from tests.kernels.paged import make_batch, make_pool
from tests.kernels.score_cases import make_case, poison_memory
from tests.kernels.test_score import SETTINGS, SMALL, check

# numpy warns where a GPU computes inf or NaN in silence, in places that are masked out later.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    poison_memory(monkeypatch)


@pytest.mark.parametrize("kind", ["random", "clustered", "some_zero", "duplicated", "only_oldest"])
def test_scores_are_the_reference_s_at_the_first_compaction_and_after_it(rng, kind):
    lens = [rng.randint(40, 70), rng.randint(12, 20)]
    case = make_case(rng, kind=kind, lens=lens, window=4, head_dim=32, gqa_group_size=1)
    # Rows are listed after 16 columns; the second request is scanned whole beside the first.
    config = rng.choice([SMALL, ScoreConfig(block=32, block_columns=32, first_columns=16, dot_width=16)])
    hits = [PromptHits.empty(1, 2, case.batch.prompt_lens_cpu[0], torch.device("cpu")), None]
    for _ in range(2):
        scores = rkv_scores_paged(case.pool, case.batch, case.queries, prompt_hits=hits, config=config, **SETTINGS)
        check(case, scores, **SETTINGS)
        for request, own in enumerate(hits):
            if own is None:
                continue
            expected = PromptHits.empty(1, 2, own.prompt_len, torch.device("cpu"))
            if own.prompt_len > 0:
                scoring.redundancy(case.keys[0][request], SETTINGS["similarity_threshold"], expected)
            assert torch.equal(own.columns, expected.columns)
            own.is_filled = True


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(torch.bfloat16, 80), (torch.float8_e4m3fn, 64), (torch.float16, 256), (torch.float32, 16)],
    ids=str,
)
def test_every_dtype_has_its_similarities_computed_again_alike(rng, dtype, head_dim):
    # Few near-duplicates: most rows take what is known of the prompt.
    case = make_case(rng, kind="random", dtype=dtype, head_dim=head_dim, num_kv_heads=1, lens=[rng.randint(50, 70)])
    hits = [PromptHits.empty(1, 1, prompt_len, torch.device("cpu")) for prompt_len in case.batch.prompt_lens_cpu]
    scores = rkv_scores_paged(case.pool, case.batch, case.queries, prompt_hits=hits, config=SMALL, **SETTINGS)
    check(case, scores, **SETTINGS)


class ComparedPairs:
    """Stands where tiles of similarities are computed, and counts those of rows and columns that exist."""

    def __init__(self, compute: Any) -> None:
        self._compute, self.count = compute, 0

    def __call__(self, keys: Any, rows: Any, tokens: Any, inside: Any, *args: Any) -> Any:
        exists = args[4]
        self.count += int(inside.handle.data.sum()) * int(exists.handle.data.sum())
        return self._compute(keys, rows, tokens, inside, *args)


def test_a_long_prompt_without_near_duplicates_is_compared_with_generated_tokens_only(rng, monkeypatch):
    pairs = ComparedPairs(scan.newest_near_duplicate)
    for module in (scan, key_passes):
        monkeypatch.setattr(module, "newest_near_duplicate", pairs)
    prompt_len, generated_len, num_tokens = 8192, 1152, 9344
    torch.manual_seed(rng.randrange(2**31))
    keys, queries = torch.randn(num_tokens, 1, 16), torch.randn(1, 1, 8, 1, 16)
    batch = make_batch(rng, 1, kv_lens=[num_tokens], prompt_lens=[prompt_len], budgets=[1024], window=8)
    pool = make_pool(batch, [[keys]])
    # As wide as the interpreter is quick; a multiple of what runs on a GPU.
    config = ScoreConfig(block=512, block_columns=128)
    settings = SETTINGS | {"similarity_threshold": 1.01}
    # No pair is above 1, so every row exempts column 0: what the first compaction would have found.
    hits = PromptHits(torch.zeros(1, 1, prompt_len, dtype=torch.int32), is_filled=True)
    scores = rkv_scores_paged(pool, batch, queries, prompt_hits=[hits], config=config, **settings)
    assert pairs.count == num_tokens * generated_len
    expected = scoring.rkv_scores(queries[0, 0], keys, **settings)
    torch.testing.assert_close(scores[0, :, :-8], expected, rtol=1e-4, atol=1e-8)


def test_what_the_kernels_compare_is_what_torch_compares(rng, monkeypatch):
    """Up to the width of a tile: rows leave a scan at their first hit, and prompts are scanned once."""
    pairs = ComparedPairs(scan.newest_near_duplicate)
    for module in (scan, key_passes):
        monkeypatch.setattr(module, "newest_near_duplicate", pairs)
    case = make_case(rng, kind="clustered", lens=[240], window=8, num_kv_heads=1, page_size=1)
    prompt_len = case.batch.prompt_lens_cpu[0]
    hits = PromptHits.empty(1, 1, prompt_len, torch.device("cpu"))
    config = ScoreConfig(block=16, block_columns=16)
    found = []
    for hits.is_filled in (False, True):
        pairs.count = 0
        rkv_scores_paged(case.pool, case.batch, case.queries, prompt_hits=[hits], config=config, **SETTINGS)
        found.append(pairs.count)
    generated_len = 240 - prompt_len
    assert found[1] <= generated_len * (240 + prompt_len) and found[0] <= found[1] + prompt_len**2
    # One direction is common to all keys but each 17th: most rows find theirs in the newest tile.
    assert near_duplicates.FIRST_WIDTH == 16 and found[1] < 240 * 16 * 4


def test_hits_that_do_not_fit_are_refused_by_request(rng):
    case = make_case(rng, lens=[40, 30], window=4)
    lens = case.batch.prompt_lens_cpu
    right = [PromptHits.empty(1, 2, prompt_len, torch.device("cpu")) for prompt_len in lens]
    wrong = PromptHits.empty(1, 2, lens[1] + 1, torch.device("cpu"))
    for hits, message in (
        (right[:1], "prompt_hits must have 2 entries, got 1"),
        ([right[0], wrong], r"prompt_hits of request 1 must be contiguous int32 \[1, 2, \d+\] on cpu, got torch.int32"),
        ([PromptHits(right[0].columns.long()), None], "prompt_hits of request 0 must be"),
    ):
        with pytest.raises(ValueError, match=message):
            rkv_scores_paged(case.pool, case.batch, case.queries, prompt_hits=hits, config=SMALL, **SETTINGS)
