"""The oracle's scores of all policies against the definitions written as loops, and what the oracle remembers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from devtools.tiny_models import VOCAB_SIZE, tiny_model_path
from tests.algorithm.cases import fresh_seed
from tests.support.oracle.dense import DenseResult, dense_generate
from tests.support.oracle.loop_policies import OneHead, loop_scores
from tests.support.oracle.policy_scores import score_function
from tests.support.oracle.scores import ScoreInputs

CASES: list[tuple[str, dict[str, Any]]] = [
    ("rkv", {"mix_lambda": 0.5, "kernel_size": 7, "similarity_threshold": 0.5}),
    ("snapkv", {"kernel_size": 5}),
    ("h2o", {}),
    ("streaming_llm", {"num_sinks": 4}),
    ("keydiff", {}),
    ("manifoldkv", {"mean_tokens": 11}),
    ("longflow", {}),
    ("random", {"seed": 99}),
    ("half", {"mix_lambda": 0.3, "kernel_size": 3, "similarity_threshold": 0.5, "seed": 5}),
    ("gkv", {"importance_weight": 0.6, "decay": 0.9, "kernel_size": 3, "similarity_threshold": 0.5}),
]
NAMES = [name for name, _ in CASES]
BUDGET, BUFFER, WINDOW, PROMPT_LEN = 20, 12, 4, 2


@pytest.mark.parametrize("attempt", range(4))
@pytest.mark.parametrize(("name", "parameters"), CASES, ids=NAMES)
def test_matches_loops(name: str, parameters: dict[str, Any], attempt: int) -> None:
    torch.manual_seed(fresh_seed())
    num_kv_heads, group_size, window, head_dim = 2, 1 + attempt, 1 + 2 * attempt, 8
    resident_len = 20 + 7 * attempt
    keys = 1.0 + torch.randn(num_kv_heads, resident_len, head_dim)
    values = torch.randn(num_kv_heads, resident_len, head_dim)
    queries = torch.randn(num_kv_heads * group_size, window, head_dim)
    # Some were dropped, others in each head.
    positions = torch.stack([torch.randperm(99)[:resident_len].sort().values for _ in range(num_kv_heads)])
    positions[:, -1] = 99
    memory = torch.rand(num_kv_heads, 100)
    before = memory.clone()
    scores = score_function(name, **parameters)(
        ScoreInputs(keys, values, queries, positions, 3, memory, budget=window + 6, layer=4)
    )
    for head in range(num_kv_heads):
        one_head = OneHead(
            keys=keys[head].double().numpy(),
            values=values[head].double().numpy(),
            queries=queries[head * group_size : (head + 1) * group_size].double().numpy(),
            positions=positions[head].tolist(),
            received=dict(enumerate(before[head].tolist())),
            prompt_len=3,
            budget=window + 6,
            layer=4,
            head=head,
        )
        expected = torch.tensor(loop_scores(name, one_head, **parameters)).double()
        if name == "streaming_llm":
            # Only the order counts.
            assert scores[head].argsort().tolist() == expected.argsort().tolist()
            continue
        torch.testing.assert_close(scores[head].double(), expected, atol=2e-6, rtol=1e-5)
        if name in ("h2o", "gkv"):
            after = [one_head.received[position] for position in range(100)]
            torch.testing.assert_close(memory[head].double(), torch.tensor(after).double(), atol=2e-6, rtol=1e-5)
    if name not in ("h2o", "gkv"):
        assert torch.equal(memory, before)


def generate(name: str, num_outputs: int = 70, **options: Any) -> DenseResult:
    prompt = torch.randint(3, VOCAB_SIZE, (PROMPT_LEN,)).tolist()
    counts = {"budget": BUDGET, "buffer": BUFFER, "window": WINDOW}
    model: Path = tiny_model_path("qwen3")
    return dense_generate(model, prompt, num_outputs, score=score_function(name), **counts, **options)


@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_runs_every_policy(name: str) -> None:
    torch.manual_seed(fresh_seed())
    result = generate(name)
    assert [c.num_outputs for c in result.compactions] == [33, 45, 57, 69]
    kept_sets = set()
    for compaction in result.compactions:
        kept = compaction.kept_positions
        resident_end = PROMPT_LEN + compaction.num_outputs - 1
        assert (kept.diff(dim=-1) > 0).all() and kept.shape[-1] == PROMPT_LEN + BUDGET
        assert (kept[..., :PROMPT_LEN] == torch.arange(PROMPT_LEN)).all()
        assert (kept[..., -WINDOW:] == torch.arange(resident_end - WINDOW, resident_end)).all()
        assert (compaction.margins >= 0).all()
        kept_sets.add(tuple(kept.flatten().tolist()))
    assert len(kept_sets) == 4


def test_h2o_remembers_by_token_and_forgets_when_the_cache_is_computed_anew() -> None:
    torch.manual_seed(fresh_seed())
    # The second compaction comes after a retraction, so that nothing of the first one counts any more.
    result = generate("h2o", recompute_at=(40,))
    assert [c.num_outputs for c in result.compactions] == [33, 45, 57, 69]
    assert result.compactions[1].candidate_positions.shape[-1] == 44 - WINDOW
    totals = [compaction.candidate_scores.sum(dim=-1) for compaction in result.compactions]
    # All attention of one window is WINDOW, some of it on the prompt.
    assert (totals[0] < WINDOW).all() and (totals[1] < WINDOW).all()
    assert (totals[3] > totals[1]).all()
    for first, second in zip(result.compactions[1:3], result.compactions[2:], strict=True):
        for layer, head in torch.cartesian_prod(*(torch.arange(n) for n in first.margins.shape)).tolist():
            before = dict(
                zip(
                    first.candidate_positions[layer, head].tolist(),
                    first.candidate_scores[layer, head].tolist(),
                    strict=True,
                )
            )
            for position, score in zip(
                second.candidate_positions[layer, head].tolist(),
                second.candidate_scores[layer, head].tolist(),
                strict=True,
            ):
                # Softmax weights are positive, so a token that was scored before has more now.
                assert score > before.get(position, 0.0)


def test_streaming_llm_and_random_choose_alike_everywhere() -> None:
    torch.manual_seed(fresh_seed())
    for compaction in generate("streaming_llm").compactions:
        resident_end = PROMPT_LEN + compaction.num_outputs - 1
        expected = [0, 1, 2, 3, *range(resident_end - BUDGET + 2, resident_end)]
        assert (compaction.kept_positions == torch.tensor(expected)).all()
    for compaction in generate("random").compactions:
        assert (compaction.kept_positions == compaction.kept_positions[0, 0]).all()
