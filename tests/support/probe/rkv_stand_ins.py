"""A plugin of the tests: what SGLang does on a GPU only, in torch, so that the rest of it runs with it on a CPU.

``RKV_STAND_IN_TRTLLM``  the attention backend torch_native becomes SGLang's own trtllm_mha: its metadata, its page
                         tables and its writes to the pool. The kernels of FlashInfer that it calls are torch. So does
                         triton, because SGLang serves no model with attention sinks by torch_native.
``RKV_STAND_IN_FP8``     SGLang builds an e4m3 pool as on a GPU (on a CPU it wants one with AMX), and the backend
                         torch_native writes and reads fp8 pools with the scales of their layers, as those of a GPU do.
                         The value is those scales, ``K:V`` of each layer; new weights double them. If it is
                         ``checkpoint``, they are what SGLang reads of a checkpoint, which then may be of fp32.
``RKV_STAND_IN_PADDING`` the backend torch_native says, as those of a GPU do, how long a request is that only fills up a
                         batch; on a CPU SGLang asks it that where ranks step together, and it has no answer.
``RKV_STAND_IN_PINNING`` memory that is asked for page-locked is plain: without a GPU there is no other, and SGLang's
                         LoRA asks for it everywhere.
``RKV_STAND_IN_SAVER``   what SGLang's memory saver releases, pool or weights, holds numbers that are none until it is
                         written again; the library itself releases the memory of a GPU only.
"""

import multiprocessing
import os
import sys
from types import SimpleNamespace
from typing import Any


def register() -> None:
    """Entry point, called by SGLang in every process it starts."""
    if multiprocessing.parent_process() is None or "sglang.srt.managers.scheduler" not in sys.modules:
        return
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    if os.environ.get("RKV_STAND_IN_TRTLLM"):
        ATTENTION_BACKENDS["torch_native"] = ATTENTION_BACKENDS["triton"] = _trtllm_mha
    if os.environ.get("RKV_STAND_IN_FP8"):
        _build_fp8_pools()
        ATTENTION_BACKENDS["torch_native"] = _scaled_torch_native
    if os.environ.get("RKV_STAND_IN_PADDING"):
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

        TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = lambda backend: 1
    if os.environ.get("RKV_STAND_IN_PINNING"):
        _pin_nothing()
    if os.environ.get("RKV_STAND_IN_SAVER"):
        _spoil_what_is_released()


def _pin_nothing() -> None:
    import torch

    torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[method-assign]
    for name in ("tensor", "empty", "zeros", "ones"):
        make = getattr(torch, name)

        def without(*args: Any, make: Any = make, pin_memory: bool = False, **kwargs: Any) -> Any:
            return make(*args, **kwargs)

        setattr(torch, name, without)


