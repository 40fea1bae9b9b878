"""The public function on FlashInfer's tensors: what attention sees afterwards, the new page table, refusals."""

import doctest
import importlib.util
import itertools
import math
import random

import pytest
import torch

from rkv_sglang.algorithm.reference import select_kept
from rkv_sglang.kernels import api
from rkv_sglang.kernels.api import compact_paged_kv
from rkv_sglang.policies import H2O, RKV, ScoreInputs

WINDOW = 3


def attention(query, keys, values):
    """Dense attention of one query ``[num_qo_heads, head_dim]``; keys and values ``[L, num_kv_heads, head_dim]``."""
    num_kv_heads, head_dim = keys.shape[1:]
    grouped = query.float().view(num_kv_heads, -1, head_dim)
    logits = torch.einsum("hgd,lhd->hgl", grouped, keys.float()) / math.sqrt(head_dim)
    return torch.einsum("hgl,lhd->hgd", logits.softmax(-1), values.float()).reshape(query.shape)


def paged_attention_torch(queries, layer_cache, table):
    """What FlashInfer's batch decode computes, by its page table."""
    outputs = []
    indptr = table.kv_indptr.tolist()
    for request, (start, end) in enumerate(itertools.pairwise(indptr)):
        pages = table.kv_indices[start:end].long()
        page_size = layer_cache[0].shape[1]
        kv_len = (end - start - 1) * page_size + int(table.kv_last_page_len[request])
        keys, values = (side[pages].flatten(0, 1)[:kv_len] for side in layer_cache)
        outputs.append(attention(queries[request], keys, values))
    return torch.stack(outputs)


