"""What a served request must answer, of any transformers model: passes over all tokens, what is gone masked.

Without a guess a pass for each token, so slower than ``dense``, but of every model whose attention transformers lets be
replaced: the modules of the model itself are run, with positions, images and all. Nothing here comes from the code
under test.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.support.oracle.decoder import one_thread
from tests.support.oracle.masked_forward import MaskedForward, masked_forward
from tests.support.oracle.scores import ScoreFunction, ScoreInputs
from tests.support.oracle.ties import least_margin, repeatable, swapped_at_cut, swapped_blocks


@dataclass(frozen=True)
class MaskedResult:
    """The answer; of each token how far its logit is above the second best; after how many outputs it was compacted.

    Of each compaction ``margins`` has the least by which what stays scores above what goes, but for exact ties.
    ``again`` makes the same answer once more, with other arguments by name.
    """

    output_ids: list[int] = field(default_factory=list)
    logit_gaps: list[float] = field(default_factory=list)
    compactions: list[int] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    again: "Callable[..., MaskedResult] | None" = field(default=None, repr=False, compare=False)

    @property
    def cuts(self) -> list[tuple[int, float]]:
        """Of each compaction after how many outputs it came, and its least margin."""
        return list(zip(self.compactions, self.margins, strict=True))


@repeatable
@torch.inference_mode()
def masked_compact(
    model: Any,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    *,
    budget: int,
    buffer: int,
    window: int,
    score: ScoreFunction,
    block: int | None = None,
    windows: Sequence[int | None] | None = None,
    guessed_output_ids: Sequence[int] = (),
    swapped_at: Collection[int] = (),
) -> MaskedResult:
    """Generate greedily. Without a block every layer and KV head keeps tokens of its own; arguments as of ``dense``.

    Args:
        windows: Of each layer the latest tokens that it attends to, a token's own included; None: to all. Those with a
            number keep the latest tokens, and have no say where one choice is made for all.
        guessed_output_ids: What the outputs may turn out to be, such as the answer to be judged: up to the next
            compaction they are fed at once, and count as far as they are right.
    """
    config = model.config.get_text_config()
    num_layers, num_kv_heads = config.num_hidden_layers, config.num_key_value_heads
    windows = [None] * num_layers if windows is None else list(windows)
    total, prompt_len = len(prompt_ids) + max_new_tokens, len(prompt_ids)
    # [num_layers, num_kv_heads, resident], logical positions.
    resident = torch.arange(prompt_len).expand(num_layers, num_kv_heads, -1)
    visible = torch.zeros(num_layers, num_kv_heads, total, total, dtype=torch.bool)
    for token in range(prompt_len):
        _see(visible, token, torch.arange(token + 1).expand(num_layers, num_kv_heads, -1), windows)
    ids, result = list(prompt_ids), MaskedResult()

    def feed(token: int) -> None:
        nonlocal resident
        resident = torch.cat([resident, torch.full((num_layers, num_kv_heads, 1), len(ids))], dim=2)
        _see(visible, len(ids), resident, windows)
        ids.append(token)

    with one_thread():
        while True:
            num_fed, num_outputs = len(ids), len(result.output_ids)
            # Up to the next compaction; the last token of an answer is not fed.
            room = min(prompt_len + budget + buffer - resident.shape[2], total - 1 - num_fed)
            guess = list(guessed_output_ids[num_outputs:][:room])
            before = resident
            for token in guess:
                feed(token)
            passed = masked_forward(model, ids, visible[:, :, : len(ids), : len(ids)])
            for row, guessed in enumerate([*guess, None], start=num_fed):
                (best, second), (token, _) = (pair.tolist() for pair in passed.logits[row - 1].topk(2))
                result.logit_gaps.append(best - second)
                result.output_ids.append(token)
                if token != guessed:
                    break
            # What was fed in vain goes; who sees what is settled by the places.
            del ids[row:]
            resident = resident[:, :, : before.shape[2] + row - num_fed]
            if len(result.output_ids) == max_new_tokens:
                return result
            if resident.shape[2] - prompt_len >= budget + buffer:
                passed = passed.of_first(row)
                scores = _scores(passed, resident, prompt_len, budget, window, score, windows, block is not None)
                choose = _per_head if block is None else _in_blocks
                is_swapped = len(result.output_ids) in swapped_at
                resident, margin = choose(resident, scores, prompt_len, budget, window, block, is_swapped)
                result.compactions.append(len(result.output_ids))
                result.margins.append(margin)
            feed(token)


def _see(visible: torch.Tensor, token: int, resident: torch.Tensor, windows: Sequence[int | None]) -> None:
    visible[:, :, token].scatter_(2, resident, True)
    for layer, latest in enumerate(windows):
        if latest is not None:
            visible[layer, :, token, : max(token + 1 - latest, 0)] = False


def _scores(
    passed: MaskedForward,
    resident: torch.Tensor,
    prompt_len: int,
    budget: int,
    window: int,
    score: ScoreFunction,
    windows: Sequence[int | None],
    is_one_choice: bool,
) -> torch.Tensor:
    """Return ``[num_layers, num_kv_heads, resident - window]``; the latest are the best in layers with a window.

    With one choice for all, those layers are left out.
    """
    of_layers = []
    for layer, (queries, keys) in enumerate(zip(passed.queries, passed.keys, strict=True)):
        own = keys.gather(1, resident[layer].unsqueeze(2).expand(-1, -1, keys.shape[2]))
        if windows[layer] is not None:
            of_layers += [] if is_one_choice else [resident[layer, :, :-window].float()]
            continue
        inputs = ScoreInputs(
            own, own, queries[:, -window:], resident[layer], prompt_len, logit_scale=passed.scaling, budget=budget
        )
        of_layers.append(score(inputs))
    return torch.stack(of_layers) if of_layers else torch.zeros(1, 1, resident.shape[2] - window)


def _per_head(
    resident: torch.Tensor,
    scores: torch.Tensor,
    prompt_len: int,
    budget: int,
    window: int,
    block: None,
    is_swapped: bool,
) -> tuple[torch.Tensor, float]:
    of_ranks, ranked = scores[:, :, prompt_len:].sort(dim=2, descending=True, stable=True)
    if is_swapped:
        pairs = swapped_at_cut(of_ranks.flatten(0, 1), ranked.flatten(0, 1), budget - window)
        of_ranks, ranked = (own.view_as(ranked) for own in pairs)
    best = ranked[:, :, : budget - window].sort(dim=2).values + prompt_len
    prompt = torch.arange(prompt_len).expand(*best.shape[:2], -1)
    latest = torch.arange(resident.shape[2] - window, resident.shape[2]).expand(*best.shape[:2], -1)
    margins = of_ranks[:, :, budget - window - 1] - of_ranks[:, :, budget - window]
    return resident.gather(2, torch.cat([prompt, best, latest], dim=2)), least_margin(margins)


def _in_blocks(
    resident: torch.Tensor,
    scores: torch.Tensor,
    prompt_len: int,
    budget: int,
    window: int,
    block: int,
    is_swapped: bool,
) -> tuple[torch.Tensor, float]:
    length = resident.shape[2]
    of_tokens = scores.double().mean(dim=(0, 1))
    starts = [i for i in range(0, length, block) if i >= prompt_len and i + block <= length - window]
    of_blocks = {i: float(of_tokens[i : i + block].mean()) for i in starts}
    ranked = sorted(starts, key=lambda i: (of_blocks[i], i))
    num_gone = (length - prompt_len - budget) // block
    if is_swapped:
        ranked = swapped_blocks(ranked, of_blocks, num_gone)
    gone = {i + offset for i in ranked[:num_gone] for offset in range(block)}
    margin = of_blocks[ranked[num_gone]] - of_blocks[ranked[num_gone - 1]] if len(ranked) > num_gone else 1.0
    return resident[:, :, [i for i in range(length) if i not in gone]], margin
