"""An SGLang plugin for benchmarks: dummy weights under which answers depend on the KV cache.

SGLang's own are so small that attention adds next to nothing to a token's embedding: a cache full of wrong entries
would give the same tokens. Here every matrix is uniform with the standard deviation 0.02 that models are initialised
with, norms are 1, and each parameter has a seed of its own.
"""

import torch

STANDARD_DEVIATION = 0.02


def fill(model: torch.nn.Module) -> None:
    """Set every floating parameter of ``model``; the same at every start."""
    limit = STANDARD_DEVIATION * 3**0.5
    for seed, (name, parameter) in enumerate(model.state_dict().items()):
        if not torch.is_floating_point(parameter):
            continue
        if "norm" in name:
            parameter.fill_(1.0)
        else:
            generator = torch.Generator(device=parameter.device)
            parameter.uniform_(-limit, limit, generator=generator.manual_seed(seed))


def register() -> None:
    """Take the place of SGLang's function for ``--load-format dummy``."""
    from sglang.srt.model_loader import loader

    loader.initialize_dummy_weights = fill
