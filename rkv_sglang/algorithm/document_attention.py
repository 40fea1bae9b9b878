"""Attention that a document receives from tokens behind it: two scores of its tokens, added up as queries pass by.

``task`` (arXiv 2503.04973): every attention row of the task's tokens, times the number of positions that it attends
to; mean over these tokens and the query heads of the group. ``repeat`` (KVzip, arXiv 2505.23416): the largest attention
that any token of a repeated document pays, over the query heads of the group too. As there, a chunk of the repeat looks
at the same chunk of the document, at the instruction and at itself, so the work grows with the length alone; the
softmax leaves the rest of the document out but for its first tokens, which take what attention finds no other place.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rkv_sglang.algorithm.model_attention import ModelAttention
from rkv_sglang.config import BY_TASK, NUM_FIRST_KEPT

# Tokens of a chunk of the repeat, and those before it that it looks at too: KVzip's own numbers.
REPEAT_CHUNK, REPEAT_LEAD = 2048, 8
# Attention rows are made in so much memory, and keys are read into as much; a single row or key may take more.
JUDGING_BYTES = 64 * 2**20
# Of each pair of a query head and a key: logits, what they were made of, their softmax, and what is not to be seen.
_PAIR_BYTES = 16


@dataclass(frozen=True)
class View:
    """A run of tokens behind a document, and what they look at.

    Attributes:
        start, end: Their places in the prompt.
        keys: Runs of places over which each of them takes its softmax, no further than to its own; in order, apart.
        scored: That of ``keys``, or its beginning, whose attention counts.
    """

    start: int
    end: int
    keys: tuple[range, ...]
    scored: range

    @property
    def first_column(self) -> int:
        """Where ``scored`` begins among all keys."""
        return sum(len(run) for run in self.keys if run.stop <= self.scored.start)


def views_of_task(length: int, start: int, end: int) -> Iterator[View]:
    """Yield what tokens of a task see of a prompt, all of it; ``length`` as in ``add_attention``."""
    yield View(start, end, (range(end),), range(length))


def views_of_repeat(length: int, input_len: int, start: int, end: int) -> Iterator[View]:
    """Yield what tokens of a repeated document see of a prompt, chunk by chunk.

    Args:
        length, input_len: As in ``add_attention``.
        start, end: Places of the tokens, all of them of the repeat.
    """
    first = input_len - length
    for begin in range((start - first) // REPEAT_CHUNK * REPEAT_CHUNK, end - first, REPEAT_CHUNK):
        stop = min(begin + REPEAT_CHUNK, length)
        until = min(first + stop, end)
        runs = (
            range(min(NUM_FIRST_KEPT, begin)),
            range(begin, stop),
            range(length, first),
            range(max(first + begin - REPEAT_LEAD, first), until),
        )
        yield View(max(first + begin, start), until, tuple(run for run in runs if run), range(begin, stop))


@torch.no_grad()
def add_attention(
    scores: Tensor,
    judge: str,
    queries: Tensor,
    place: int,
    input_len: int,
    read_keys: Callable[[int, Tensor], Tensor],
    model: ModelAttention,
) -> None:
    """Add to one layer's scores what the document receives from some of the tokens that judge it; waits for nothing.

    Once all of them came, in whatever pieces, the scores are those of the module's docstring, but for the order in
    which numbers are added. Works in twice ``JUDGING_BYTES``.

    Args:
        scores: ``[num_kv_heads, length]``, fp32, 0 before the first piece; mutated.
        judge: ``BY_TASK`` or ``BY_REPEAT``.
        queries: Post-RoPE queries of tokens in a row, of the task or of the repeat, ``[n, num_qo_heads, head_dim]``,
            floating.
        place: Place of the first of them in the prompt.
        input_len: Tokens of the prompt: the document first, and at the end the task or the document again.
        read_keys: Given a KV head and places ``[m]``, int64, returns the keys as cached, ``[m, head_dim]``, fp32.
        model: How logits are made of products.
    """
    num_kv_heads, length = scores.shape
    end, group_size = place + len(queries), queries.shape[1] // num_kv_heads
    is_task = judge == BY_TASK
    views = views_of_task(length, place, end) if is_task else views_of_repeat(length, input_len, place, end)
    for view in views:
        keys = torch.cat([torch.arange(run.start, run.stop, device=scores.device) for run in view.keys])
        columns = slice(view.first_column, view.first_column + len(view.scored))
        step = max(1, JUDGING_BYTES // (_PAIR_BYTES * group_size * len(keys)))
        for first in range(view.start, view.end, step):
            last = min(first + step, view.end)
            # Of every row, that is, of every token and query head.
            places = torch.arange(first, last, device=scores.device).repeat_interleave(group_size)
            is_later = keys > places[:, None]
            for head in range(num_kv_heads):
                heads = slice(head * group_size, (head + 1) * group_size)
                rows = queries[first - place : last - place, heads].flatten(0, 1).float()
                logits = _logits(rows, head, keys, read_keys, model)
                attention = logits.masked_fill_(is_later, -torch.inf).softmax(dim=1)[:, columns]
                judged = scores[head, view.scored.start : view.scored.stop]
                if is_task:
                    judged += (places + 1.0) / ((input_len - length) * group_size) @ attention
                else:
                    torch.maximum(judged, attention.amax(dim=0), out=judged)


def _logits(
    rows: Tensor, head: int, keys: Tensor, read_keys: Callable[[int, Tensor], Tensor], model: ModelAttention
) -> Tensor:
    """Return the logits of rows of queries with a head's keys, ``[num_rows, num_keys]``; not all keys at a time."""
    num_rows, head_dim = rows.shape
    logits = rows.new_empty(num_rows, len(keys))
    # A key as cached, and in fp32.
    most_keys = max(1, JUDGING_BYTES // (8 * head_dim))
    for start in range(0, len(keys), most_keys):
        own = keys[start : start + most_keys]
        logits[:, start : start + len(own)] = model.logits(rows @ read_keys(head, own).T, head_dim)
    return logits
