"""A model or a scheduler whose cache is not what a policy knows is refused, and every ordinary one is served."""

import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sglang
import torch
import transformers
from sglang.srt.arg_groups.overrides import model_config_of, resolving_view
from sglang.srt.configs.model_config import ModelConfig, is_generation_model
from sglang.srt.environ import envs
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from rkv_sglang.integration.hooks.steps import refuse_late, refuse_resolved
from rkv_sglang.integration.startup.refusals import LOOK_AHEAD, refuse_model, refuse_runtime
from rkv_sglang.integration.startup.server_args import RKVServerArgs
from rkv_sglang.integration.startup.sliding import keep_in_one_pool
from rkv_sglang.policy_names import BLIND_NAMES
from tests.integration.startup.refusal_kit import MROPE, REFUSED_MODELS, TINY, message_of, tiny_config_dir

SERVED_MODELS = {
    "LlamaForCausalLM": transformers.LlamaConfig(**TINY),
    "Qwen2ForCausalLM": transformers.Qwen2Config(**TINY, sliding_window=32, use_sliding_window=False),
    "Qwen3ForCausalLM": transformers.Qwen3Config(**TINY),
    "Qwen3MoeForCausalLM": transformers.Qwen3MoeConfig(**TINY),
    "MistralForCausalLM": transformers.MistralConfig(**TINY),
    "Phi3ForCausalLM": transformers.Phi3Config(**TINY),
    "Olmo2ForCausalLM": transformers.Olmo3Config(**TINY, sliding_window=1024),
    "Gemma2ForCausalLM": transformers.Gemma2Config(**TINY, sliding_window=512),
    "Gemma3ForCausalLM": transformers.Gemma3TextConfig(**TINY, sliding_window=512),
    "Qwen2_5_VLForConditionalGeneration": transformers.Qwen2_5_VLConfig(text_config={**TINY, "rope_parameters": MROPE}),
    # Of these SGLang makes a second pool, unless it is told not to.
    "GptOssForCausalLM": transformers.GptOssConfig(**TINY),
    "MellumForCausalLM": transformers.MellumConfig(**TINY, layer_types=["sliding_attention", "full_attention"] * 2),
    "GraniteForCausalLM": transformers.GraniteConfig(**TINY, attention_multiplier=0.01),
}


@pytest.mark.parametrize("architecture", SERVED_MODELS)
def test_models_of_plain_attention_are_served(tmp_path: Path, architecture: str) -> None:
    path = tiny_config_dir(tmp_path, SERVED_MODELS[architecture], architecture)
    args = RKVServerArgs(model_path=path, kv_policy="rkv")
    keep_in_one_pool(args)
    refuse_model(model_config_of(args), args)


def test_every_model_that_sglang_has_look_ahead_is_known() -> None:
    found = set()
    for file in (Path(sglang.__path__[0]) / "srt" / "models").glob("*.py"):
        source = file.read_text()
        if re.search(r"attn_type=AttentionType\.(?!DECODER\b)", source):
            found |= set(re.findall(r"\w+", re.search(r"^EntryClass\W+(.*)", source, re.M | re.S)[1]))
    assert {name for name in found if is_generation_model([name])} == set(LOOK_AHEAD)


@pytest.mark.parametrize("policy", ["streaming_llm", "random", "random_attention", "rkv", "keydiff"])
def test_latent_attention_is_served_where_nothing_of_the_cache_is_looked_at(tmp_path: Path, policy: str) -> None:
    config = transformers.DeepseekV3Config(**{**TINY, "num_key_value_heads": 4})
    path = tiny_config_dir(tmp_path, config, "DeepseekV3ForCausalLM")
    args = RKVServerArgs(model_path=path, kv_policy=policy, kv_granularity="request")
    if policy in BLIND_NAMES:
        refuse_model(model_config_of(args), args)
    else:
        assert "is MLA" in message_of(refuse_model, model_config_of(args), args)
    args = RKVServerArgs(model_path=path, kv_policy=policy, kv_granularity="head")
    assert "is MLA" in message_of(refuse_model, model_config_of(args), args)


