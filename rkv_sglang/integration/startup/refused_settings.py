"""Settings of SGLang that a KV policy cannot be combined with: one ordered table, each row a flag or variable.

A row is here because the policy would be wrong with it, or because nobody has shown it right. Values are read from
SGLang's resolved view of the arguments, so a default that SGLang chose by itself counts as well.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang.srt.environ import envs

ATTENTION_BACKENDS = ("triton", "flashinfer", "trtllm_mha", "fa3", "fa4", "torch_native", "intel_amx")
DEVICES = ("cuda", "cpu")
KV_CACHE_DTYPES = ("auto", "bf16", "bfloat16", "fp8_e4m3", "fp8_e5m2")

ArgsView = Any


@dataclass(frozen=True, kw_only=True)
class RefusedSetting:
    """One setting that is refused.

    Attributes:
        setting: The flag or the environment variable, as a user writes it.
        found: Returns the offending value of the arguments, or None or False where there is none.
        why: What would go wrong; reads on after a colon.
        mend: What to do instead; reads on after a semicolon. Empty: leave the setting out.
        records_only: The recording of queries is the only reason, so it goes with a policy that looks at places alone
            and makes one choice for a whole request; tests run it so on a real server.
    """

    setting: str
    found: Callable[[ArgsView], Any]
    why: str
    mend: str = ""
    records_only: bool = False


def _is_on(field: str) -> Callable[[ArgsView], Any]:
    return lambda args: bool(getattr(args, field))


def _is_given(field: str) -> Callable[[ArgsView], Any]:
    return lambda args: getattr(args, field)


def _is_above_one(field: str) -> Callable[[ArgsView], Any]:
    return lambda args: getattr(args, field) if getattr(args, field) > 1 else None


def _is_none_of(field: str, allowed: tuple[str | None, ...]) -> Callable[[ArgsView], Any]:
    return lambda args: None if getattr(args, field) in (None, *allowed) else getattr(args, field)


def _in_environment(variable: str) -> Callable[[ArgsView], Any]:
    return lambda args: bool(getattr(envs, variable).get())


def _shared_attention_backend(args: ArgsView) -> Any:
    # The shared choice does not count where prefill and decode each have their own.
    if args.prefill_attention_backend and args.decode_attention_backend:
        return None
    return _is_none_of("attention_backend", ATTENTION_BACKENDS)(args)


def _padded_to_prefills(args: ArgsView) -> Any:
    # All ranks must hand these as many tokens, which takes a batch of the same kind on each.
    return args.moe_a2a_backend if args.attn_dp_size > 1 and args.moe_a2a_backend in ("pplx", "deepep_v2") else None


_NOT_ONE_POOL = "compaction moves entries inside one ordinary KV pool of this process, and this keeps them elsewhere"
_OWN_CACHE = "it copies or tracks cached tokens by slot, and compaction changes what a slot holds"
_ON_THE_HOST = (
    "part of a prompt may be on the host alone, which neither admission nor a preempted request that comes back counts"
)
_SPLIT = "every rank must hold all tokens of its requests to choose which to keep"
_OWN_STEPS = "it runs decode steps of its own, which neither record queries nor compact"
_OWN_LAUNCHER = (
    "its servicer starts schedulers in a way of its own, and would serve on if one of them ran without the policy"
)
_OWN_LAUNCHER_MEND = "use --grpc-port, which is SGLang's own"
_BACKEND_WHY = "this attention backend has not been shown right on a compacted cache"
_BACKEND_MEND = "choose flashinfer, trtllm_mha, fa3, fa4 or triton, or on a CPU torch_native or intel_amx"

REFUSED_SETTINGS: tuple[RefusedSetting, ...] = (
    # How requests decode.
    RefusedSetting(
        setting="--speculative-algorithm",
        found=_is_given("speculative_algorithm"),
        why="drafted tokens are written to the cache and taken back, which compaction does not follow",
    ),
    RefusedSetting(
        setting="--decoupled-spec-role",
        found=_is_none_of("decoupled_spec_role", ("null",)),
        why="drafted tokens are written to the cache and taken back, which compaction does not follow",
    ),
    RefusedSetting(setting="--dllm-algorithm", found=_is_given("dllm_algorithm"), why=_OWN_STEPS),
    RefusedSetting(
        setting="--enable-mixed-chunk",
        found=_is_on("enable_mixed_chunk"),
        why="decoding requests then run inside prefill batches, where their queries are not recorded",
        records_only=True,
    ),
    RefusedSetting(setting="--enable-two-batch-overlap", found=_is_on("enable_two_batch_overlap"), why=_OWN_STEPS),
    RefusedSetting(setting="--enable-pdmux", found=_is_on("enable_pdmux"), why=_OWN_STEPS),
    RefusedSetting(setting="--enable-nvidia-megakernel", found=_is_on("enable_nvidia_megakernel"), why=_OWN_STEPS),
    RefusedSetting(setting="--enable-amd-monokernel", found=_is_on("enable_amd_monokernel"), why=_OWN_STEPS),
    RefusedSetting(
        setting="--enable-torch-compile",
        found=_is_on("enable_torch_compile"),
        why="the compiler would trace through the recording of queries",
    ),
    RefusedSetting(
        setting="--enable-mis",
        found=_is_on("enable_mis"),
        why="multi-item scoring only prefills, so there is nothing to compact",
    ),
    RefusedSetting(
        setting="--is-embedding",
        found=_is_on("is_embedding"),
        why="embedding and reward models only prefill, so there is nothing to compact",
    ),
    # Where the work runs.
    RefusedSetting(
        setting="--pp-size",
        found=_is_above_one("pp_size"),
        why="pipeline stages keep several batches in flight, and compaction expects one",
        mend="set --pp-size 1 and use --tp-size",
    ),
    RefusedSetting(
        setting="--moe-a2a-backend",
        found=_padded_to_prefills,
        why="with --attn-dp-size, decode steps beside another rank's prefill run as one, where no query is recorded",
        mend="choose another one, or leave --attn-dp-size out",
        records_only=True,
    ),
    RefusedSetting(
        setting="--elastic-ep-backend",
        found=_is_none_of("elastic_ep_backend", ("none",)),
        why="ranks may leave and join while requests hold compacted caches",
    ),
    RefusedSetting(
        setting="--elastic-ep-join-mode",
        found=_is_given("ep_join_mode"),
        why="ranks may leave and join while requests hold compacted caches",
    ),
    RefusedSetting(setting="--dcp-size", found=_is_above_one("dcp_size"), why=_SPLIT, mend="set --dcp-size 1"),
    RefusedSetting(
        setting="--attn-cp-size", found=_is_above_one("attn_cp_size"), why=_SPLIT, mend="set --attn-cp-size 1"
    ),
    RefusedSetting(setting="--enable-prefill-cp", found=_is_on("enable_prefill_cp"), why=_SPLIT),
    RefusedSetting(setting="--enable-kv-cache-sharding", found=_is_on("enable_kv_cache_sharding"), why=_SPLIT),
    RefusedSetting(
        setting="--disaggregation-mode",
        found=_is_none_of("disaggregation_mode", ("null",)),
        why="the cache of a request moves between servers, and only a whole one can",
        mend="serve prefill and decode in one server",
    ),
    RefusedSetting(
        setting="--enable-pd-role-switch",
        found=_is_on("enable_pd_role_switch"),
        why="the cache of a request moves between servers, and only a whole one can",
    ),
    RefusedSetting(setting="--encoder-only", found=_is_on("encoder_only"), why="an encoder has no KV cache to bound"),
    RefusedSetting(
        setting="--language-only",
        found=_is_on("language_only"),
        why="prompts that arrive from an encoder server have not been shown right with it",
    ),
    RefusedSetting(
        setting="--use-ray",
        found=_is_on("use_ray"),
        why="Ray's actors load no SGLang plugins before they build a scheduler, so nothing would be compacted",
    ),
    RefusedSetting(
        setting="SGLANG_RUST_SERVER",
        found=_in_environment("SGLANG_RUST_SERVER"),
        why="the embedded Rust front end has not been shown right with it",
    ),
    RefusedSetting(
        setting="--smg-grpc-mode",
        # The other is an older name of it, which SGLang makes this of.
        found=lambda args: args.smg_grpc_mode and not args.grpc_mode,
        why=_OWN_LAUNCHER,
        mend=_OWN_LAUNCHER_MEND,
    ),
    RefusedSetting(setting="--grpc-mode", found=_is_on("grpc_mode"), why=_OWN_LAUNCHER, mend=_OWN_LAUNCHER_MEND),
    # Where the cache lives.
    RefusedSetting(setting="--enable-hierarchical-cache", found=_is_on("enable_hierarchical_cache"), why=_ON_THE_HOST),
    RefusedSetting(setting="--hicache-storage-backend", found=_is_given("hicache_storage_backend"), why=_ON_THE_HOST),
    RefusedSetting(setting="--enable-lmcache", found=_is_on("enable_lmcache"), why=_OWN_CACHE),
    RefusedSetting(setting="--enable-flexkv", found=_is_on("enable_flexkv"), why=_OWN_CACHE),
    RefusedSetting(
        setting="--enable-unified-cache-external-linker",
        found=_is_on("enable_unified_cache_external_linker"),
        why=_OWN_CACHE,
    ),
    RefusedSetting(
        setting="--disaggregation-decode-enable-offload-kvcache",
        found=_is_on("disaggregation_decode_enable_offload_kvcache"),
        why=_OWN_CACHE,
    ),
    RefusedSetting(
        setting="--disaggregation-decode-retraction-backup",
        found=lambda args: args.disaggregation_decode_retraction_backup == "host_pool" and "host_pool",
        why=_OWN_CACHE,
    ),
    RefusedSetting(
        setting="--radix-cache-backend",
        found=_is_given("radix_cache_backend"),
        why="only SGLang's own radix cache is known to leave a request's private slots alone",
    ),
    RefusedSetting(
        setting="--enable-streaming-session",
        found=_is_on("enable_streaming_session"),
        why="a session goes on from the cache of the turn before, which compaction has shortened",
    ),
    RefusedSetting(
        setting="--enable-session-radix-cache",
        found=_is_on("enable_session_radix_cache"),
        why="a session goes on from the cache of the turn before, which compaction has shortened",
    ),
    RefusedSetting(setting="--enable-unified-memory", found=_is_on("enable_unified_memory"), why=_NOT_ONE_POOL),
    RefusedSetting(
        setting="--enable-page-major-kv-layout", found=_is_on("enable_page_major_kv_layout"), why=_NOT_ONE_POOL
    ),
    RefusedSetting(
        setting="SGLANG_USE_HND_KVCACHE", found=_in_environment("SGLANG_USE_HND_KVCACHE"), why=_NOT_ONE_POOL
    ),
    RefusedSetting(
        setting="SGLANG_ENABLE_POST_CAPTURE_KV_SIZING",
        found=_in_environment("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"),
        why="the KV pool is then sized anew after the policy took its own share of it",
    ),
    RefusedSetting(setting="--enable-hisparse", found=_is_on("enable_hisparse"), why=_NOT_ONE_POOL),
    RefusedSetting(
        setting="--prefill-only-disable-kv-cache",
        found=_is_on("prefill_only_disable_kv_cache"),
        why="there is no KV cache to bound",
    ),
    RefusedSetting(
        setting="--kv-cache-dtype",
        found=_is_none_of("kv_cache_dtype", KV_CACHE_DTYPES),
        why="its entries have scales beside them, which are neither moved nor read along",
        mend="set --kv-cache-dtype auto, bfloat16, fp8_e4m3 or fp8_e5m2",
    ),
    # What reads the cache by token position.
    RefusedSetting(
        setting="--enable-return-routed-experts", found=_is_on("enable_return_routed_experts"), why=_OWN_CACHE
    ),
    RefusedSetting(setting="--enable-return-indexer-topk", found=_is_on("enable_return_indexer_topk"), why=_OWN_CACHE),
    RefusedSetting(
        setting="--kv-canary",
        found=_is_none_of("kv_canary", ("none",)),
        why="the canary expects every token of a request to stay in its slot",
    ),
    RefusedSetting(
        setting="SGLANG_KV_CANARY_ENABLE_TOKEN_ORACLE",
        found=_in_environment("SGLANG_KV_CANARY_ENABLE_TOKEN_ORACLE"),
        why="the canary expects every token of a request to stay in its slot",
    ),
    RefusedSetting(
        setting="SGLANG_KV_CANARY_ENABLE_VERIFY_TOKEN_ASSERT",
        found=_in_environment("SGLANG_KV_CANARY_ENABLE_VERIFY_TOKEN_ASSERT"),
        why="the canary expects every token of a request to stay in its slot",
    ),
    # What computes attention.
    RefusedSetting(
        setting="--device",
        found=_is_none_of("device", DEVICES),
        why="compaction has a CUDA and a CPU form only",
        mend="set --device cuda or --device cpu",
    ),
    RefusedSetting(
        setting="--attention-backend", found=_shared_attention_backend, why=_BACKEND_WHY, mend=_BACKEND_MEND
    ),
    RefusedSetting(
        setting="--prefill-attention-backend",
        found=_is_none_of("prefill_attention_backend", ATTENTION_BACKENDS),
        why=_BACKEND_WHY,
        mend=_BACKEND_MEND,
    ),
    RefusedSetting(
        setting="--decode-attention-backend",
        found=_is_none_of("decode_attention_backend", ATTENTION_BACKENDS),
        why=_BACKEND_WHY,
        mend=_BACKEND_MEND,
    ),
)
