"""Calibration: before a server is ready, the model answers questions, and its usual queries are measured.

What is found is kept in a file, which later starts with the model read. Two starts on one machine measure the same.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from rkv_sglang.algorithm.model_attention import ModelAttention
from rkv_sglang.algorithm.thoughts import ONE_KIND
from rkv_sglang.cache.statistics_file import load_bounds, load_statistics, save_bounds, save_statistics
from rkv_sglang.integration.startup.errors import RefusedError
from rkv_sglang.integration.startup.meters.asking import measure
from rkv_sglang.integration.startup.meters.meter import Meter, Metered
from rkv_sglang.integration.startup.meters.queries import QueryMeter
from rkv_sglang.integration.startup.meters.sparsities import SparsityMeter
from rkv_sglang.policies import ThinKV

if TYPE_CHECKING:
    from sglang.srt.managers.scheduler import Scheduler

logger = logging.getLogger(__name__)

# Elements of each weight that tell one model from another.
SAMPLED_ELEMENTS = 64


MeterT = TypeVar("MeterT", bound=Meter)
FoundT = TypeVar("FoundT")


@dataclass(frozen=True, kw_only=True)
class Calibration(Generic[MeterT, FoundT]):
    """What is measured once of a model, and kept in a file.

    Attributes:
        policy: Name of the policy that asks for it.
        what: What is found, in words, and the folder of its files.
        about: What it depends on beside the model's weights, the questions and the rank.
        meter: Measures it.
        found: Makes of the meter what is found.
        save, load: Write and read its file, as ``save_statistics`` and ``load_statistics`` do.
    """

    policy: str
    what: str
    about: str
    meter: MeterT
    found: Callable[[MeterT], FoundT]
    save: Callable[[Path, FoundT, Mapping[str, str]], None]
    load: Callable[[Path, Mapping[str, str], Any], FoundT]


def calibrated(attention: ModelAttention, scheduler: Scheduler, runtime: Metered) -> ModelAttention:
    """Return how the model attends, with statistics of its queries if the policy needs them.

    Raises:
        RefusedError: A file does not fit, or nothing can be measured; one line.
    """
    if attention.rope is None or attention.statistics is None:
        return attention
    num_layers, num_qo_heads, _ = attention.statistics.means.shape
    calibration = Calibration(
        policy="triattention",
        what="query statistics",
        about=repr(attention.rope),
        meter=QueryMeter(attention.rope, num_layers, num_qo_heads, attention.statistics.means.device),
        found=QueryMeter.statistics,
        save=save_statistics,
        load=load_statistics,
    )
    return replace(attention, statistics=_found(calibration, scheduler, runtime))


def bounded(attention: ModelAttention, layers: Sequence[Any], scheduler: Scheduler, runtime: Metered) -> Any:
    """Return the policy, with bounds between kinds of thoughts if it has none and asks for them.

    Args:
        layers: SGLang's attention layers.

    Raises:
        RefusedError: A file does not fit, or nothing can be measured; one line.
    """
    policy = runtime.policy
    if not isinstance(policy, ThinKV) or policy.execution_up_to is not None:
        return policy
    numbers = [layer.layer_id for layer in layers if layer.layer_id not in attention.sliding_layers]
    observed = policy.observed_layers(numbers)
    calibration = Calibration(
        policy="thinkv",
        what="thought bounds",
        about=f"{observed} {policy.negligible} {attention.logit_scale} {attention.logit_cap}",
        meter=SparsityMeter(observed, layers[0].tp_k_head_num, policy.negligible, attention),
        found=SparsityMeter.bounds,
        save=save_bounds,
        load=load_bounds,
    )
    low, high = _found(calibration, scheduler, runtime)
    if (low, high) == ONE_KIND:
        logger.info("KV policy thinkv: this model's attention is not of three kinds, so all thoughts are of one")
    else:
        logger.info("KV policy thinkv: execution up to a sparsity of %.4f, transitions above %.4f", low, high)
    return replace(policy, execution_up_to=low, transition_above=high)


def _found(calibration: Calibration[MeterT, FoundT], scheduler: Scheduler, runtime: Metered) -> FoundT:
    """Return what is known of the model: from the named file, from that of an earlier start, or measured now and kept.

    Raises:
        RefusedError: The file does not fit, or nothing can be measured; one line.
    """
    policy = runtime.policy
    made_from = _made_from(scheduler, calibration.about, policy)
    named = Path(os.path.expanduser(policy.statistics)) if policy.statistics else None
    own_name = "-".join([made_from["model"][:16], made_from["questions"], made_from["rank"]])
    path = named or _cache_folder() / calibration.what.replace(" ", "_") / f"{own_name}.safetensors"
    try:
        if named is not None or os.path.exists(path):
            return calibration.load(path, made_from, scheduler.device)
    except ValueError as error:
        mend = "name another file by" if named is not None else "delete it, or name a file by"
        raise RefusedError(f"{error}; {mend} --kv-policy-config '{{\"statistics\": ...}}', or leave it out") from None
    logger.info("KV policy %s: measuring the model's queries, once; they will be in %s", calibration.policy, path)
    measure(scheduler, calibration.policy, calibration.meter, runtime)
    found = calibration.found(calibration.meter)
    try:
        calibration.save(path, found, made_from)
    except OSError as error:
        logger.warning(
            "KV policy %s: %s cannot be written (%s); the next start measures again", calibration.policy, path, error
        )
    return found


def _cache_folder() -> Path:
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder, "rkv_sglang")


def sampled_places(length: int, device: torch.device) -> torch.Tensor:
    """Return which of ``length`` elements stand for all: ``SAMPLED_ELEMENTS`` at most, evenly spaced, int64, ascending.

    In integers: of more than 2**24 elements fp32 does not know the last, and takes one behind it.
    """
    count = min(SAMPLED_ELEMENTS, length)
    return torch.arange(count, device=device) * (length - 1) // max(count - 1, 1)


def _made_from(scheduler: Scheduler, about: str, policy: Any) -> dict[str, str]:
    """Return what is measured depends on, by name."""
    from sglang.srt.runtime_context import get_parallel

    model_runner = scheduler.tp_worker.model_runner
    digest = hashlib.sha256(about.encode())
    for name, weight in sorted(model_runner.model.named_parameters()):
        flat = weight.detach().reshape(-1)
        places = sampled_places(len(flat), flat.device)
        digest.update(f"{name} {list(weight.shape)} {flat[places].double().tolist()}".encode())
    parallel = get_parallel()
    return {
        "model": digest.hexdigest(),
        "questions": f"{policy.questions}x{policy.answer_tokens}",
        "rank": f"{parallel.attn_tp_rank}of{parallel.attn_tp_size}",
    }