# Of the reasons, those that a policy that looks at places alone does not mind where one choice is made for all.
NOT_MINDED_IN_BLOCKS = ("is MLA", "number of their query heads")


@pytest.mark.parametrize("granularity", ["head", "request"])
@pytest.mark.parametrize(
    ("architecture", "config", "why"), REFUSED_MODELS, ids=[f"{row[0]}-{row[2]}" for row in REFUSED_MODELS]
)
def test_models_of_another_kind_are_refused(
    tmp_path: Path, architecture: str, config: Any, why: str, granularity: str
) -> None:
    path = tiny_config_dir(tmp_path, config, architecture)
    for policy in ("rkv", BLIND_NAMES[0]):
        # A window as long as the longest that slides, but for Gemma 2's.
        args = RKVServerArgs(model_path=path, kv_policy=policy, kv_granularity=granularity, kv_window=16)
        keep_in_one_pool(args)
        if granularity == "request" and policy in BLIND_NAMES and why in NOT_MINDED_IN_BLOCKS:
            refuse_model(model_config_of(args), args)
            continue
        message = message_of(refuse_model, model_config_of(args), args)
        assert message.startswith(f"--model-path {path} ({architecture}) cannot be served with a --kv-policy: ")
        expected = why if granularity == "head" else why.replace("--kv-budget", "--kv-window")
        assert expected in message and message.endswith("; serve it with --kv-policy none")


def attention_layer(layer_id: int, **settings: Any) -> RadixAttention:
    usual = {"num_heads": 2, "head_dim": 8, "scaling": 1.0, "num_kv_heads": 1}
    return RadixAttention(layer_id=layer_id, **(usual | settings))


def kv_pool(kind: type[MHATokenToKVPool] = MHATokenToKVPool, **settings: Any) -> MHATokenToKVPool:
    shape = {"size": 16, "page_size": 4, "dtype": torch.float32, "head_num": 1, "head_dim": 8, "layer_num": 2}
    return kind(**{**shape, "device": "cpu", "enable_memory_saver": False, **settings})


def scheduler_with(
    *,
    pool: MHATokenToKVPool | None = None,
    allocator_kind: type[Any] = PagedTokenToKVPoolAllocator,
    layers: tuple[RadixAttention, ...] = (),
    **settings: Any,
) -> Any:
    """A scheduler as far as the check looks at it: its real parts, without a model."""
    pool = pool or kv_pool()
    page = {} if allocator_kind is TokenToKVPoolAllocator else {"page_size": 4}
    allocator = allocator_kind(16, dtype=pool.dtype, device="cpu", kvcache=pool, need_sort=False, **page)
    model = torch.nn.ModuleList(layers or (attention_layer(1), attention_layer(0)))
    parts = {
        "token_to_kv_pool_allocator": allocator,
        "tree_cache": object.__new__(UnifiedRadixCache),
        "is_hybrid_swa": False,
        "is_hybrid_ssm": False,
        "tp_worker": SimpleNamespace(model_runner=SimpleNamespace(model=model)),
    }
    return SimpleNamespace(**{**parts, **settings})


def kv_pool_by_heads() -> MHATokenToKVPool:
    with envs.SGLANG_USE_HND_KVCACHE.override(True):
        return kv_pool()


class OtherPool(MHATokenToKVPool):
    pass


class OtherAllocator(PagedTokenToKVPoolAllocator):
    pass


class OtherTree(UnifiedRadixCache):
    pass


def with_temperature() -> RadixAttention:
    layer = attention_layer(1)
    layer.xai_temperature_len = 1024
    return layer


def capped(layer_id: int, method: str) -> RadixAttention:
    return attention_layer(layer_id, logit_cap=30.0, logit_capping_method=method)


