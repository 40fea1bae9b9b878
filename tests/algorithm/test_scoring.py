"""The vectorised score against the literal one in float64, which arbitrates."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rkv_sglang.algorithm import near_duplicates, reference, scoring, selection
from tests.algorithm.cases import DEVICES, KEY_MAKERS, THRESHOLD, fresh_seed, make_keys, make_queries

# fp32 against float64: logits and mean cosines are off by a few 1e-7, and the softmax passes that on relatively.
RTOL = 1e-5
ATOL = 1e-8
# A score is the difference of two shares; off by up to 3e-9 at these lengths.
SCORE_ATOL = 5e-8
# Around the ends of the first blocks of 16, 32 and 64 columns, odd ones, and enough for several blocks.
LENGTHS = [1, 2, 9, 15, 16, 17, 33, 47, 48, 49, 112, 301]
RKV = {"mix_lambda": 0.1, "kernel_size": 7, "similarity_threshold": THRESHOLD}


def assert_near(actual, arbiter, atol=ATOL):
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), arbiter, rtol=RTOL, atol=atol)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KEY_MAKERS)
def test_redundancy_is_the_literal_one(kind, device):
    torch.manual_seed(fresh_seed())
    for num_tokens in LENGTHS:
        keys = make_keys(kind, (num_tokens, 2, 32), device=device)
        arbiter = reference.redundancy(keys, THRESHOLD, dtype=torch.float64)
        assert_near(scoring.redundancy(keys, THRESHOLD), arbiter)
        assert_near(reference.redundancy(keys, THRESHOLD), arbiter)


@pytest.mark.parametrize("threshold", [-2.0, -0.999, -0.3, -0.01, 0.0, 0.01, 0.2, 0.97, 2.0])
def test_redundancy_is_the_literal_one_at_any_threshold(threshold):
    torch.manual_seed(fresh_seed())
    for kind in ("random", "clustered", "opposite"):
        for num_tokens in (17, 201):
            keys = make_keys(kind, (num_tokens, 1, 24), threshold=threshold)
            arbiter = reference.redundancy(keys, threshold, dtype=torch.float64)
            assert_near(scoring.redundancy(keys, threshold), arbiter)


@pytest.mark.parametrize("gqa_group_size", [1, 2, 3, 4])
@pytest.mark.parametrize("window", [1, 8, 9])
def test_importance_is_the_literal_one(window, gqa_group_size):
    torch.manual_seed(fresh_seed())
    for num_tokens in (window, window + 1, window + 3, 8 * window + 5, 150):
        for kernel_size in (1, 5, 7, 13):
            keys = make_keys("clustered", (num_tokens, 3, 16))
            queries = make_queries(keys, window, gqa_group_size)
            arbiter = reference.importance(queries, keys, kernel_size, dtype=torch.float64)
            assert_near(scoring.importance(queries, keys, kernel_size), arbiter)
            assert_near(reference.importance(queries, keys, kernel_size), arbiter)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("num_kv_heads", [1, 3])
def test_scores_are_the_literal_ones_for_every_cache_dtype(num_kv_heads, dtype, device):
    torch.manual_seed(fresh_seed())
    keys = make_keys("clustered", (173, num_kv_heads, 64), dtype=dtype, device=device)
    queries = make_queries(keys, 8, 3)
    arbiter = reference.rkv_scores(queries, keys, **RKV, dtype=torch.float64)
    assert_near(scoring.rkv_scores(queries, keys, **RKV), arbiter, atol=SCORE_ATOL)
    assert_near(reference.rkv_scores(queries, keys, **RKV), arbiter, atol=SCORE_ATOL)
    for module in (scoring, reference):
        assert_near(module.redundancy(keys, THRESHOLD), reference.redundancy(keys, THRESHOLD, dtype=torch.float64))
        arbiter = reference.importance(queries, keys, 7, dtype=torch.float64)
        assert_near(module.importance(queries, keys, 7), arbiter)


@pytest.mark.parametrize("kind", KEY_MAKERS)
def test_what_is_kept_is_what_the_literal_score_keeps(kind):
    torch.manual_seed(fresh_seed())
    prompt_len, window = 11, 8
    keys = make_keys(kind, (251, 3, 32))
    queries = make_queries(keys, window, 2)
    literal = reference.rkv_scores(queries, keys, **RKV, dtype=torch.float64)
    vectorised = scoring.rkv_scores(queries, keys, **RKV)
    num_clear = 0
    for budget in (9, 64, 128, 200):
        expected = reference.select_kept(literal, prompt_len, window, budget)
        actual = selection.select_kept(vectorised, prompt_len, window, budget)
        for head in range(3):
            candidates = literal[head, prompt_len:]
            ranked = candidates.sort(descending=True).values
            cut = ranked[budget - window - 1]
            kept = torch.zeros(len(candidates) + window, dtype=torch.bool)
            kept[actual[head]] = True
            kept = kept[: len(candidates)]
            # Where two versions may differ is only within the tolerance around the cut.
            assert kept[candidates > cut + 2 * SCORE_ATOL].all()
            assert not kept[candidates < cut - 2 * SCORE_ATOL].any()
            if cut - ranked[budget - window] > 2 * SCORE_ATOL:
                num_clear += 1
                assert actual[head].tolist() == expected[head].tolist()
    if kind in ("random", "clustered", "some_zero", "duplicated"):
        assert num_clear >= 3


def test_a_strided_view_of_a_pool_scores_like_its_copy_and_is_not_written():
    torch.manual_seed(fresh_seed())
    pool = torch.randn(180, 3, 2, 16).transpose(1, 2)
    queries = torch.randn(8, 16, 4).transpose(1, 2)
    before, queries_before = pool.clone(), queries.clone()
    keys = pool[::2, :, 1]
    scores = scoring.rkv_scores(queries, keys, **RKV)
    expected = scoring.rkv_scores(queries.contiguous(), keys.contiguous(), **RKV)
    torch.testing.assert_close(scores, expected, rtol=RTOL, atol=SCORE_ATOL)
    assert torch.equal(pool, before)
    assert torch.equal(queries, queries_before)


class TensorSizes(TorchDispatchMode):
    """Notes the size of the largest tensor made, and the number of similarities computed."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.num_pairs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        if func is torch.ops.aten.mm.default:
            self.num_pairs += result.numel()
        return result


