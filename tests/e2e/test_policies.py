"""Every policy on the real server, against the dense oracle with that policy."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from devtools.tiny_models import tiny_model_path
from rkv_sglang.integration.startup.calibration_prompts import PROMPTS
from rkv_sglang.policies.registry import POLICIES, default_settings
from tests.e2e.workload import assert_same_tokens, greedy, outputs_at_retractions, retracting, six_prompts
from tests.support.harness.scheduler import SchedulerFailed, run_scheduler
from tests.support.oracle.decoder import load_model
from tests.support.oracle.dense import dense_generate
from tests.support.oracle.policy_scores import score_function

BUDGET, BUFFER = 37, 23
NUM_TOKENS = 125
# By what these models attend to, stretches of all three kinds.
THOUGHTS = {
    "llama-gqa": {"negligible": 0.001, "execution_up_to": 0.91, "transition_above": 0.916, "rounds": 2},
    "qwen3": {"negligible": 0.01, "execution_up_to": 0.08, "transition_above": 0.096, "rounds": 2},
}
CALIBRATION = {"questions": 2, "answer_tokens": 40}


# Every policy on two models; the one whose logits have a factor of their own takes a turn with one that attends.
CASES = [(policy, *model) for policy in POLICIES for model in (("llama-gqa", 16), ("qwen3", 1)) if policy != "rkv"]
CASES[CASES.index(("snapkv", "llama-gqa", 16))] = ("snapkv", "granite-scaled", 16)


@pytest.mark.parametrize("policy, model_name, page_size", CASES)
def test_tokens_equal_the_dense_oracle(policy, model_name, page_size, tmp_path):
    model = tiny_model_path(model_name)
    prompts = six_prompts()[1:5]
    flags = ["--model-path", str(model), "--page-size", str(page_size), "--kv-policy", policy]
    flags += ["--rkv-budget", str(BUDGET), "--rkv-buffer", str(BUFFER), "--kv-granularity", "head"]
    # What the models turn queries by.
    # Its own default leaves no room in so small a budget.
    if policy == "random_attention":
        flags += ["--kv-window", "16"]
    parameters, window = {}, 16 if policy == "random_attention" else default_settings(policy).get("window", 8)
    if policy == "beaconkv":
        parameters = {"theta": 10000.0}
    if policy == "triattention":
        flags += ["--kv-policy-config", json.dumps(CALIBRATION)]
    if policy == "thinkv":
        flags += ["--kv-policy-config", json.dumps(THOUGHTS[model_name])]
        parameters = {**THOUGHTS[model_name], "buffer": BUFFER}
    requests = [greedy(prompt, NUM_TOKENS) for prompt in prompts]
    result = run_scheduler(flags, requests, env={"XDG_CACHE_HOME": str(tmp_path)})
    result.assert_clean()
    if policy == "triattention":
        parameters = {"statistics": the_file_in(tmp_path), "theta": 10000.0}
        assert_measured_right(model, parameters["statistics"])
    num_compactions = 0
    for prompt, output in zip(prompts, result.outputs, strict=True):
        score = score_function(policy, **parameters)
        sizes = {"budget": BUDGET, "buffer": BUFFER, "window": window}
        found = output.output_ids
        expected = dense_generate(model, prompt, NUM_TOKENS, **sizes, score=score, guessed_output_ids=found)
        assert_same_tokens(found, expected, f"prompt of {len(prompt)}")
        assert len(expected.compactions) >= 3
        num_compactions += len(expected.compactions)
    assert len(result.probe.compactions) == num_compactions


def the_file_in(folder: Path) -> Path:
    (path,) = folder.glob("rkv_sglang/*/*.safetensors")
    return path


def assert_measured_right(model_path: Path, statistics: Path) -> None:
    """The file has the means of what the model asks before its positions turn it, over the same tokens."""
    model, tokenizer = load_model(model_path), AutoTokenizer.from_pretrained(model_path)
    seen: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for prompt in PROMPTS[: CALIBRATION["questions"]]:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer.encode(text, add_special_tokens=False)
        ids = ids + dense_generate(model, ids, CALIBRATION["answer_tokens"], budget=1000, buffer=1).output_ids
        handles = []
        for layer, own in zip(model.model.layers, seen, strict=True):
            attention = layer.self_attn
            last = getattr(attention, "q_norm", attention.q_proj)
            handles.append(last.register_forward_hook(lambda _, __, out, own=own: own.append(out[0].detach())))
        with torch.no_grad():
            model(torch.tensor([ids]))
        for handle in handles:
            handle.remove()
    file, head_dim = load_file(statistics), model.config.head_dim
    for layer, own in enumerate(seen):
        queries = torch.cat(own).reshape(sum(map(len, own)), -1, head_dim).double()
        pairs = torch.complex(queries[..., : head_dim // 2], queries[..., head_dim // 2 :])
        found = torch.view_as_complex(file["means"][layer]).to(torch.complex128)
        torch.testing.assert_close(found, pairs.mean(dim=0), atol=1e-4, rtol=1e-4)
        found = file["mean_lengths"][layer].double()
        torch.testing.assert_close(found, pairs.abs().mean(dim=0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("policy", "what"),
    [("triattention", "statistics of this model's queries"), ("thinkv", "bounds of this model's thoughts")],
)
def test_two_starts_measure_the_same_and_another_models_file_is_refused(policy, what, tmp_path):
    flags = ["--kv-policy", policy, "--kv-budget", str(BUDGET), "--model-path"]
    config = ["--kv-policy-config", json.dumps(CALIBRATION)]
    files = []
    for name in ("first", "second"):
        run_scheduler(
            [*flags, str(tiny_model_path("llama-mqa")), *config], [], env={"XDG_CACHE_HOME": str(tmp_path / name)}
        )
        files.append(the_file_in(tmp_path / name))
    assert files[0].name == files[1].name and files[0].read_bytes() == files[1].read_bytes()
    config[1] = json.dumps({**CALIBRATION, "statistics": str(files[0])})
    with pytest.raises(SchedulerFailed) as caught:
        run_scheduler([*flags, str(tiny_model_path("llama-gqa")), *config], [])
    assert f"{files[0]} does not hold {what}: its model is " in caught.value.log


@pytest.mark.parametrize("policy", ["h2o", "thinkv"])
def test_a_stateful_policy_forgets_what_a_retraction_dropped(policy):
    model = tiny_model_path("llama-gqa")
    prompts = six_prompts()[:4]
    flags = ["--model-path", str(model), "--kv-policy", policy, "--kv-budget", str(BUDGET), "--kv-buffer", str(BUFFER)]
    parameters = {}
    if policy == "thinkv":
        flags += ["--kv-policy-config", json.dumps(THOUGHTS["llama-gqa"])]
        parameters = {**THOUGHTS["llama-gqa"], "buffer": BUFFER}
    result = run_scheduler(flags, [greedy(prompt, NUM_TOKENS) for prompt in prompts], env=retracting(71))
    result.assert_clean()
    assert result.probe.retractions >= 1
    for i, (prompt, output) in enumerate(zip(prompts, result.outputs, strict=True)):
        points = outputs_at_retractions(result, f"r{i:05d}")
        expected = dense_generate(
            model,
            prompt,
            NUM_TOKENS,
            budget=BUDGET,
            buffer=BUFFER,
            score=score_function(policy, **parameters),
            recompute_at=points,
            guessed_output_ids=output.output_ids,
        )
        assert_same_tokens(output.output_ids, expected, f"request {i}, recomputed at {points}")
