"""Every policy's score against its formula, one number at a time in fp64."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rkv_sglang.algorithm.model_attention import ModelAttention
from rkv_sglang.policies import GKV, H2O, POLICIES, Half, LongFlow, Random, ScoreInputs, as_scored, is_stateful
from rkv_sglang.policies.informed.triattention import best_of_group, expected_queries, lengthwise
from tests.algorithm.cases import DEVICES, KEY_MAKERS, fresh_seed, make_keys, make_queries
from tests.policies.cases import CASES, case_id, model_with_statistics, policy_of, usual_queries
from tests.support.oracle.loop_policies import OneHead, loop_scores

NUM_TOKENS, NUM_KV_HEADS, GROUP, HEAD_DIM, WINDOW, PROMPT_LEN = 61, 2, 3, 16, 5, 20
# Of the window and of seven more, in some layer and on some rank.
PLACE: dict[str, Any] = {"budget": 12, "layer": 3, "first_kv_head": 6}
torch.manual_seed(fresh_seed())
PLACE["model"] = model_with_statistics(4, NUM_KV_HEADS * GROUP, HEAD_DIM)


def one_head(inputs: ScoreInputs, head: int, values: Tensor, positions: list[int]) -> OneHead:
    rows = inputs.queries[:, head * GROUP : (head + 1) * GROUP].transpose(0, 1)
    return OneHead(
        keys=inputs.keys[:, head].double().cpu().numpy(),
        values=values[:, head].double().cpu().numpy(),
        queries=rows.double().cpu().numpy(),
        positions=positions,
        prompt_len=inputs.prompt_len,
        budget=inputs.budget or 0,
        layer=inputs.layer,
        head=inputs.first_kv_head + head,
        logit_scale=inputs.model.logit_scale,
        logit_cap=inputs.model.logit_cap or None,
        usual=usual_queries(inputs.model, inputs.layer, slice(head * GROUP, (head + 1) * GROUP)),
    )


def error_scale(name: str, parameters: dict[str, Any], keys: Tensor) -> float:
    """How much fp32 rounding of the inputs is magnified at the most."""
    if name == "beaconkv" and keys.dtype != torch.float32:
        # Queries that were turned are as exact as the others; which lie farthest apart is then a matter of rounding.
        return 2e4 if parameters["num_beacons"] >= WINDOW else float("inf")
    keys = keys.double()
    if name == "triattention":
        # Where keys are alike, what they score is a rounding error in deviations of rounding errors.
        return 30.0 if keys[PROMPT_LEN:-WINDOW].std(dim=0).min() > 0.1 else float("inf")
    if name == "manifoldkv":
        return float(keys.norm(dim=-1).max())
    if name == "keydiff":
        mean = (keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)).mean(dim=0)
        return float(1 / (mean.norm(dim=-1).min() + 1e-8))
    return 1.0


def check(name: str, parameters: dict[str, Any], inputs: ScoreInputs, values: Tensor, rtol: float = 2e-5) -> None:
    scores = as_scored(policy_of(name, parameters).score(inputs)).scores
    num_scored = len(inputs.keys) - len(inputs.queries)
    assert scores.dtype == torch.float32 and scores.shape == (inputs.keys.shape[1], num_scored)
    assert scores.device == inputs.keys.device
    for head in range(inputs.keys.shape[1]):
        its_head = one_head(inputs, head, values, list(range(len(inputs.keys))))
        expected = loop_scores(name, its_head, **parameters)
        tolerance = {"rtol": rtol, "atol": 1e-6 * error_scale(name, parameters, inputs.keys)}
        mine, its = scores[head].double().cpu(), torch.tensor(expected).double()
        differs = ~torch.isclose(mine, its, **tolerance)
        if name == "half" and differs.any():
            # Of two tokens that R-KV scores alike, rounding may choose the other.
            by_rkv = {key: value for key, value in parameters.items() if key != "seed"}
            ranked = loop_scores("rkv", one_head(inputs, head, values, list(range(len(inputs.keys)))), **by_rkv)
            near = torch.tensor(ranked)[differs]
            assert near.max() - near.min() <= 1e-6
            continue
        if name == "thinkv" and differs.any():
            # So it may of two keys that are equally far.
            assert min(its_head.doubts) <= 3e-6
            continue
        torch.testing.assert_close(mine, its, **tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KEY_MAKERS)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_score_is_its_formula(case: tuple[str, dict[str, Any]], kind: str, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(fresh_seed())
    keys = make_keys(kind, (NUM_TOKENS, NUM_KV_HEADS, HEAD_DIM), dtype=dtype, device=device)
    values = torch.randn(NUM_TOKENS, NUM_KV_HEADS, HEAD_DIM // 2).to(dtype).to(device)
    values[::5] = 0.0
    inputs = ScoreInputs(make_queries(keys, WINDOW, GROUP), keys, PROMPT_LEN, values=values, **PLACE)
    before = [tensor.clone() for tensor in (inputs.queries, keys, values)]
    check(*case, inputs, values)
    assert all(map(torch.equal, before, (inputs.queries, keys, values)))


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_huge_logits_overflow_nothing(case: tuple[str, dict[str, Any]]) -> None:
    torch.manual_seed(fresh_seed())
    keys = make_keys("clustered", (NUM_TOKENS, NUM_KV_HEADS, HEAD_DIM))
    values = torch.randn_like(keys)
    inputs = ScoreInputs(100 * make_queries(keys, WINDOW, GROUP), keys, PROMPT_LEN, values=values, **PLACE)
    check(*case, inputs, values, rtol=5e-3)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_one_candidate_and_no_prompt(case: tuple[str, dict[str, Any]]) -> None:
    torch.manual_seed(fresh_seed())
    keys = make_keys("random", (2, 1, HEAD_DIM))
    values = torch.randn_like(keys)
    check(
        *case, ScoreInputs(make_queries(keys, 1, GROUP), keys, 0, values=values, budget=2, model=PLACE["model"]), values
    )


@pytest.mark.parametrize("logits", [(0.6, 0.0), (0.9, 2.0)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_the_models_own_logits_are_scored(case: tuple[str, dict[str, Any]], logits: tuple[float, float]) -> None:
    torch.manual_seed(fresh_seed())
    model = replace(PLACE["model"], logit_scale=logits[0], logit_cap=logits[1])
    keys = make_keys("clustered", (NUM_TOKENS, NUM_KV_HEADS, HEAD_DIM))
    values, queries = torch.randn_like(keys), make_queries(keys, WINDOW, GROUP)
    check(*case, ScoreInputs(queries, keys, PROMPT_LEN, values=values, **(PLACE | {"model": model})), values)


@pytest.mark.parametrize("values", [(0.0, 0.0), (float("inf"), 0.0), (None, -1.0), (None, float("nan"))], ids=str)
def test_logits_that_no_model_makes_are_refused(values: tuple[float | None, float]) -> None:
    with pytest.raises(ValueError, match=r"^logit_(scale|cap) must be a finite number"):
        ModelAttention(logit_scale=values[0], logit_cap=values[1])


def test_every_policy_is_in_the_matrix() -> None:
    assert {name for name, _ in CASES} == set(POLICIES)


@pytest.mark.parametrize("num_scored", [0, 1, 17, NUM_TOKENS - WINDOW - PROMPT_LEN])
def test_h2o_adds_to_what_a_token_had(num_scored: int) -> None:
    torch.manual_seed(fresh_seed())
    keys = make_keys("clustered", (NUM_TOKENS, NUM_KV_HEADS, HEAD_DIM))
    queries, state = make_queries(keys, WINDOW, GROUP), torch.rand(NUM_KV_HEADS, num_scored)
    alone = H2O().score(ScoreInputs(queries, keys, PROMPT_LEN))
    both = H2O().score(ScoreInputs(queries, keys, PROMPT_LEN, logical_len=900, state=state))
    expected = alone.clone()
    expected[:, PROMPT_LEN : PROMPT_LEN + num_scored] += state
    assert torch.equal(both, expected)
    # Each query of the window gives out an attention of one.
    torch.testing.assert_close(alone.sum(dim=1), torch.full((NUM_KV_HEADS,), float(WINDOW)))


@pytest.mark.parametrize("num_scored", [0, 1, 17, NUM_TOKENS - WINDOW - PROMPT_LEN])
def test_gkv_forgets_slowly_what_a_token_had(num_scored: int) -> None:
    torch.manual_seed(fresh_seed())
    keys = make_keys("clustered", (NUM_TOKENS, NUM_KV_HEADS, HEAD_DIM))
    queries, state = make_queries(keys, WINDOW, GROUP), torch.rand(NUM_KV_HEADS, num_scored)
    alone = GKV().score(ScoreInputs(queries, keys, PROMPT_LEN))
    assert torch.equal(alone.state.amax(dim=1), torch.ones(NUM_KV_HEADS))
    both = GKV().score(ScoreInputs(queries, keys, PROMPT_LEN, logical_len=900, state=state))
    expected = alone.state.clone()
    old = expected[:, PROMPT_LEN : PROMPT_LEN + num_scored]
    old.copy_(torch.maximum(old, 0.8 * state))
    assert torch.equal(both.state, expected)
    torch.testing.assert_close(both.scores - alone.scores, 0.5 * (expected - alone.state), atol=1e-6, rtol=0)


@pytest.mark.parametrize("logical_len", [NUM_TOKENS, 100_003])
def test_products_with_expected_queries_are_the_published_sum_over_distances(logical_len: int) -> None:
    """In fp64 on both sides, so that what differs would be the formula."""
    torch.manual_seed(fresh_seed())
    model = PLACE["model"]
    keys = torch.randn(NUM_TOKENS, 1, HEAD_DIM, dtype=torch.float64)
    means, lengths = model.statistics.means[:1, :GROUP], model.statistics.mean_lengths[:1, :GROUP]
    exact: Any = SimpleNamespace(means=means.to(torch.complex128), mean_lengths=lengths.double())
    queries = expected_queries(model.rope, exact) * model.rope.turns([logical_len])[0]
    num_pairs = model.rope.num_pairs
    pairs = torch.complex(keys[..., :num_pairs].contiguous(), keys[..., num_pairs : 2 * num_pairs].contiguous())
    mine = best_of_group(queries, lengthwise(model.rope, exact), pairs[:-WINDOW], PROMPT_LEN)[0]
    head = one_head(
        ScoreInputs(torch.zeros(WINDOW, GROUP, HEAD_DIM), keys, PROMPT_LEN, model=model),
        0,
        keys,
        list(range(logical_len - NUM_TOKENS, logical_len)),
    )
    expected = torch.tensor(loop_scores("triattention", head), dtype=torch.float64)
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-6)
    assert mine.dtype == torch.float64 and (mine - expected).abs().max() < 1e-9


@pytest.mark.parametrize("num_scored", [0, 1, 17, NUM_TOKENS - WINDOW - PROMPT_LEN])
def test_random_goes_by_logical_position_and_keeps_what_it_said(num_scored: int) -> None:
    keys, queries = torch.zeros(NUM_TOKENS, NUM_KV_HEADS, 4), torch.zeros(WINDOW, NUM_KV_HEADS, 4)
    state = torch.rand(NUM_KV_HEADS, num_scored)
    scores = Random(seed=77).score(ScoreInputs(queries, keys, PROMPT_LEN, logical_len=5000, state=state))
    scored_end = PROMPT_LEN + num_scored
    assert torch.equal(scores[:, PROMPT_LEN:scored_end], state)
    positions = list(range(5000 - NUM_TOKENS, 5000))
    expected = loop_scores("random", one_head(ScoreInputs(queries, keys, 0), 0, keys, positions), seed=77)
    assert scores[0, scored_end:].tolist() == scores[1, scored_end:].tolist() == expected[scored_end:]


def test_random_is_uniform_and_seeds_are_independent() -> None:
    num_tokens = 20_001
    keys, queries = torch.zeros(num_tokens, 1, 1), torch.zeros(1, 1, 1)
    draws = [Random(seed=seed).score(ScoreInputs(queries, keys, 0))[0] for seed in (0, 1, 2, 2**31)]
    for draw in draws:
        assert draw.min() >= 0 and draw.max() < 1
        shares = torch.histc(draw, bins=20, min=0, max=1) / len(draw)
        # Five standard deviations of a uniform sample of this size.
        assert (shares - 0.05).abs().max() < 0.008
        assert abs(torch.corrcoef(torch.stack([draw[:-1], draw[1:]]))[0, 1]) < 0.036
    correlations = torch.corrcoef(torch.stack(draws)) - torch.eye(4)
    assert correlations.abs().max() < 0.036


def test_stateless_policies_look_at_no_state() -> None:
    torch.manual_seed(fresh_seed())
    keys = make_keys("clustered", (NUM_TOKENS, NUM_KV_HEADS, HEAD_DIM))
    queries, values, state = make_queries(keys, WINDOW, GROUP), torch.randn_like(keys), torch.rand(NUM_KV_HEADS, 9)
    for policy in (policy_of(*case) for case in CASES):
        bare = as_scored(policy.score(ScoreInputs(queries, keys, PROMPT_LEN, values=values, logical_len=99, **PLACE)))
        full = as_scored(
            policy.score(ScoreInputs(queries, keys, PROMPT_LEN, values=values, logical_len=99, state=state, **PLACE))
        )
        assert torch.equal(bare.scores, full.scores) != is_stateful(policy)


def test_half_draws_anew_for_every_compaction_layer_and_head() -> None:
    torch.manual_seed(fresh_seed())
    keys = make_keys("clustered", (1, NUM_KV_HEADS, HEAD_DIM)).expand(1000, -1, -1)
    usual: dict[str, Any] = {"logical_len": 2000, "budget": 9, "layer": 1, "first_kv_head": 2}
    draws = []
    for change in ({}, {"logical_len": 2001}, {"layer": 2}, {"first_kv_head": 4}):
        scores = Half().score(ScoreInputs(make_queries(keys, 1, GROUP), keys, 0, **(usual | change)))
        assert ((scores == 2.0).sum(dim=1) == 4).all()
        draws.append(torch.where(scores == 2.0, 0.5, scores))
    assert torch.equal(draws[0], torch.where(draws[0] < 1.0, draws[0], 0.5)) and all(draw.min() >= 0 for draw in draws)
    # Five standard deviations of independent draws.
    correlations = torch.corrcoef(torch.cat(draws)) - torch.eye(len(draws) * NUM_KV_HEADS)
    assert correlations.abs().max() < 5 / 999**0.5


def test_half_says_that_it_needs_a_budget() -> None:
    with pytest.raises(ValueError, match=r"half shares out a budget, and the inputs name none"):
        Half().score(ScoreInputs(torch.ones(1, 1, 4), torch.ones(3, 1, 4), 0))


def test_longflow_says_that_it_needs_values() -> None:
    inputs = ScoreInputs(torch.ones(1, 1, 4), torch.ones(3, 1, 4), 0)
    with pytest.raises(ValueError, match=r"longflow scores values, and the inputs hold none"):
        LongFlow().score(inputs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_len": -1}, "prompt_len -1 and a window of 4 queries do not fit into L = 10"),
        ({"prompt_len": 7}, "prompt_len 7 and a window of 4 queries do not fit into L = 10"),
        ({"values": torch.zeros(9, 2, 8)}, r"values \[9, 2, 8\] do not belong to keys \[10, 2, 8\]"),
        ({"logical_len": 9}, "logical_len 9 is less than the L = 10"),
        ({"state": torch.zeros(1, 4)}, r"state \[1, 4\] must be \[2, at most 4\]"),
        ({"state": torch.zeros(2, 5)}, r"state \[2, 5\] must be \[2, at most 4\]"),
        ({"state": torch.zeros(2)}, r"state \[2\] must be \[2, at most 4\]"),
    ],
)
def test_inputs_that_do_not_fit_together_are_refused(fields: dict[str, Any], message: str) -> None:
    usual: dict[str, Any] = {"queries": torch.zeros(4, 2, 8), "keys": torch.zeros(10, 2, 8), "prompt_len": 2}
    with pytest.raises(ValueError, match=message):
        ScoreInputs(**(usual | fields))