def test_no_tensor_grows_with_the_square_of_the_length():
    torch.manual_seed(fresh_seed())
    num_tokens, head_dim = 4000, 16
    for kind in ("random", "clustered", "zero"):
        keys = KEY_MAKERS[kind]((num_tokens, 1, head_dim))
        with TensorSizes() as sizes:
            scoring.redundancy(keys, 0.95)
        assert sizes.largest <= near_duplicates.MAX_AREA * num_tokens, kind
        assert sizes.num_pairs > 0


def test_rows_leave_the_scan_at_their_first_hit():
    torch.manual_seed(fresh_seed())
    num_tokens = 2000
    keys = torch.randn(1, 1, 32) + 0.1 * torch.randn(num_tokens, 1, 32)
    with TensorSizes() as sizes:
        scoring.redundancy(keys, THRESHOLD)
    assert sizes.num_pairs == near_duplicates.FIRST_WIDTH * num_tokens
    # One row without near-duplicate scans on, and it alone.
    keys[num_tokens // 2] = 0.0
    with TensorSizes() as sizes:
        scoring.redundancy(keys, THRESHOLD)
    assert sizes.num_pairs == near_duplicates.FIRST_WIDTH * num_tokens + num_tokens - near_duplicates.FIRST_WIDTH


@pytest.mark.parametrize("module", [reference, scoring], ids=["reference", "scoring"])
def test_wrong_inputs_are_named(module):
    keys, queries = torch.zeros(9, 2, 4), torch.zeros(3, 4, 4)
    for bad_keys, message in (
        (keys[0], r"keys must be \[L, num_kv_heads, head_dim\].*\[2, 4\]"),
        (keys[:0], r"keys must be .*\[0, 2, 4\]"),
        (keys.int(), r"keys must have a floating dtype, got torch.int32"),
    ):
        for call in (
            lambda k: module.redundancy(k, 0.5),
            lambda k: module.importance(queries, k, 7),
            lambda k: module.rkv_scores(queries, k, **RKV),
        ):
            with pytest.raises(ValueError, match=message):
                call(bad_keys)
    for bad_queries, message in (
        (queries[0], r"queries must be \[window, num_qo_heads, head_dim\].*\[4, 4\]"),
        (queries[:0], r"queries must be .*\[0, 4, 4\]"),
        (queries.long(), r"queries must have a floating dtype, got torch.int64"),
        (queries[..., :3], r"head_dim 3 and keys 4"),
        (queries[:, :3], r"num_qo_heads 3 .* multiple of num_kv_heads 2"),
        (torch.zeros(10, 4, 4), r"window of 10 tokens but keys hold only L = 9"),
        (torch.zeros(3, 4, 4, device="meta"), r"queries are on meta and keys on cpu"),
    ):
        for call in (
            lambda q: module.importance(q, keys, 7),
            lambda q: module.rkv_scores(q, keys, **RKV),
        ):
            with pytest.raises(ValueError, match=message):
                call(bad_queries)
    for changed, message in (
        ({"kernel_size": 6}, "kernel_size must be odd and at least 1, got 6"),
        ({"kernel_size": -1}, "kernel_size must be odd and at least 1, got -1"),
        ({"mix_lambda": 1.5}, r"mix_lambda must be in \[0, 1\], got 1.5"),
        ({"mix_lambda": float("nan")}, r"mix_lambda must be in \[0, 1\], got nan"),
        ({"similarity_threshold": float("nan")}, "threshold must be finite, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            module.rkv_scores(queries, keys, **{**RKV, **changed})
