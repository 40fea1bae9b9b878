"""Scores of a paged batch against the literal reference in fp64, on every layout, dtype and kind of keys."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from rkv_sglang.algorithm import reference
from rkv_sglang.kernels.score import attention
from rkv_sglang.kernels.score.attention import rkv_scores_paged
from rkv_sglang.kernels.score.config import ScoreConfig
from rkv_sglang.kernels.score.device import decode_fp8
from rkv_sglang.kernels.score.per_head.received import snapkv_scores_paged
from rkv_sglang.kernels.select import select_kept_paged
from tests.algorithm.cases import KEY_MAKERS
from tests.kernels.paged import columns_of, make_batch, make_pool
from tests.kernels.score_cases import Case, make_case, poison_memory

# numpy warns where a GPU computes inf or NaN in silence, in places that are masked out later.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SETTINGS: dict[str, Any] = {"mix_lambda": 0.1, "kernel_size": 7, "similarity_threshold": 0.5}
# fp32 sums in another order than the reference's, which runs in fp64. One near-duplicate more or less moves a score of
# L tokens by about 0.5 / L**2, which is 1e-4 at the lengths used here.
TOLERANCE = 1e-6
SMALL = ScoreConfig(block=32, block_columns=16)


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    poison_memory(monkeypatch)


def check(case: Case, scores: Tensor, scorer: Any = reference.rkv_scores, **settings: Any) -> None:
    """Scores and the choice made from them agree with the reference up to ``TOLERANCE``."""
    batch = case.batch
    assert scores.dtype == torch.float32
    assert scores.shape == (case.pool.num_layers, case.pool.num_kv_heads, batch.num_tokens)
    kept = select_kept_paged(scores, batch, block=128)
    for layer in range(case.pool.num_layers):
        for request, (kv_len, prompt_len, budget) in enumerate(
            zip(batch.kv_lens_cpu, batch.prompt_lens_cpu, batch.budgets_cpu, strict=True)
        ):
            mine = scores[layer, :, columns_of(batch, request)]
            num_scored = kv_len - batch.window
            assert (mine[:, num_scored:] == -torch.inf).all(), "the window"
            expected = case.expected(layer, request, scorer, **settings)
            assert ((mine[:, :num_scored] - expected).abs() <= TOLERANCE).all()
            check_kept(kept[layer, request], expected, prompt_len, batch.window, budget)


def check_kept(kept: Tensor, expected: Tensor, prompt_len: int, window: int, budget: int) -> None:
    """A head keeps what the reference keeps, but for tokens whose score is within rounding of the last one kept."""
    best = reference.select_kept(expected, prompt_len, window, budget)
    for mine, its, head_scores in zip(kept[:, :budget].tolist(), best.tolist(), expected, strict=True):
        if differing := set(mine) ^ set(its):
            candidates = head_scores[prompt_len:]
            cutoff = candidates.topk(budget - window).values[-1]
            assert (candidates[list(differing)] - cutoff).abs().max() <= 2 * TOLERANCE


@pytest.mark.parametrize("kind", KEY_MAKERS)
def test_every_kind_of_keys_gets_the_scores_of_the_reference(rng, kind):
    case = make_case(rng, kind=kind)
    check(case, rkv_scores_paged(case.pool, case.batch, case.queries, config=SMALL, **SETTINGS), **SETTINGS)


@pytest.mark.parametrize(
    ("dtype", "query_dtype", "head_dim"),
    [
        (torch.bfloat16, torch.bfloat16, 80),
        (torch.bfloat16, torch.bfloat16, 256),
        (torch.bfloat16, torch.float32, 64),
        (torch.float16, torch.float16, 96),
        (torch.float16, torch.bfloat16, 128),
        (torch.float32, torch.float32, 256),
        (torch.float8_e4m3fn, torch.bfloat16, 80),
        (torch.float8_e4m3fn, torch.float16, 256),
        (torch.float8_e5m2, torch.float16, 64),
        (torch.float8_e5m2, torch.bfloat16, 128),
    ],
    ids=str,
)
def test_every_dtype_and_head_dim_gets_the_scores_of_the_reference(rng, dtype, query_dtype, head_dim):
    case = make_case(
        rng, dtype=dtype, query_dtype=query_dtype, head_dim=head_dim, lens=[rng.randint(12, 40)], num_kv_heads=1
    )
    scores = rkv_scores_paged(case.pool, case.batch, case.queries, config=SMALL, **SETTINGS)
    check(case, scores, **SETTINGS)


def test_scales_make_keys_as_short_as_what_is_added_to_their_norms(rng):
    case = make_case(rng, dtype=torch.float8_e4m3fn, scales=(1e-10, 1e-8))
    check(case, rkv_scores_paged(case.pool, case.batch, case.queries, config=SMALL, **SETTINGS), **SETTINGS)


@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_requests_layers_heads_and_pages_do_not_mix(rng, page_size):
    case = make_case(rng, num_layers=2, page_size=page_size, dtype=torch.float8_e4m3fn)
    check(case, rkv_scores_paged(case.pool, case.batch, case.queries, config=SMALL, **SETTINGS), **SETTINGS)


@pytest.mark.parametrize(
    "config",
    [
        ScoreConfig(block=16, block_columns=32),
        ScoreConfig(block=64, block_columns=16, dot_width=16),
        # What is shipped: in the interpreter every product is of fp32 factors.
        None,
    ],
    ids=str,
)
def test_the_sizes_of_programs_do_not_matter(rng, monkeypatch, config):
    # Several rounds over the results of the blocks, and several programs of the last step.
    monkeypatch.setattr(attention, "CHUNK", 2)
    monkeypatch.setattr(attention, "COMBINE_BLOCK", 16)
    case = make_case(rng, head_dim=80, lens=[rng.randint(65, 80), rng.choice([32, 48, 64])])
    check(case, rkv_scores_paged(case.pool, case.batch, case.queries, config=config, **SETTINGS), **SETTINGS)


@pytest.mark.parametrize("threshold", [-0.5, 0.0, 0.9])
@pytest.mark.parametrize("kind", ["random", "opposite"])
def test_every_threshold(rng, kind, threshold):
    """Below 0 the diagonal is a near-duplicate itself; above all pairs every row exempts column 0."""
    case = make_case(rng, kind=kind, threshold=threshold, lens=[rng.randint(33, 70)])
    settings = SETTINGS | {"similarity_threshold": threshold}
    check(case, rkv_scores_paged(case.pool, case.batch, case.queries, config=SMALL, **settings), **settings)


@pytest.mark.parametrize(("mix_lambda", "kernel_size"), [(0.0, 7), (1.0, 1), (0.3, 3), (0.5, 99)])
def test_every_mix_and_pool(rng, mix_lambda, kernel_size):
    case = make_case(rng)
    settings = SETTINGS | {"mix_lambda": mix_lambda, "kernel_size": kernel_size}
    check(case, rkv_scores_paged(case.pool, case.batch, case.queries, config=SMALL, **settings), **settings)


@pytest.mark.parametrize("gqa_group_size", [1, 3, 16])
def test_every_group_size_and_long_windows(rng, gqa_group_size):
    case = make_case(rng, gqa_group_size=gqa_group_size, window=rng.randint(17, 64), lens=[90], num_kv_heads=1)
    check(case, rkv_scores_paged(case.pool, case.batch, case.queries, config=SMALL, **SETTINGS), **SETTINGS)


def test_one_token_more_than_the_window_and_not_even_that(rng):
    case = make_case(rng, lens=[5, 4, 6], window=4)
    check(case, rkv_scores_paged(case.pool, case.batch, case.queries, config=SMALL, **SETTINGS), **SETTINGS)


@pytest.mark.parametrize("kernel_size", [1, 7])
def test_importance_alone(rng, kernel_size):
    case = make_case(rng, num_layers=2)
    scores = snapkv_scores_paged(case.pool, case.batch, case.queries, kernel_size=kernel_size, config=SMALL)
    check(case, scores, reference.importance, kernel_size=kernel_size)


def test_scores_are_bitwise_the_same_alone_on_other_pages_and_from_strided_queries(rng):
    case = make_case(rng, num_layers=2, page_size=3)
    scores = rkv_scores_paged(case.pool, case.batch, case.queries, config=SMALL, **SETTINGS)
    padded = torch.full((*case.queries.shape[:2], case.batch.window + 2, *case.queries.shape[3:]), torch.nan)
    padded[:, :, 1:-1] = case.queries
    for request in range(case.batch.num_requests):
        alone = make_batch(
            rng,
            16,
            kv_lens=case.batch.kv_lens_cpu[request : request + 1],
            prompt_lens=case.batch.prompt_lens_cpu[request : request + 1],
            budgets=case.batch.budgets_cpu[request : request + 1],
            window=case.batch.window,
        )
        pool = make_pool(alone, [[of_layer[request]] for of_layer in case.keys])
        again = rkv_scores_paged(pool, alone, padded[:, request : request + 1, 1:-1], config=SMALL, **SETTINGS)
        assert torch.equal(again, scores[:, :, columns_of(case.batch, request)])


def test_a_broken_key_spoils_its_own_head_only(rng):
    case = make_case(rng, lens=[40, 30], num_layers=2)
    before = rkv_scores_paged(case.pool, case.batch, case.queries, config=SMALL, **SETTINGS)
    case.keys[1][0][rng.randrange(40), 1] = torch.nan
    pool = make_pool(case.batch, case.keys)
    after = rkv_scores_paged(pool, case.batch, case.queries, config=SMALL, **SETTINGS)
    num_scored = 40 - case.batch.window
    assert after[1, 1, :num_scored].isnan().all()
    before[1, 1, :num_scored] = after[1, 1, :num_scored] = 0.0
    assert torch.equal(after, before)


def test_launches_are_constant_and_memory_grows_with_the_tokens_only(rng, monkeypatch):
    launched: list[str] = []
    allocated: list[int] = []
    run, empty = JITFunction.run, torch.empty

    def recorded_run(kernel, *args, **kwargs):
        launched.append(kernel.fn.__name__)
        return run(kernel, *args, **kwargs)

    def recorded_empty(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        allocated.append(tensor.numel())
        return tensor

    monkeypatch.setattr(JITFunction, "run", recorded_run)
    monkeypatch.setattr(torch, "empty", recorded_empty)

    def used(lens: list[int], num_layers: int) -> tuple[list[str], int]:
        case = make_case(rng, lens=lens, num_layers=num_layers, num_kv_heads=1, window=4)
        launched.clear()
        allocated.clear()
        rkv_scores_paged(case.pool, case.batch, case.queries, config=SMALL, **SETTINGS)
        return launched.copy(), sum(allocated)

    launches, numbers = used([64], 1)
    twice_launches, twice_numbers = used([128], 1)
    assert len(launches) == 5
    assert launches == twice_launches == used([40, 64, 33], 3)[0]
    assert twice_numbers < 2 * numbers


@triton.jit
def _decode_kernel(bytes_ptr, numbers_ptr, E4M3: tl.constexpr):
    places = tl.arange(0, 256)
    tl.store(numbers_ptr + places, decode_fp8(tl.load(bytes_ptr + places), E4M3))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_fp8_byte_is_decoded_exactly(dtype):
    raw = torch.arange(256, dtype=torch.uint8)
    numbers = torch.empty(256, dtype=torch.float16)
    _decode_kernel[(1,)](raw, numbers, E4M3=dtype == torch.float8_e4m3fn)
    expected = raw.view(dtype).to(torch.float16)
    assert torch.equal(numbers.isnan(), expected.isnan())
    assert torch.equal(numbers.nan_to_num(1.0), expected.nan_to_num(1.0))


def test_what_does_not_fit_is_refused_by_name(rng):
    case = make_case(rng, lens=[20], window=4, gqa_group_size=1, page_size=1)
    pool, batch, queries = case.pool, case.batch, case.queries
    for wrong, message in (
        (queries[0], r"queries must be \[num_layers 1, num_requests 1, window 4, num_qo_heads, head_dim 64\], got"),
        (queries[..., :32], "queries must be"),
        (queries[:, :, :3], "queries must be"),
        (queries[:, :, :, :1], "num_qo_heads 1 of queries must be a multiple of num_kv_heads 2"),
        (queries.double(), "queries must be bf16, fp16 or fp32"),
        (queries.transpose(3, 4).contiguous().transpose(3, 4), "stride 1 along head_dim"),
        (queries.to("meta"), "queries is on meta and keys on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            rkv_scores_paged(pool, batch, wrong, **SETTINGS)
    for name, value in (("mix_lambda", 1.5), ("kernel_size", 4), ("similarity_threshold", torch.inf)):
        with pytest.raises(ValueError, match=name.replace("_", "[_ ]")):
            rkv_scores_paged(pool, batch, queries, **SETTINGS | {name: value})
    other = make_case(rng, lens=[20], window=4, page_size=3)
    with pytest.raises(ValueError, match="keys have page_size 3 and batch 1"):
        snapkv_scores_paged(other.pool, batch, queries, kernel_size=7)
    wide = make_case(rng, lens=[80], window=65)
    with pytest.raises(ValueError, match="batch has a window of 65: at most 64"):
        snapkv_scores_paged(wide.pool, wide.batch, wide.queries, kernel_size=7)