def _spoil_what_is_released() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.utils import torch_memory_saver_adapter as saver

    runners: list[Any] = []

    def note(result: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
        runners.append(runner)

    class Spoiling(saver._TorchMemorySaverAdapterNoop):  # type: ignore[misc, name-defined]
        """Says that it saves memory."""

        enabled = True

        def pause(self, tag: str) -> None:
            (runner,) = runners
            pool = runner.token_to_kv_pool
            tensors = {"kv_cache": [*pool.k_buffer, *pool.v_buffer], "weights": list(runner.model.parameters())}
            for tensor in tensors.get(tag, ()):
                tensor.data.fill_(float("nan"))

    saver.TorchMemorySaverAdapter.create = staticmethod(lambda enable: Spoiling())
    HookRegistry.register("sglang.srt.model_executor.model_runner.ModelRunner.load_model", note, HookType.AFTER)


def _trtllm_mha(runner: Any) -> Any:
    import torch
    import triton
    from sglang.kernels.ops.attention import trtllm_mha_page_table
    from sglang.srt.layers.attention import trtllm_mha_backend
    from triton.runtime.interpreter import InterpretedFunction

    class OnCpu(trtllm_mha_backend.TRTLLMHAAttnBackend):  # type: ignore[misc]
        """SGLang's, as on SM100, with what its constructor sets for one pool without speculation."""

        def __init__(self) -> None:
            self.token_to_kv_pool = runner.token_to_kv_pool
            self.kv_index_translator = runner.kv_index_translator
            self.kv_cache_quant_method = runner.token_to_kv_pool.get_kv_cache_quant_method()
            self.req_to_token = runner.req_to_token_pool.req_to_token
            self.data_type, self.q_data_type = runner.kv_cache_dtype, runner.dtype
            self.device, self.page_size = runner.device, runner.page_size
            self.max_context_len = runner.model_config.context_len
            self.max_num_pages = -(-self.max_context_len // self.page_size)
            self.is_xqa_impl = self.use_fmha_v2 = self.is_nvfp4_kvcache = False
            self.prefill_uses_native_fp4 = self.decode_uses_native_fp4 = self.uses_trtllm_gen_native_fp4 = False
            self.use_sliding_window_kv_pool = self.expand_encoder_only_verify = False
            self._swa_kv_pool = self._multi_ctas_kv_counter_buffer = self.workspace_buffer = None
            self.decode_seq_len_splits = 1

    def attend(query: Any, kv_cache: Any, block_tables: Any, seq_lens: Any, ends: list[int], **others: Any) -> Any:
        """Rows of ``query`` up to ``ends[i]`` are the last of request i. HND pages, heads of a group neighbours."""
        left, scale, out, sinks = (others[name] for name in ("window_left", "bmm1_scale", "out", "sinks"))
        keys_hnd, values_hnd = kv_cache
        page_size = keys_hnd.shape[2]
        found = torch.empty_like(query) if out is None else out
        for i, end in enumerate(ends):
            first, length = ends[i - 1] if i else 0, int(seq_lens[i])
            pages = block_tables[i, : -(-length // page_size)].long()
            keys, values = (
                pool[pages]
                .transpose(1, 2)
                .flatten(0, 1)[:length]
                .repeat_interleave(query.shape[1] // pool.shape[1], dim=1)
                for pool in (keys_hnd, values_hnd)
            )
            places = torch.arange(length)
            own = torch.arange(length - (end - first), length)[:, None]
            is_seen = (places <= own) & ((places >= own - left) if left >= 0 else True)
            logits = torch.einsum("qhd,khd->hqk", query[first:end], keys) * scale
            logits = logits.masked_fill(~is_seen, float("-inf"))
            if sinks is not None:
                # A number of each query head, which takes weight and has no value.
                logits = torch.cat([logits, sinks[:, None, None].expand(-1, end - first, 1)], dim=2)
            weights = logits.softmax(dim=-1)[:, :, :length]
            found[first:end] = torch.einsum("hqk,khd->qhd", weights, values)
        return found

    def decode(*, query: Any, kv_cache: Any, block_tables: Any, seq_lens: Any, **others: Any) -> Any:
        ends = list(range(1, len(seq_lens) + 1))
        return attend(query, kv_cache, block_tables, seq_lens, ends, **others)

    def extend(*, query: Any, kv_cache: Any, block_tables: Any, seq_lens: Any, **others: Any) -> Any:
        ends = others["cum_seq_lens_q"][1:].tolist()
        return attend(query, kv_cache, block_tables, seq_lens, ends, **others)

    trtllm_mha_backend.flashinfer = SimpleNamespace(
        decode=SimpleNamespace(trtllm_batch_decode_with_kv_cache=decode),
        prefill=SimpleNamespace(trtllm_batch_context_with_kv_cache=extend),
    )
    # SGLang's own kernel of the page table, without a GPU.
    for module, name in ((trtllm_mha_page_table, "create_trtllm_mha_kv_indices_triton"), (triton.language, "cdiv")):
        setattr(module, name, InterpretedFunction(getattr(module, name).fn))
    return OnCpu()


def _build_fp8_pools() -> None:
    from sglang.srt.mem_cache import kv_cache_configurator, kv_cache_dtype
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    own = kv_cache_configurator.current_platform

    class NoCpu:
        """The platform as it is, but for this one answer."""

        def is_cpu(self) -> bool:
            return False

        def __getattr__(self, name: str) -> Any:
            return getattr(own, name)

    kv_cache_configurator.current_platform = kv_cache_dtype.current_platform = NoCpu()
    if os.environ["RKV_STAND_IN_FP8"] == "checkpoint":
        _let_fp32_be_quantised()
        return
    runner = "sglang.srt.model_executor.model_runner.ModelRunner"
    HookRegistry.register(f"{runner}.load_model", _set_scales, HookType.AFTER)
    updater = "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater"
    HookRegistry.register(f"{updater}.update_weights_from_disk", _double_scales, HookType.AFTER)


def _let_fp32_be_quantised() -> None:
    import torch
    from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp8Config

    for config in (CompressedTensorsConfig, ModelOptFp8Config):
        config.get_supported_act_dtypes = lambda _: [torch.float32]


def _attention_layers(model: Any) -> list[Any]:
    from sglang.srt.layers.radix_attention import RadixAttention

    layers = [module for module in model.modules() if isinstance(module, RadixAttention)]
    return sorted(layers, key=lambda layer: layer.layer_id)


def _set_scales(result: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
    scales = [pair.split(":") for pair in os.environ["RKV_STAND_IN_FP8"].split(",")]
    for layer, (k_scale, v_scale) in zip(_attention_layers(runner.model), scales, strict=True):
        _set(layer, float(k_scale), float(v_scale))


def _double_scales(result: Any, updater: Any, *args: Any, **kwargs: Any) -> None:
    is_updated, message = result
    assert is_updated, message
    for layer in _attention_layers(updater.get_model()):
        _set(layer, 2 * layer.k_scale_float, 2 * layer.v_scale_float)


def _set(layer: Any, k_scale: float, v_scale: float) -> None:
    """As SGLang's ``BaseKVCacheMethod.process_weights_after_loading`` does."""
    import torch

    layer.k_scale, layer.v_scale = torch.tensor(k_scale), torch.tensor(v_scale)
    layer.k_scale_float, layer.v_scale_float = k_scale, v_scale


def _scaled_torch_native(runner: Any) -> Any:
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    pool, layers = runner.token_to_kv_pool, _attention_layers(runner.model)

    class ScaledPool:
        """The pool to one who passes no scales: numbers come out as they went in, but for the rounding."""

        def set_kv_buffer(self, layer: Any, loc: Any, k: Any, v: Any) -> None:
            # Copies: SGLang divides in place.
            pool.set_kv_buffer(layer, loc, k.clone(), v.clone(), layer.k_scale, layer.v_scale)

        def get_key_buffer(self, layer_id: int) -> Any:
            return pool.get_key_buffer(layer_id).float() * layers[layer_id].k_scale_float

        def get_value_buffer(self, layer_id: int) -> Any:
            return pool.get_value_buffer(layer_id).float() * layers[layer_id].v_scale_float

    backend = TorchNativeAttnBackend(runner)
    backend.token_to_kv_pool = ScaledPool()
    return backend
