"""What a served request must answer: greedy decoding over a dense cache with compactions, in plain torch, fp32, CPU.

Nothing here comes from the code under test. Every step is a literal reading of the policy's definition, so a server's
output can be compared token by token, whatever its page size, prefix cache, scheduling or batch.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from tests.support.oracle.decoder import Decoder, DecodeSteps, Fp8, LayerCache, load_model, one_thread
from tests.support.oracle.images import Image
from tests.support.oracle.scores import ScoreFunction, ScoreInputs, rkv_scores
from tests.support.oracle.ties import AT_PREFIX, least_margin, repeatable, swapped_at_cut, swapped_blocks

# Where two logits or two scores lie closer, another order of summation may choose otherwise: some ten times what it
# changes as a rule in tiny models.
LOGIT_TOLERANCE, SCORE_TOLERANCE = 1e-4, 3e-8


@dataclass(frozen=True)
class Compaction:
    """One compaction of a request, all layers and heads.

    Attributes:
        num_outputs: Output tokens produced before it; the last of them is not resident yet.
        kept_positions: Logical positions kept, prompt included, sorted,
            ``[num_layers, num_kv_heads, prompt_len + budget]``, int64.
        candidate_positions: Logical positions of the generated tokens that were resident before it, but for the window,
            ``[num_layers, num_kv_heads, num_candidates]``, int64.
        candidate_scores: Their scores, the same shape, fp32.
        margins: Score of the worst candidate kept minus score of the best dropped, ``[num_layers, num_kv_heads]``.
            Where it is about the size of a rounding error, another right implementation may keep another token.
    """

    num_outputs: int
    kept_positions: torch.Tensor
    candidate_positions: torch.Tensor
    candidate_scores: torch.Tensor
    margins: torch.Tensor


@dataclass(frozen=True)
class DenseResult:
    """A request's answer and how it came about. All lists but the last have one entry per output token.

    Attributes:
        output_ids: Tokens, the end-of-sequence token included if one ended the answer.
        logprobs: Log-probability of each output token (temperature 1).
        logit_gaps: Best logit minus second best. Where it is tiny, another right implementation may choose otherwise.
        resident_lens: Tokens that attention saw when the output token was computed, the one just fed included.
        compactions: In order of time.
        prefix: What the prompt followed.
        again: Makes the same answer once more, with other arguments by name, such as ``swapped_at``.
    """

    output_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    logit_gaps: list[float] = field(default_factory=list)
    resident_lens: list[int] = field(default_factory=list)
    compactions: list[Compaction] = field(default_factory=list)
    prefix: "Prefix | None" = field(default=None, repr=False, compare=False)
    again: "Callable[..., DenseResult] | None" = field(default=None, repr=False, compare=False)

    @property
    def cuts(self) -> list[tuple[int, float]]:
        """Of each compaction after how many outputs it came, and its least margin that is no exact tie.

        ``AT_PREFIX`` is the choice of the prefix that the prompt follows.
        """
        own = [(AT_PREFIX, self.prefix.compaction)] if self.prefix else []
        own += [(compaction.num_outputs, compaction) for compaction in self.compactions]
        return [(at, least_margin(compaction.margins)) for at, compaction in own]

    def num_certain_outputs(
        self, *, logit_tolerance: float = LOGIT_TOLERANCE, score_tolerance: float = SCORE_TOLERANCE
    ) -> int:
        """Return how many leading output tokens no near-tie, of logits or of scores at a cut, puts in doubt.

        Where two at a cut have changed places, it is decided.
        """
        if self.prefix is not None and _is_in_doubt(self.prefix.compaction, score_tolerance):
            return 0
        by_logits = next((i for i, gap in enumerate(self.logit_gaps) if gap < logit_tolerance), len(self.output_ids))
        close_cuts = (own.num_outputs for own in self.compactions if _is_in_doubt(own, score_tolerance))
        return min(by_logits, next(close_cuts, by_logits))


def _is_in_doubt(compaction: Compaction, tolerance: float) -> bool:
    return bool(((compaction.margins >= 0) & (compaction.margins < tolerance)).any())


@dataclass(frozen=True)
class Prefix:
    """What is left of a document that a task has judged.

    Attributes:
        caches: One per layer, with the entries that stay; only read.
        length: Tokens of the document.
        compaction: How it came about.
        again: Makes it once more, with other arguments by name, such as ``is_swapped``.
    """

    caches: list[LayerCache]
    length: int
    compaction: Compaction
    again: "Callable[..., Prefix] | None" = field(default=None, repr=False, compare=False)


@repeatable
@torch.inference_mode()
def dense_prefix(
    model: PreTrainedModel | Path | str,
    document_ids: Sequence[int],
    task_ids: Sequence[int],
    budget: int,
    *,
    window: int = 8,
    score: ScoreFunction,
    fp8: Fp8 | None = None,
    num_judging: int | None = None,
    block: int | None = None,
    is_swapped: bool = False,
) -> Prefix:
    """Keep ``budget`` tokens of a document per layer and KV head: the first 4, the last ``window``, the best between.

    All tokens of document and task are scored, as a prompt's compaction scores them, but with the queries of the last
    ``num_judging`` tokens of the task, ``window`` of them if not said otherwise. ``fp8`` says how the cache rounds what
    it takes. With ``block`` all layers and heads keep the same: whole blocks of the document go, but for the first and
    those in which its window is, as long as ``budget`` stay. With ``is_swapped`` near-ties are decided the other way,
    as in ``dense_generate``.
    """
    num_judging = window if num_judging is None else num_judging
    model = model if isinstance(model, PreTrainedModel) else load_model(Path(model))
    decoder = Decoder(model)
    length, ids = len(document_ids), [*document_ids, *task_ids]
    caches = decoder.new_caches(len(ids), num_judging, fp8)
    with one_thread():
        _, queries = decoder._forward_layers(ids, 0, caches)
        for layer_cache, layer_queries in zip(caches, queries, strict=True):
            layer_cache.queries.extend(layer_queries[:, -num_judging:].unbind(dim=1))
        sizes = (0, length, budget, window, is_swapped)
        if block is None:
            compaction = _compact_prompt(caches, *sizes, decoder.logit_scale, score)
        else:
            scores_of = partial(
                _scores, budget=budget, logit_scale=decoder.logit_scale, score=score, windows=decoder.windows
            )
            compaction = _drop_of_prompt(caches, *sizes, scores_of, block)
    for layer_cache in caches:
        # Without the task.
        layer_cache.length = length - (length - budget) // (block or 1) * (block or 1)
    return Prefix(caches, length, compaction)


@repeatable
@torch.inference_mode()
def dense_generate(
    model: PreTrainedModel | Path | str,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    *,
    budget: int,
    buffer: int,
    window: int = 8,
    mix_lambda: float = 0.5,
    kernel_size: int = 7,
    similarity_threshold: float = 0.5,
    eos_token_ids: Collection[int] = (),
    recompute_at: Collection[int] = (),
    restore_at: Collection[int] = (),
    restored_in_flight: bool | Collection[int] = False,
    evicted_at_restore: Mapping[int, int] | None = None,
    forced_output_ids: Sequence[int] | None = None,
    score: ScoreFunction | None = None,
    early: Callable[[Sequence[int], Sequence[int]], int] | None = None,
    guessed_output_ids: Sequence[int] = (),
    block: int | None = None,
    fp8: Fp8 | None = None,
    adjust: Callable[[torch.Tensor, Sequence[int]], torch.Tensor] | None = None,
    prompt_budget: int | None = None,
    whole_prompt_after: Collection[int] = (),
    prefix: Prefix | None = None,
    carried_ids: Sequence[int] = (),
    image: Image | None = None,
    swapped_at: Collection[int] = (),
) -> DenseResult:
    """Generate greedily, keeping ``budget`` generated tokens per layer and KV head at each compaction.

    A compaction happens right before a decode step, as soon as the KV of ``budget + buffer`` generated tokens is
    resident and ``window`` tokens were decoded since the last prefill. A generated token becomes resident when it is
    fed. Decode steps use logical positions; compactions move no position.

    Args:
        model: One that ``Decoder`` knows, or the folder of one (read once a process). Its layers that attend to the
            latest tokens alone keep these, and have no say where one choice is made for all.
        prompt_ids: At least one token; all of them are always kept.
        eos_token_ids: Tokens that end the answer.
        recompute_at: Numbers of output tokens after which the request is retracted: prompt and outputs so far are
            prefilled again with full attention before the next token.
        restore_at: Numbers of output tokens after which the request is retracted and comes back with what it held: the
            last output is fed again to the cache as it is, and decode queries are counted anew.
        restored_in_flight: At each of ``restore_at``, or at these of them, the next token was being computed, as under
            overlap scheduling: it is forgotten and computed once more, after a compaction if one was due.
        evicted_at_restore: Of some of ``restore_at`` the tokens evicted since the last prefill by then, without those
            that ``prefix`` lacks. A compaction that was due ran before the request was retracted, unless this says
            that fewer were evicted.
        forced_output_ids: Take these as outputs instead of the greedy ones: ``logprobs`` then judges a sampled answer,
            or one that went another way at a near-tie. Generation stops when they run out.
        score: The policy, such as ``policy_scores.score_function`` makes one; R-KV with the settings above when
            ``None``.
        early: Given the prompt and the first 16 outputs, by how many tokens the first compaction after each prefill
            comes early. A request that may not outgrow budget and buffer is then never compacted.
        guessed_output_ids: What the outputs may turn out to be, such as the answer to be judged. Right ones cost less,
            wrong ones more; the result is the same, but for the order of summation.
        block: All layers and heads keep the same: whole blocks of so many tokens go, those of the lowest mean score.
        fp8: How the cache rounds what it takes.
        adjust: Given logits and the outputs before them, returns the logits that are sampled from, such as
            ``penalties.adjustment`` makes one.
        prompt_budget: A prompt of more tokens keeps so many of them in every layer and head, as soon as ``window``
            tokens were decoded since the last prefill and before anything else is compacted: the first 4, the last
            ``window``, and those of the best scores between, where all resident tokens are scored as generated ones.
            With ``block`` whole blocks of the lowest mean scores go, until less than one is above this.
        prefix: The prompt follows the document of this; what is left of it is held, and kept, as the prompt is.
        whole_prompt_after: After the prefills at these numbers of output tokens the prompt stays whole.
        carried_ids: What was generated after the prompt before: prefilled with it, and compacted as outputs are. No
            number of output tokens counts them, and ``early`` is given them in front of the outputs.
        image: One in what is prefilled, in the places of some of its tokens.
        swapped_at: In compactions after so many output tokens the worst that stays and the best that goes change places
            wherever they are a near-tie; ``AT_PREFIX``: in what is left of the prefix.

    Raises:
        ValueError: The budget leaves no room beside the window, or the model is of another kind.
    """
    if budget <= window:
        raise ValueError(f"budget {budget} must be greater than window {window}, which is kept inside it")
    model = model if isinstance(model, PreTrainedModel) else load_model(Path(model))
    if score is None:
        score = partial(
            rkv_scores, mix_lambda=mix_lambda, kernel_size=kernel_size, similarity_threshold=similarity_threshold
        )
    if forced_output_ids is not None:
        max_new_tokens = min(max_new_tokens, len(forced_output_ids))
    if prefix is not None and AT_PREFIX in swapped_at:
        assert prefix.again is not None, "it was made by dense_prefix"
        prefix = prefix.again(is_swapped=True)
    if isinstance(restored_in_flight, bool):
        restored_in_flight = restore_at if restored_in_flight else ()
    decoder = Decoder(model, image)
    num_before, gap = (0, 0) if prefix is None else (prefix.caches[0].length, prefix.length - prefix.caches[0].length)
    prompt_len = num_before + len(prompt_ids)
    num_carried = len(carried_ids)
    caches = decoder.new_caches(prompt_len + gap + num_carried + max_new_tokens, window, fp8)

    def prefill(ids: Sequence[int]) -> torch.Tensor:
        if prefix is None:
            return decoder.forward(list(ids), 0, caches)
        for layer_cache, own in zip(caches, prefix.caches, strict=True):
            layer_cache.load(own)
        return decoder.continued(list(ids), prefix.length, caches)

    steps = DecodeSteps(decoder, caches)
    scores_of = partial(_scores, budget=budget, logit_scale=decoder.logit_scale, score=score, windows=decoder.windows)
    result = DenseResult(prefix=prefix)
    held_prompt_len = prompt_len
    may_compact_prompt = prompt_budget is not None and prompt_budget <= prompt_len - (block or 1)
    may_compact_prompt = may_compact_prompt and max_new_tokens - 1 > window
    is_prompt_due = may_compact_prompt and 0 not in whole_prompt_after
    num_decoded_since_prefill = 0
    is_whole = True
    with one_thread():
        logits = prefill([*prompt_ids, *carried_ids])
        while True:
            num_outputs = len(result.output_ids)
            forced_id = None if forced_output_ids is None else forced_output_ids[num_outputs]
            if adjust is not None:
                logits = adjust(logits, result.output_ids)
            _append_output(result, logits, forced_id, caches[0].length)
            num_outputs += 1
            if num_outputs == max_new_tokens or result.output_ids[-1] in eos_token_ids:
                return result
            if num_outputs in recompute_at:
                for layer_cache in caches:
                    layer_cache.clear()
                logits = prefill([*prompt_ids, *carried_ids, *result.output_ids])
                num_decoded_since_prefill = 0
                is_whole = True
                held_prompt_len = prompt_len
                is_prompt_due = may_compact_prompt and num_outputs not in whole_prompt_after
                continue
            is_restored = num_outputs in restore_at
            is_dropped = is_restored and num_outputs in restored_in_flight
            position = prompt_len + gap + num_carried + num_outputs - 1
            most_evicted = (evicted_at_restore or {}).get(num_outputs, position + max_new_tokens)
            for is_in_flight in [True, False] if is_dropped else [False]:
                num_seen = num_outputs + (is_dropped and not is_in_flight)
                if is_prompt_due and num_decoded_since_prefill >= window:
                    assert prompt_budget is not None
                    sizes = (num_seen, prompt_len, prompt_budget, window, num_seen in swapped_at)
                    result.compactions.append(
                        _compact_prompt(caches, *sizes, decoder.logit_scale, score)
                        if block is None
                        else _drop_of_prompt(caches, *sizes, scores_of, block)
                    )
                    is_prompt_due = False
                    held_prompt_len = prompt_len - (prompt_len - prompt_budget) // (block or 1) * (block or 1)
                num_resident_generated = caches[0].length - held_prompt_len
                due_len = budget + buffer
                if early is not None and num_carried + max_new_tokens - 1 <= budget + buffer:
                    due_len = num_carried + max_new_tokens
                elif early is not None and is_whole and num_carried + num_outputs >= 16:
                    due_len -= early(prompt_ids, [*carried_ids, *result.output_ids][:16])
                num_evicted = position + (is_dropped and not is_in_flight) - gap - caches[0].length
                if (
                    num_resident_generated >= due_len
                    and num_decoded_since_prefill >= window
                    and num_evicted < most_evicted
                ):
                    is_whole = False
                    if block is None:
                        _observe(caches, held_prompt_len, budget, decoder, score)
                    sizes = (num_seen, held_prompt_len, budget, window, num_seen in swapped_at)
                    result.compactions.append(
                        _compact(caches, *sizes, scores_of)
                        if block is None
                        else _drop(caches, *sizes, scores_of, block)
                    )
                if is_in_flight:
                    steps.feed(result.output_ids[-1], position)
                    num_decoded_since_prefill += 1
            if is_dropped:
                for layer_cache in caches:
                    layer_cache.drop_last()
            # Up to the next compaction, after which nothing computed before it holds.
            room = max(0, held_prompt_len + budget + buffer - caches[0].length - 1)
            if is_prompt_due:
                room = max(0, min(room, window - num_decoded_since_prefill - 1))
            guess = guessed_output_ids[num_outputs : min(num_outputs + room, max_new_tokens)]
            logits = steps.feed(result.output_ids[-1], position, guess)
            num_decoded_since_prefill += 1
            if is_restored:
                num_decoded_since_prefill = 0
                for layer_cache in caches:
                    layer_cache.queries.clear()


def _append_output(result: DenseResult, logits: torch.Tensor, forced_id: int | None, resident_len: int) -> None:
    (best, second), (best_id, _) = (pair.tolist() for pair in logits.topk(2))
    output_id = best_id if forced_id is None else forced_id
    result.output_ids.append(output_id)
    result.logprobs.append(logits.log_softmax(dim=-1)[output_id].item())
    result.logit_gaps.append(best - second)
    result.resident_lens.append(resident_len)


def _compact(
    caches: list[LayerCache],
    num_outputs: int,
    prompt_len: int,
    budget: int,
    window: int,
    is_swapped: bool,
    scores_of: Callable[[LayerCache, int, int], torch.Tensor | None],
) -> Compaction:
    kept_positions, candidate_positions, candidate_scores, margins = [], [], [], []
    num_kept_candidates = budget - window
    for layer, layer_cache in enumerate(caches):
        window_start = layer_cache.length - window
        scores = scores_of(layer_cache, layer, prompt_len)
        if scores is None:
            scores = layer_cache.positions[:, :window_start].float()
        ranked_scores, ranked = scores[:, prompt_len:].sort(dim=-1, descending=True, stable=True)
        if is_swapped:
            ranked_scores, ranked = swapped_at_cut(ranked_scores, ranked, num_kept_candidates)
        kept_candidates = ranked[:, :num_kept_candidates].sort(dim=-1).values + prompt_len
        num_kv_heads = scores.shape[0]
        prompt = torch.arange(prompt_len).expand(num_kv_heads, -1)
        window_indices = torch.arange(window_start, layer_cache.length).expand(num_kv_heads, -1)
        candidate_positions.append(layer_cache.positions[:, prompt_len:window_start].clone())
        candidate_scores.append(scores[:, prompt_len:])
        margins.append(ranked_scores[:, num_kept_candidates - 1] - ranked_scores[:, num_kept_candidates])
        layer_cache.keep(torch.cat((prompt, kept_candidates, window_indices), dim=-1))
        kept_positions.append(layer_cache.positions.clone())
    return Compaction(
        num_outputs,
        torch.stack(kept_positions),
        torch.stack(candidate_positions),
        torch.stack(candidate_scores),
        torch.stack(margins),
    )


def _compact_prompt(
    caches: list[LayerCache],
    num_outputs: int,
    prompt_len: int,
    prompt_budget: int,
    window: int,
    is_swapped: bool,
    logit_scale: float,
    score: ScoreFunction,
) -> Compaction:
    """Drop all of the prompt but what every head keeps of it; the generated tokens stay."""
    kept_positions, candidate_positions, candidate_scores, margins = [], [], [], []
    num_kept_candidates = prompt_budget - 4 - window
    for layer, layer_cache in enumerate(caches):
        sizes = {"budget": prompt_budget, "logit_scale": logit_scale}
        # No layer of a sliding window, whose prompts are not compacted.
        scores = _scores(layer_cache, layer, 0, **sizes, score=score, windows=[None] * len(caches))
        assert scores is not None
        candidates = scores[:, 4 : prompt_len - window]
        ranked_scores, ranked = candidates.sort(dim=-1, descending=True, stable=True)
        if is_swapped:
            ranked_scores, ranked = swapped_at_cut(ranked_scores, ranked, num_kept_candidates)
        middle = ranked[:, :num_kept_candidates].sort(dim=-1).values + 4
        num_kv_heads = scores.shape[0]
        first = torch.arange(4).expand(num_kv_heads, -1)
        last = torch.arange(prompt_len - window, layer_cache.length).expand(num_kv_heads, -1)
        candidate_positions.append(layer_cache.positions[:, 4 : prompt_len - window].clone())
        candidate_scores.append(candidates)
        margins.append(ranked_scores[:, num_kept_candidates - 1] - ranked_scores[:, num_kept_candidates])
        layer_cache.keep(torch.cat((first, middle, last), dim=-1))
        kept_positions.append(layer_cache.positions.clone())
        # What a policy remembers is of generated tokens.
        layer_cache.memory.zero_()
        layer_cache.beacons.clear()
    return Compaction(
        num_outputs,
        torch.stack(kept_positions),
        torch.stack(candidate_positions),
        torch.stack(candidate_scores),
        torch.stack(margins),
    )


def _scores(
    layer_cache: LayerCache,
    layer: int,
    prompt_len: int,
    *,
    budget: int,
    logit_scale: float,
    score: ScoreFunction,
    windows: Sequence[int | None],
) -> torch.Tensor | None:
    """Return scores of all but the window's tokens; None in a layer that keeps the latest and has no say."""
    if windows[layer] is not None:
        return None
    return score(_inputs(layer_cache, layer, prompt_len, budget, logit_scale))