def paged_attention_flashinfer(queries, layer_cache, table):
    import flashinfer

    workspace = torch.empty(64 * 2**20, dtype=torch.uint8, device=queries.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
    _, page_size, num_kv_heads, head_dim = layer_cache[0].shape
    wrapper.plan(*table, queries.shape[1], num_kv_heads, head_dim, page_size, q_data_type=queries.dtype)
    return wrapper.run(queries, tuple(layer_cache)).float()


# On a GPU, FlashInfer itself where it is installed.
GPU_ATTENTIONS = {"torch": paged_attention_torch}
if importlib.util.find_spec("flashinfer") is not None:
    GPU_ATTENTIONS["flashinfer"] = paged_attention_flashinfer


def check_attention(seed, page_size, paged_attention, device):
    """Compact random pages and hold attention over them, the page table and all other pages against what must be."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    num_layers, num_requests, num_kv_heads, group_size, head_dim = 2, rng.randint(1, 4), 2, 2, 64
    # FlashInfer's decode wants half precision.
    dtype = torch.float16 if device == "cuda" else torch.float32
    prompt_lens = [rng.randint(0, 20) for _ in range(num_requests)]
    budgets = [rng.randint(WINDOW + 1, 20) for _ in range(num_requests)]
    # Some have generated fewer tokens than their budget.
    kv_lens = [p + rng.randint(WINDOW, 50) for p in prompt_lens]
    num_pages = [-(-n // page_size) for n in kv_lens]
    pages = rng.sample(range(sum(num_pages) + 3), sum(num_pages))
    cache = [
        tuple(torch.randn(sum(num_pages) + 3, page_size, num_kv_heads, head_dim).to(device, dtype) for _ in "kv")
        for _ in range(num_layers)
    ]
    before = [tuple(side.clone() for side in layer) for layer in cache]
    table = api.PageTable(
        torch.tensor([0, *itertools.accumulate(num_pages)], dtype=torch.int32),
        torch.tensor(pages, dtype=torch.int32, device=device),
        torch.tensor([(n - 1) % page_size + 1 for n in kv_lens], dtype=torch.int32),
    )
    num_qo_heads = num_kv_heads * group_size
    queries = torch.randn(num_layers, num_requests, WINDOW, num_qo_heads, head_dim).to(device, dtype)

    after = compact_paged_kv(cache, *table, prompt_lens, queries, budget=budgets, policy=RKV(mix_lambda=0.3))

    new_lens = [min(n, p + b) for n, p, b in zip(kv_lens, prompt_lens, budgets, strict=True)]
    first_pages = [0, *itertools.accumulate(num_pages)]
    used = [pages[first : first + -(-n // page_size)] for first, n in zip(first_pages, new_lens, strict=False)]
    assert after.kv_indices.tolist() == [page for request_pages in used for page in request_pages]
    assert after.kv_indptr.diff().tolist() == [len(request_pages) for request_pages in used]
    assert after.kv_last_page_len.tolist() == [(n - 1) % page_size + 1 for n in new_lens]
    assert [tensor.dtype for tensor in after] == [torch.int32] * 3

    written = torch.zeros(sum(num_pages) + 3, page_size, dtype=torch.bool, device=device)
    for request in range(num_requests):
        for token in range(prompt_lens[request], new_lens[request]):
            written[pages[first_pages[request] + token // page_size], token % page_size] = True
    new_queries = torch.randn(num_requests, num_qo_heads, head_dim).to(device, dtype)
    for layer in range(num_layers):
        found = paged_attention(new_queries, cache[layer], after)
        for side in range(2):
            assert torch.equal(cache[layer][side][~written], before[layer][side][~written])
        for request, (kv_len, prompt_len, budget) in enumerate(zip(kv_lens, prompt_lens, budgets, strict=True)):
            own = torch.tensor(pages[first_pages[request] : first_pages[request + 1]], device=device)
            keys, values = (side[own].flatten(0, 1)[:kv_len] for side in before[layer])
            expected = torch.empty(num_qo_heads, head_dim)
            scores = RKV(mix_lambda=0.3).score(ScoreInputs(queries[layer, request], keys, prompt_len))
            for head in range(num_kv_heads):
                kept = torch.arange(prompt_len, kv_len)
                if kv_len - prompt_len > budget:
                    kept = prompt_len + select_kept(scores[head : head + 1].cpu(), prompt_len, WINDOW, budget)[0]
                held = torch.cat([torch.arange(prompt_len), kept]).to(device)
                group = slice(head * group_size, (head + 1) * group_size)
                dense = attention(
                    new_queries[request, group], keys[held, head : head + 1], values[held, head : head + 1]
                )
                expected[group] = dense.cpu()
            torch.testing.assert_close(
                found[request].cpu(), expected, rtol=2e-3, atol=2e-3 if device == "cuda" else 1e-5
            )


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("_round", range(4))
def test_attention_over_the_compacted_pages_is_attention_with_the_dropped_tokens_masked(_round, seed, page_size):
    check_attention(seed, page_size, paged_attention_torch, "cpu")


def test_fp8_pages_are_scored_dequantised_and_moved_as_bytes(seed):
    torch.manual_seed(seed)
    dtype, scale = torch.float8_e4m3fn, 0.25
    keys, values = (torch.randn(6, 4, 2, 16).to(dtype) for _ in "kv")
    raw = [(keys.view(torch.uint8).clone(), values.view(torch.uint8).clone())]
    queries = torch.randn(1, 1, WINDOW, 2, 16)
    pages = torch.tensor([4, 0, 5, 2, 1, 3], dtype=torch.int32)
    table = (torch.tensor([0, 6], dtype=torch.int32), pages, torch.tensor([4], dtype=torch.int32))
    compact_paged_kv(raw, *table, [2], queries, budget=8, dtype=dtype, key_scales=[scale], value_scales=[1.0])
    tokens = keys[pages.long()].flatten(0, 1)
    scores = RKV().score(ScoreInputs(queries[0, 0], tokens.float() * scale, 2))
    kept = 2 + select_kept(scores, 2, WINDOW, 8)
    for side, original in zip(raw[0], (keys, values), strict=True):
        moved = side[pages.long()].flatten(0, 1)[2:10]
        source = original.view(torch.uint8)[pages.long()].flatten(0, 1)
        for head in range(2):
            assert torch.equal(moved[:, head], source[kept[head], head])


def test_the_example_in_the_docstring_runs():
    results = doctest.testmod(api)
    assert results.attempted > 0 and results.failed == 0


def arguments(**changes):
    given = {
        "paged_kv_cache": [(torch.zeros(8, 4, 2, 16), torch.zeros(8, 4, 2, 16))],
        "kv_indptr": torch.tensor([0, 3, 5], dtype=torch.int32),
        "kv_indices": torch.arange(5, dtype=torch.int32),
        "kv_last_page_len": torch.tensor([2, 4], dtype=torch.int32),
        "prompt_lens": [2, 0],
        "queries": torch.zeros(1, 2, WINDOW, 4, 16),
        "budget": 5,
    }
    return given | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"paged_kv_cache": []}, "paged_kv_cache must hold"),
        ({"paged_kv_cache": [(torch.zeros(8, 2, 16),) * 2]}, "paged_kv_cache must hold"),
        ({"kv_indptr": torch.tensor([0, 3, 5])}, r"kv_indptr must be int32 \[3\]"),
        ({"kv_indptr": torch.tensor([0], dtype=torch.int32)}, "kv_indptr must be"),
        ({"kv_indptr": torch.tensor([0, 5, 5], dtype=torch.int32)}, "kv_indptr must give every request"),
        ({"kv_indptr": torch.tensor([1, 3, 5], dtype=torch.int32)}, "kv_indptr must start at 0"),
        ({"kv_indptr": torch.tensor([0, 3, 6], dtype=torch.int32)}, "kv_indptr must .*end within kv_indices"),
        ({"kv_last_page_len": torch.tensor([2, 5], dtype=torch.int32)}, "kv_last_page_len must be between 1 and"),
        ({"kv_last_page_len": torch.tensor([2], dtype=torch.int32)}, r"kv_last_page_len must be int32 \[2\]"),
        ({"kv_indices": torch.arange(5).float()}, "kv_indices must be contiguous int32 or int64"),
        ({"prompt_lens": [2]}, "prompt_lens must have one entry"),
        ({"prompt_lens": [11, 0]}, "request 0 needs 0 <= prompt_len <= 10"),
        ({"budget": [5, 5, 5]}, "budget must have one entry"),
        ({"budget": WINDOW}, "request 0 needs .*budget > window 3"),
        ({"queries": torch.zeros(1, 3, WINDOW, 4, 16)}, "queries must be"),
        ({"queries": torch.zeros(2, 2, WINDOW, 4, 16)}, "queries must be"),
        ({"policy": H2O()}, "policy H2O needs what it scored before"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        compact_paged_kv(**arguments(**changes))