RUNTIMES = [
    (lambda: {"pool": kv_pool(OtherPool)}, "built OtherPool, and the policy knows MHATokenToKVPool"),
    (lambda: {"allocator_kind": OtherAllocator}, "knows TokenToKVPoolAllocator or PagedTokenToKVPoolAllocator"),
    (lambda: {"tree_cache": object.__new__(OtherTree)}, "built OtherTree, and the policy knows UnifiedRadixCache"),
    (lambda: {"is_hybrid_swa": True}, "second cache"),
    (lambda: {"is_hybrid_ssm": True}, "second cache"),
    (lambda: {"pool": kv_pool_by_heads()}, "layout hnd"),
    (lambda: {"pool": kv_pool(dtype=torch.float8_e4m3fnuz)}, "stores torch.float8_e4m3fnuz"),
    (
        lambda: {"layers": (attention_layer(0), attention_layer(1, sliding_window_size=1024))},
        "see the latest 1025 tokens: set --kv-budget to at least that",
    ),
    (lambda: {"layers": (attention_layer(0, use_irope=True), attention_layer(1))}, "layer 0 attends to chunks"),
    (lambda: {"layers": (attention_layer(0), with_temperature())}, "layer 1 scales by length"),
    (lambda: {"layers": (attention_layer(0), attention_layer(1, scaling=0.5))}, "layers 0 and 1 scale or cap"),
    (lambda: {"layers": (attention_layer(0), attention_layer(1, logit_cap=30.0))}, "layers 0 and 1 scale or cap"),
    (lambda: {"layers": [capped(i, "sigmoid") for i in (0, 1)]}, "layer 0 caps its logits by sigmoid, not by tanh"),
    (lambda: {"layers": (attention_layer(0), attention_layer(1, num_heads=4))}, "layers 0 and 1 differ in the number"),
    (lambda: {"layers": (attention_layer(0), attention_layer(1, v_head_dim=4))}, "layers 0 and 1 differ in the number"),
    (lambda: {"layers": (attention_layer(0), attention_layer(1, is_cross_attention=True))}, "not causal"),
    (lambda: {"layers": (attention_layer(0, attn_type=AttentionType.ENCODER_ONLY), attention_layer(1))}, "not causal"),
    (lambda: {"layers": (attention_layer(0), attention_layer(0), attention_layer(1))}, "3 attention layers share 2"),
    (lambda: {"layers": (attention_layer(0),)}, "1 attention layers share 2"),
]


@pytest.fixture(scope="module")
def model_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tiny_config_dir(tmp_path_factory.mktemp("llama"), transformers.LlamaConfig(**TINY), "LlamaForCausalLM")
    return model_config_of(RKVServerArgs(model_path=path))


@pytest.mark.parametrize("allocator_kind", [TokenToKVPoolAllocator, PagedTokenToKVPoolAllocator])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_a_scheduler_with_the_parts_that_the_policy_knows_is_served(
    model_config: Any, allocator_kind: Any, dtype: torch.dtype
) -> None:
    args = RKVServerArgs(model_path="m", kv_policy="rkv")
    parts = {"allocator_kind": allocator_kind, "pool": kv_pool(dtype=dtype)}
    refuse_runtime(scheduler_with(server_args=args, model_config=model_config, **parts))


@pytest.mark.parametrize(("parts", "why"), RUNTIMES, ids=[why for _, why in RUNTIMES])
def test_a_scheduler_with_other_parts_is_refused(model_config: Any, parts: Any, why: str) -> None:
    args = RKVServerArgs(model_path="m", kv_policy="rkv")
    message = message_of(refuse_runtime, scheduler_with(server_args=args, model_config=model_config, **parts()))
    assert why in message and message.endswith("; serve them with --kv-policy none")
    off = RKVServerArgs(model_path="m")
    refuse_runtime(scheduler_with(server_args=off, model_config=model_config, **parts()))


# Of the parts above, those that only scores mind: what a launcher lets pass then must not be refused here.
OF_SCORES = ("layers 0 and 1 scale or cap", "layer 0 caps its logits by sigmoid, not by tanh")