def _observe(
    caches: Sequence[LayerCache], prompt_len: int, budget: int, decoder: Decoder, score: ScoreFunction
) -> None:
    """Let a policy that wants it look at all layers that attend to everything, before any is scored."""
    observe = getattr(getattr(score, "func", score), "observe", None)
    if observe is None:
        return
    attending = [layer for layer, window in enumerate(decoder.windows) if window is None]
    inputs = [_inputs(caches[layer], layer, prompt_len, budget, decoder.logit_scale) for layer in attending]
    observe(inputs, **getattr(score, "keywords", {}))


def _inputs(layer_cache: LayerCache, layer: int, prompt_len: int, budget: int, logit_scale: float) -> ScoreInputs:
    return ScoreInputs(
        layer_cache.keys,
        layer_cache.values,
        torch.stack(tuple(layer_cache.queries), dim=1),
        layer_cache.positions,
        prompt_len,
        layer_cache.memory,
        layer,
        budget=budget,
        logit_scale=logit_scale,
        beacons=layer_cache.beacons,
    )


def _drop(
    caches: list[LayerCache],
    num_outputs: int,
    prompt_len: int,
    budget: int,
    window: int,
    is_swapped: bool,
    scores_of: Callable[[LayerCache, int, int], torch.Tensor | None],
    block: int,
) -> Compaction:
    """Drop whole blocks for all layers and heads at once; what is recorded is of blocks, as of one layer and head."""
    resident_len = caches[0].length
    scored = [scores_of(own, layer, prompt_len) for layer, own in enumerate(caches)]
    starts = [
        start
        for start in range(0, resident_len, block)
        if start >= prompt_len and start + block <= resident_len - window
    ]
    num_dropped = (resident_len - prompt_len - budget) // block
    return _drop_lowest(caches, num_outputs, scored, starts, block, num_dropped, is_swapped)


