"""Checks of shapes, dtypes and devices shared by the functions of this package. None of them reads tensor data."""

import math

from torch import Tensor


def check_keys(keys: Tensor) -> None:
    """Raise ``ValueError`` unless ``keys`` is floating ``[L, num_kv_heads, head_dim]`` with no empty dimension."""
    if keys.dim() != 3 or 0 in keys.shape:
        raise ValueError(f"keys must be [L, num_kv_heads, head_dim] with no empty dimension, got {list(keys.shape)}")
    if not keys.is_floating_point():
        raise ValueError(f"keys must have a floating dtype, got {keys.dtype}")


def check_queries(queries: Tensor, keys: Tensor) -> None:
    """Raise ``ValueError`` unless ``queries`` is floating ``[window, num_qo_heads, head_dim]`` and fits ``keys``."""
    if queries.dim() != 3 or 0 in queries.shape:
        raise ValueError(
            f"queries must be [window, num_qo_heads, head_dim] with no empty dimension, got {list(queries.shape)}"
        )
    if not queries.is_floating_point():
        raise ValueError(f"queries must have a floating dtype, got {queries.dtype}")
    if queries.device != keys.device:
        raise ValueError(f"queries are on {queries.device} and keys on {keys.device}: put both on one device")
    window, num_qo_heads, head_dim = queries.shape
    num_tokens, num_kv_heads, key_dim = keys.shape
    if head_dim != key_dim:
        raise ValueError(f"queries have head_dim {head_dim} and keys {key_dim}: they must be equal")
    if num_qo_heads % num_kv_heads:
        raise ValueError(f"num_qo_heads {num_qo_heads} of queries must be a multiple of num_kv_heads {num_kv_heads}")
    if window > num_tokens:
        raise ValueError(f"queries have a window of {window} tokens but keys hold only L = {num_tokens}")


def check_kernel_size(kernel_size: int) -> None:
    """Raise ``ValueError`` unless ``kernel_size`` is odd and positive, so that the max-pool has a centre."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and at least 1, got {kernel_size}")


def check_threshold(threshold: float) -> None:
    """Raise ``ValueError`` unless ``threshold`` is finite."""
    if not math.isfinite(threshold):
        raise ValueError(f"similarity threshold must be finite, got {threshold}")


def check_mix_lambda(mix_lambda: float) -> None:
    """Raise ``ValueError`` unless ``mix_lambda`` is in [0, 1]."""
    if not 0.0 <= mix_lambda <= 1.0:
        raise ValueError(f"mix_lambda must be in [0, 1], got {mix_lambda}")


def check_selection(scores: Tensor, prompt_len: int, window: int, budget: int) -> None:
    """Raise ``ValueError`` unless ``budget`` tokens can be kept from ``scores`` ``[num_kv_heads, L - window]``."""
    if scores.dim() != 2 or scores.shape[0] == 0:
        raise ValueError(f"scores must be [num_kv_heads, L - window], got {list(scores.shape)}")
    if not scores.is_floating_point():
        raise ValueError(f"scores must have a floating dtype, got {scores.dtype}")
    if prompt_len < 0 or window < 1 or budget < window:
        raise ValueError(
            f"need prompt_len >= 0, window >= 1 and budget >= window, "
            f"got prompt_len {prompt_len}, window {window}, budget {budget}"
        )
    num_candidates = scores.shape[1] - prompt_len
    if num_candidates < budget - window:
        raise ValueError(
            f"scores {list(scores.shape)} hold {num_candidates} candidates after prompt_len {prompt_len}, "
            f"but budget {budget} less window {window} asks for {budget - window}: compact later or lower the budget"
        )