@pytest.mark.parametrize("policy", ["random_attention", "rkv"])
def test_how_layers_make_their_logits_is_minded_by_scores_alone(model_config: Any, policy: str) -> None:
    args = RKVServerArgs(model_path="m", kv_policy=policy, kv_granularity="request", kv_window=8, kv_buffer=128)
    served = [parts() for parts, why in RUNTIMES if why in OF_SCORES]
    served.append({"layers": (attention_layer(0), attention_layer(1, num_heads=4))})
    assert len(served) == 4
    for parts in served:
        scheduler = scheduler_with(server_args=args, model_config=model_config, **parts)
        if policy == "rkv":
            message_of(refuse_runtime, scheduler)
        else:
            refuse_runtime(scheduler)
    more_kv_heads = (attention_layer(0), attention_layer(1, num_heads=4, num_kv_heads=2))
    scheduler = scheduler_with(server_args=args, model_config=model_config, layers=more_kv_heads)
    assert "layers 0 and 1 differ in the number" in message_of(refuse_runtime, scheduler)


def test_a_scheduler_looks_at_flags_and_model_again(model_config: Any, tmp_path: Path) -> None:
    flags = RKVServerArgs(model_path="m", kv_policy="rkv", enable_lmcache=True)
    assert "--enable-lmcache" in message_of(
        refuse_runtime, scheduler_with(server_args=flags, model_config=model_config)
    )
    gemma = tiny_config_dir(tmp_path, transformers.Gemma2Config(**TINY), "Gemma2ForCausalLM")
    other = model_config_of(RKVServerArgs(model_path=gemma))
    args = RKVServerArgs(model_path="m", kv_policy="rkv")
    assert "latest 4096 tokens" in message_of(refuse_runtime, scheduler_with(server_args=args, model_config=other))


def test_prompts_of_models_with_windows_are_compacted_in_blocks_alone(tmp_path: Path) -> None:
    path = tiny_config_dir(tmp_path, transformers.GptOssConfig(**TINY, sliding_window=64), "GptOssForCausalLM")
    flags: dict[str, Any] = {"kv_window": 64, "kv_budget": 512, "kv_prompt_budget": 200}
    args = RKVServerArgs(model_path=path, kv_policy="rkv", disable_hybrid_swa_memory=True, **flags)
    assert "leave --kv-prompt-budget out" in message_of(refuse_model, model_config_of(args), args)
    args.kv_granularity = "request"
    refuse_model(model_config_of(args), args)


def test_windows_are_served_in_one_pool_by_what_keeps_as_many(tmp_path: Path) -> None:
    path = tiny_config_dir(tmp_path, transformers.GptOssConfig(**TINY, sliding_window=64), "GptOssForCausalLM")
    for granularity, kept in (("head", "rkv_budget"), ("request", "rkv_window")):
        for num_tokens in (64, 63):
            flags: dict[str, Any] = {"rkv_budget": 512, kept: num_tokens, "kv_granularity": granularity}
            args = RKVServerArgs(model_path=path, kv_policy="rkv", disable_hybrid_swa_memory=True, **flags)
            if num_tokens == 64:
                refuse_model(model_config_of(args), args)
            else:
                flag = kept.replace("rkv_", "--kv-")
                assert f"set {flag} to at least" in message_of(refuse_model, model_config_of(args), args)


WAYS_TO_RESOLVE = {
    "as its last step": lambda args: refuse_resolved(args, lambda _: None),
    "before the plugin was there": refuse_late,
}


@pytest.mark.parametrize(("way", "policy"), [*[(way, "rkv") for way in WAYS_TO_RESOLVE], ("as its last step", "none")])
def test_windows_are_kept_in_one_pool_in_every_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, way: str, policy: str
) -> None:
    path = tiny_config_dir(tmp_path, transformers.GptOssConfig(**TINY), "GptOssForCausalLM")
    args = RKVServerArgs(model_path=path, kv_policy=policy)
    assert model_config_of(args).is_hybrid_swa
    WAYS_TO_RESOLVE[way](args)
    # Another process makes its own of the record.
    for other in (args, pickle.loads(pickle.dumps(args))):
        assert ModelConfig.from_server_args(other).is_hybrid_swa == (policy == "none")
        assert resolving_view(other).disable_hybrid_swa_memory == (policy != "none")
    assert model_config_of(args).is_hybrid_swa == (policy == "none")
    lines = [record.getMessage() for record in caplog.records if "--disable-hybrid-swa-memory" in record.getMessage()]
    assert len(lines) == (policy != "none")