def _drop_of_prompt(
    caches: list[LayerCache],
    num_outputs: int,
    prompt_len: int,
    prompt_budget: int,
    window: int,
    is_swapped: bool,
    scores_of: Callable[[LayerCache, int, int], torch.Tensor | None],
    block: int,
) -> Compaction:
    """Drop blocks of the prompt, but for the first and those in which its window is; the generated tokens stay."""
    scored = [scores_of(own, layer, 0) for layer, own in enumerate(caches)]
    starts = [start for start in range(block, prompt_len, block) if start + block <= prompt_len - window]
    for layer_cache in caches:
        # What a policy remembers is of generated tokens.
        layer_cache.memory.zero_()
        layer_cache.beacons.clear()
    return _drop_lowest(caches, num_outputs, scored, starts, block, (prompt_len - prompt_budget) // block, is_swapped)


def _drop_lowest(
    caches: list[LayerCache],
    num_outputs: int,
    scored: Sequence[torch.Tensor | None],
    starts: Sequence[int],
    block: int,
    num_dropped: int,
    is_swapped: bool,
) -> Compaction:
    """Drop the blocks of the lowest mean score, the older of equal ones, of those that start there."""
    resident_len = caches[0].length
    of_layers = torch.stack([scores for scores in scored if scores is not None])
    of_tokens = of_layers.double().mean(dim=(0, 1))
    of_blocks = {start: float(of_tokens[start : start + block].mean()) for start in starts}
    ranked = sorted(starts, key=lambda start: (of_blocks[start], start))
    if is_swapped:
        ranked = swapped_blocks(ranked, of_blocks, num_dropped)
    dropped = {start + offset for start in ranked[:num_dropped] for offset in range(block)}
    kept = torch.tensor([index for index in range(resident_len) if index not in dropped])
    before = caches[0].positions[0].clone()
    for layer_cache in caches:
        layer_cache.keep(kept.expand(len(layer_cache.keys), -1))
    scores = torch.tensor([of_blocks[start] for start in starts])
    margin = of_blocks[ranked[num_dropped]] - of_blocks[ranked[num_dropped - 1]] if len(ranked) > num_dropped else 1.0
    return Compaction(
        num_outputs,
        before[kept].view(1, 1, -1),
        before[starts].view(1, 1, -1),
        scores.view(1, 1, -1),
        torch.tensor([[margin]]),
    )
