"""Every policy's scorer of a whole batch against the policy's own score, request by request, and what it remembers."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from rkv_sglang.algorithm.thoughts import next_table
from rkv_sglang.kernels import dispatch
from rkv_sglang.kernels.dispatch import choose_kept_torch, compact_paged
from rkv_sglang.kernels.score.mean_keys import keydiff_scores_paged
from rkv_sglang.kernels.score.per_head.block_means import manifoldkv_scores_paged
from rkv_sglang.kernels.score.per_head.received import h2o_scores_paged
from rkv_sglang.kernels.score.scorers import (
    PAGED_SCORERS,
    History,
    PagedInputs,
    scored_paged,
    state_of_kept,
)
from rkv_sglang.kernels.score.values import longflow_scores_paged
from rkv_sglang.kernels.select import select_kept_paged
from rkv_sglang.policies import (
    POLICIES,
    RKV,
    GivenScores,
    Half,
    KeyDiff,
    LongFlow,
    ManifoldKV,
    Policy,
    Scored,
    ScoreInputs,
    ThinKV,
    TriAttention,
    as_scored,
    is_stateful,
)
from tests.algorithm.cases import KEY_MAKERS
from tests.kernels.paged import columns_of, make_batch, make_pool
from tests.kernels.rounding import error_scale, rounding_of_triattention
from tests.kernels.score_cases import Case, make_case, poison_memory
from tests.policies.cases import CASES, case_id, model_with_statistics, policy_of
from tests.support.oracle.loop_policies import OneHead, loop_scores

# numpy warns where a GPU computes inf or NaN in silence, in places that are masked out later.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

RTOL = 2e-5
# They have no kernels of their own.
BY_PLACE = ("random", "streaming_llm")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    poison_memory(monkeypatch)


class Served:
    """A case with values, and for stateful policies a past."""

    def __init__(self, case: Case, values: list[list[Tensor]], value_scales: list[float] | None = None) -> None:
        self.case, self.values = case, values
        self.value_pool = make_pool(case.batch, values, scales=value_scales)
        self.history = [History(kv_len) for kv_len in case.batch.kv_lens_cpu]
        pool = case.pool
        self.model = model_with_statistics(pool.first_layer + pool.num_layers, case.queries.shape[3], pool.head_dim)

    def inputs(self) -> PagedInputs:
        case = self.case
        return PagedInputs(
            keys=case.pool,
            values=self.value_pool,
            batch=case.batch,
            queries=case.queries,
            history=self.history,
            model=self.model,
        )

    def own_inputs(self, layer: int, request: int) -> ScoreInputs:
        """One request in one layer, in fp32 as it is served on a CPU."""
        past = self.history[request]
        return ScoreInputs(
            queries=self.case.queries[layer, request],
            keys=self.case.keys[layer][request].float() * self.case.pool.scales[layer],
            prompt_len=self.case.batch.prompt_lens_cpu[request],
            values=self.values[layer][request].float() * self.value_pool.scales[layer],
            logical_len=past.logical_len,
            state=None if past.kept_state is None else past.kept_state[layer],
            layer=self.case.pool.first_layer + layer,
            first_kv_head=self.case.pool.first_kv_head,
            budget=self.case.batch.budgets_cpu[request],
            memory=None if past.memory is None else past.memory[layer],
            observed=past.observed,
            model=self.model,
        )

    def own_score(self, policy: Policy, layer: int, request: int) -> Scored:
        """What the policy itself says of it."""
        return as_scored(policy.score(self.own_inputs(layer, request)))


def serve(rng: random.Random, *, value_dim: int = 48, **sizes: Any) -> Served:
    case = make_case(rng, **sizes)
    dtype = case.pool.dtype
    values = []
    for of_layer in case.keys:
        drawn = [torch.randn(len(keys), case.pool.num_kv_heads, value_dim) for keys in of_layer]
        for of_request in drawn:
            of_request[::5] = 0.0
        values.append([of_request.to(dtype) for of_request in drawn])
    scales = [rng.uniform(0.3, 2.0) for _ in values] if dtype.itemsize == 1 else None
    return Served(case, values, scales)


def score_all(policy: Policy, served: Served) -> Scored:
    result = scored_paged(PAGED_SCORERS[type(policy)](policy, served.inputs()))
    return Scored(result.scores, result.state)


def check(served: Served, policy: Policy, result: Tensor | Scored) -> None:
    case, batch, scored = served.case, served.case.batch, as_scored(result)
    scores = scored.scores
    assert scores.dtype == torch.float32 and scores.is_contiguous()
    assert scores.shape == (case.pool.num_layers, case.pool.num_kv_heads, batch.num_tokens)
    for layer in range(case.pool.num_layers):
        for request, kv_len in enumerate(batch.kv_lens_cpu):
            mine = scores[layer, :, columns_of(batch, request)]
            expected = served.own_score(policy, layer, request)
            assert (mine[:, kv_len - batch.window :] == -torch.inf).all(), "the window"
            atol: float | Tensor = 2e-6 * (
                1 + float(case.keys[layer][request].float().norm(dim=-1).max()) * case.pool.scales[layer]
            )
            if isinstance(policy, TriAttention):
                if batch.prompt_lens_cpu[request] + batch.window == kv_len:
                    # It compares candidates, and there is none.
                    continue
                atol = rounding_of_triattention(served.own_inputs(layer, request))
            if isinstance(policy, KeyDiff):
                atol = 1e-6 * error_scale(case.keys[layer][request])
            if isinstance(policy, Half) and batch.window < kv_len:
                # Of two tokens that R-KV scores alike, rounding may choose the other.
                by_rkv = RKV(
                    mix_lambda=policy.mix_lambda,
                    kernel_size=policy.kernel_size,
                    similarity_threshold=policy.similarity_threshold,
                )
                ranked = served.own_score(by_rkv, layer, request).scores
                for mine_of_head, own, rank in zip(mine, expected.scores, ranked, strict=True):
                    near = rank[~torch.isclose(mine_of_head[: len(own)], own, rtol=RTOL, atol=float(atol))]
                    assert len(near) == 0 or near.max() - near.min() <= 1e-6
                continue
            if isinstance(policy, ThinKV):
                differs = (mine[:, : kv_len - batch.window] != expected.scores).any(dim=1).nonzero().flatten()
                inputs = served.own_inputs(layer, request)
                assert all(is_a_matter_of_rounding(policy, inputs, head) for head in differs.tolist())
                if len(differs) > 0:
                    continue
            check_close(mine[:, : kv_len - batch.window], expected.scores, atol)
            state = scored.state[layer, :, columns_of(batch, request)][:, : kv_len - batch.window]
            check_close(state, expected.state, atol)


def is_a_matter_of_rounding(policy: ThinKV, inputs: ScoreInputs, head: int) -> bool:
    """Whether, with nothing observed, some two keys of a head are as far from a third one, so that either is right."""
    own = OneHead(
        keys=inputs.keys[:, head].double().numpy(),
        values=inputs.keys[:, head].numpy(),
        queries=inputs.queries[:, :1].transpose(0, 1).float().numpy(),
        positions=list(range(len(inputs.keys))),
        prompt_len=inputs.prompt_len,
        budget=inputs.budget or 0,
    )
    loop_scores("thinkv", own, buffer=policy.buffer, rounds=policy.rounds)
    return inputs.observed is None and min(own.doubts, default=1.0) <= 3e-6


def check_close(mine: Tensor, expected: Tensor, atol: float | Tensor) -> None:
    if isinstance(atol, float):
        torch.testing.assert_close(mine, expected, rtol=RTOL, atol=atol)
        return
    assert torch.equal(mine.isfinite(), expected.isfinite())
    beyond = (mine - expected).abs() / (atol + RTOL * expected.abs())
    assert beyond.max() <= 1, f"{beyond.max()} times what rounding explains"


def test_every_policy_of_this_package_has_one() -> None:
    assert set(PAGED_SCORERS) == {*POLICIES.values(), GivenScores}


@pytest.mark.parametrize("kind", KEY_MAKERS)
@pytest.mark.parametrize("case", [case for case in CASES if case[0] not in ("rkv", "snapkv")], ids=case_id)
def test_scores_are_the_policys_own(rng, case, kind):
    served = serve(rng, kind=kind, head_dim=64)
    pool = served.case.pool
    served.case.pool = replace(pool, first_layer=rng.randrange(9), first_kv_head=rng.randrange(9))
    served.model = model_with_statistics(10, served.case.queries.shape[3], pool.head_dim)
    policy = policy_of(*case)
    check(served, policy, score_all(policy, served))


@pytest.mark.parametrize("name", ["rkv", "snapkv", "h2o", "longflow", "gkv", "half", "beaconkv"])
def test_the_models_own_logits_are_scored(rng, name):
    served = serve(rng, head_dim=32, lens=[40, 26])
    served.case.queries *= 4.0
    usual = served.model
    served.model = replace(usual, logit_scale=rng.uniform(0.2, 0.6), logit_cap=rng.uniform(1.0, 3.0))
    policy = policy_of(name, {})
    scores = score_all(policy, served)
    check(served, policy, scores)
    served.model = usual
    # Half may choose the same tokens.
    assert name == "half" or not torch.allclose(score_all(policy, served).scores, scores.scores)


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("rkv", "snapkv", *BY_PLACE)])
@pytest.mark.parametrize(
    ("dtype", "query_dtype", "head_dim", "group"),
    [
        (torch.bfloat16, torch.bfloat16, 80, 1),
        (torch.float16, torch.float16, 256, 16),
        (torch.float8_e4m3fn, torch.bfloat16, 96, 3),
        (torch.float8_e5m2, torch.float16, 128, 2),
    ],
    ids=str,
)
def test_every_dtype_head_dim_and_group(rng, name, dtype, query_dtype, head_dim, group):
    sizes = {"head_dim": head_dim, "gqa_group_size": group, "num_layers": 2, "lens": [rng.randint(12, 40), 14]}
    served = serve(rng, dtype=dtype, query_dtype=query_dtype, num_kv_heads=1, value_dim=head_dim, **sizes)
    policy = policy_of(name, {})
    check(served, policy, score_all(policy, served))


@pytest.mark.parametrize("block", [16, 32, 128])
def test_the_sizes_of_programs_do_not_matter(rng, monkeypatch, block):
    for module in ("attention", "mean_keys"):
        monkeypatch.setattr(f"rkv_sglang.kernels.score.{module}.CHUNK", 2)
    served = serve(rng, head_dim=80, num_layers=2, lens=[rng.randint(65, 90), 32, 33])
    case = served.case
    keys, batch = case.pool, case.batch
    check(served, KeyDiff(), keydiff_scores_paged(keys, batch, block=block))
    # A mean of one key each is one block a token, however large.
    for mean_tokens in (1, 20, 1000) if block == 16 else (20, 1000):
        policy = ManifoldKV(mean_tokens=mean_tokens)
        check(served, policy, manifoldkv_scores_paged(keys, batch, mean_tokens=mean_tokens, block=block))
    check(served, LongFlow(), longflow_scores_paged(keys, served.value_pool, batch, case.queries, block=block))


@pytest.mark.parametrize("name", ["keydiff", "manifoldkv", "longflow", "h2o", "gkv", "triattention", "beaconkv"])
def test_a_broken_token_spoils_its_own_head_only(rng, name):
    served = serve(rng, lens=[40, 30], num_layers=2)
    policy = policy_of(name, {})
    before = score_all(policy, served).scores
    served.case.keys[1][0][rng.randrange(10), 1] = torch.nan
    served.case.pool = make_pool(served.case.batch, served.case.keys)
    after = score_all(policy, served).scores
    before[1, 1, : 40 - served.case.batch.window] = 0.0
    after[1, 1, : 40 - served.case.batch.window] = 0.0
    assert torch.equal(after, before)


def test_a_key_enters_the_mean_of_its_own_part_only(rng):
    served = serve(rng, lens=[47], window=4)
    served.case.keys[0][0][25] = torch.nan
    served.case.pool = make_pool(served.case.batch, served.case.keys)
    scores = manifoldkv_scores_paged(served.case.pool, served.case.batch, mean_tokens=15)
    assert scores[:, :, 15:30].isnan().all() and not scores[:, :, [*range(15), *range(30, 47)]].isnan().any()


@pytest.mark.parametrize("name", ["h2o", "random", "gkv"])
def test_a_stateful_policy_goes_on_from_what_it_said(rng, name):
    """Two compactions of requests with a past and of one without, against the policy request by request."""
    policy = policy_of(name, {})
    served = serve(rng, lens=[50, 41, 30], num_layers=2, window=4)
    batch = served.case.batch
    for request, (kv_len, prompt_len) in enumerate(zip(batch.kv_lens_cpu, batch.prompt_lens_cpu, strict=True)):
        num_scored = rng.randint(0, kv_len - prompt_len - batch.window)
        if request != 1 and num_scored:
            state = torch.rand(2, served.case.pool.num_kv_heads, num_scored)
            served.history[request] = History(kv_len + rng.randint(1, 500), state)
    scored = score_all(policy, served)
    check(served, policy, scored)
    kept = select_kept_paged(scored.scores, batch, block=64)
    for request, best in enumerate(state_of_kept(scored.state, kept, batch)):
        num_best = batch.budgets_cpu[request] - batch.window
        assert best.shape == (2, served.case.pool.num_kv_heads, num_best)
        assert best.untyped_storage().nbytes() == best.nbytes, "it keeps the scores of other requests alive"
        columns = columns_of(batch, request).start + batch.prompt_lens_cpu[request] + kept[:, request, :, :num_best]
        for layer in range(2):
            assert torch.equal(best[layer], scored.state[layer].gather(1, columns[layer].long()))


def test_beacons_are_chosen_among_the_old_and_the_new(rng):
    """Three compactions, of requests that join at different ones: what is remembered is what the policy remembers."""
    policy = policy_of("beaconkv", {"num_beacons": 7, "num_recent": 2})
    served = serve(rng, lens=[40, 26, 31], num_layers=2, window=4, head_dim=32)
    for _ in range(3):
        result = PAGED_SCORERS[type(policy)](policy, served.inputs())
        check(served, policy, result.scores)
        for request, mine in enumerate(result.memory):
            expected = [served.own_score(policy, layer, request).memory for layer in range(2)]
            torch.testing.assert_close(mine, torch.stack(expected), rtol=RTOL, atol=1e-5)
            assert mine.untyped_storage().nbytes() == mine.nbytes, "it keeps the queries of other requests alive"
            if request != 1 or rng.random() < 0.5:
                logical_len = served.history[request].logical_len + rng.randint(1, 90)
                served.history[request] = History(logical_len, None, mine)
        served.case.queries = torch.randn_like(served.case.queries)


def test_what_was_observed_is_followed(rng):
    """Tables of several segments, some of which stay whole and some shrink or go, of requests of different age."""
    policy = policy_of("thinkv", {"buffer": 9, "rounds": 2})
    served = serve(rng, kind="random", lens=[60, 44, 51], num_layers=2, window=4, head_dim=32)
    batch = served.case.batch
    for request, (kv_len, prompt_len) in enumerate(zip(batch.kv_lens_cpu, batch.prompt_lens_cpu, strict=True)):
        room, num_candidates = batch.budgets_cpu[request] - batch.window, kv_len - prompt_len - batch.window
        table = None
        for _ in range(request * 4):
            table = next_table(table, torch.tensor(rng.randrange(3)), room + min(9, num_candidates - room), room, 9)
        observed = next_table(table, torch.tensor(rng.randrange(3)), num_candidates, room, 9)
        served.history[request] = History(kv_len + 100, observed=observed)
    check(served, policy, score_all(policy, served))


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_compaction_by_kernels_is_that_in_torch(rng, monkeypatch, name):
    """Keys and values end up alike, byte for byte, and so does what is remembered."""
    served = serve(rng, kind="random", num_layers=2, lens=[60, 45], page_size=1)
    case, policy = served.case, policy_of(name, {})
    expected = choose_kept_torch(case.pool, served.value_pool, case.batch, case.queries, policy, model=served.model)
    monkeypatch.setattr(dispatch, "runs_triton", lambda buffers: True)
    kept = compact_paged(case.pool, served.value_pool, case.batch, case.queries, policy, model=served.model)
    assert torch.equal(kept.indices, expected.indices)
    if is_stateful(policy):
        for mine, its in zip(kept.state, expected.state, strict=True):
            torch.testing.assert_close(mine, its, rtol=RTOL, atol=1e-6)
    else:
        assert kept.state is None


@pytest.mark.parametrize("runs", [True, False], ids=["kernels", "torch"])
def test_layers_that_attend_to_the_latest_alone_keep_them_and_have_no_say(rng, monkeypatch, runs):
    """Numbers of layers are the model's, so some of a rank's or of a part's are those that slide, whatever is first."""
    served = serve(rng, kind="random", num_layers=3, lens=[60, 45], page_size=1)
    case, policy = served.case, policy_of("h2o", {})
    keys = replace(case.pool, first_layer=4)
    model = replace(served.model, sliding_layers=frozenset({0, 5}))
    monkeypatch.setattr(dispatch, "runs_triton", lambda buffers: runs)
    history = [History(kv_len) for kv_len in case.batch.kv_lens_cpu]
    scores, usual = (
        dispatch.score_paged(keys, served.value_pool, case.batch, case.queries, policy, history, own)
        for own in (model, served.model)
    )
    assert torch.equal(scores[[0, 2]], usual[[0, 2]]) and not scores[1].any() and usual[1].any()
    usual_kept = choose_kept_torch(keys, served.value_pool, case.batch, case.queries, policy, model=served.model)
    kept = compact_paged(keys, served.value_pool, case.batch, case.queries, policy, model=model)
    assert torch.equal(kept.indices[[0, 2]], usual_kept.indices[[0, 2]])
    for request, (kv_len, prompt_len) in enumerate(
        zip(case.batch.kv_lens_cpu, case.batch.prompt_lens_cpu, strict=True)
    ):
        generated, budget = kv_len - prompt_len, case.batch.budgets_cpu[request]
        latest = torch.arange(generated - budget, generated, dtype=torch.int32)
        assert torch.equal(kept.indices[1, request, :, :budget], latest.expand(keys.num_kv_heads, -1))


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in (*BY_PLACE, "random_attention")])
def test_launches_do_not_grow_with_layers_heads_and_requests(rng, monkeypatch, name):
    launched: list[str] = []
    run = JITFunction.run

    def recorded(kernel, *args, **kwargs):
        launched.append(kernel.fn.__name__)
        return run(kernel, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", recorded)
    policy, counts = policy_of(name, {}), []
    for sizes in ({"lens": [30], "num_kv_heads": 1}, {"lens": [40, 64, 33], "num_layers": 3}):
        launched.clear()
        score_all(policy, serve(rng, window=4, **sizes))
        counts.append(launched.copy())
    # No more than R-KV.
    assert counts[0] == counts[1] and 1 <= len(counts[0]) <= 5


def test_what_does_not_fit_is_refused_by_name(rng):
    served = serve(rng, lens=[20], window=4, gqa_group_size=1, page_size=1)
    case = served.case
    other = make_batch(rng, 3, kv_lens=[20], prompt_lens=[2], budgets=[9], window=4)
    for score in (keydiff_scores_paged, lambda keys, batch: manifoldkv_scores_paged(keys, batch, mean_tokens=3)):
        with pytest.raises(ValueError, match="keys have page_size 1 and batch 3"):
            score(case.pool, other)
    fewer = make_pool(case.batch, [[of_request[:, :1] for of_request in layer] for layer in served.values])
    with pytest.raises(ValueError, match="values have 1 layers of 1 heads and keys 1 of 2"):
        longflow_scores_paged(case.pool, fewer, case.batch, case.queries)
    wide = torch.randn(1, 1, 4, 2 * 65, case.pool.head_dim)
    with pytest.raises(ValueError, match="a query group of 65 heads: at most 64"):
        longflow_scores_paged(case.pool, served.value_pool, case.batch, wide)
    with pytest.raises(ValueError, match="num_qo_heads 3 of queries must be a multiple"):
        h2o_scores_paged(case.pool, case.batch, torch.randn(1, 1, 4, 3, case.pool.head_dim))
