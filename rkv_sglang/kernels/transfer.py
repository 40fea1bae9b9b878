"""Numbers and tensors that the CPU knows, brought to a device."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor on a device; nothing waits for the GPU."""
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device, itself if it is there already; nothing waits for the GPU."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        # From other memory the CPU would wait until everything that the stream has to do is done.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
