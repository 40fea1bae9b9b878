"""The one near-duplicate that each row of the cosine matrix exempts: its most recent one. Source: arXiv 2505.24133.

Each row scans columns from the newest to the oldest, block by block, and leaves at its first hit. What a prompt token
finds within the prompt never changes, so it is kept for a long prompt: its rows then scan generated columns only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Columns of the first block, which all rows meet: few, since most rows find their near-duplicate here.
FIRST_WIDTH = 16
# Every later block holds twice the pairs of the one before, up to MAX_AREA a row: fewer rows, so more columns.
MAX_AREA = 64


@dataclass(eq=False)
class PromptHits:
    """What the tokens of one request's prompt find within the prompt: their most recent near-duplicates.

    Attributes:
        columns: Token of the prompt, 0 where there is none, ``[num_layers, num_kv_heads, prompt_len]``, int32;
            contiguous but for the layers.
        is_filled: Whether they were found; until then the first score that is given them writes them.
    """

    columns: Tensor
    is_filled: bool = False

    @classmethod
    def empty(cls, num_layers: int, num_kv_heads: int, prompt_len: int, device: torch.device) -> "PromptHits":
        """Return room for what is yet to be found."""
        return cls(torch.empty(num_layers, num_kv_heads, prompt_len, dtype=torch.int32, device=device))

    @property
    def prompt_len(self) -> int:
        """Tokens of the prompt."""
        return self.columns.shape[2]

    def of_layers(self, layers: slice) -> "PromptHits":
        """Return those of some layers; they share memory with these."""
        return PromptHits(self.columns[layers], self.is_filled)


def exempt_sums(unit: Tensor, threshold: float, prompt_hits: Tensor | None = None, is_filled: bool = False) -> Tensor:
    """Per column, the sum of the similarities that rows exempt there; mutates ``prompt_hits`` unless it is filled.

    Args:
        unit: Unit keys of one head, temporal order, ``[L, head_dim]``, fp32.
        threshold: Cosine above which two keys are near-duplicates; the diagonal counts as 0.
        prompt_hits: ``PromptHits.columns`` of this head, ``[prompt_len]``, int32; None to scan all columns.
        is_filled: ``PromptHits.is_filled``.

    Returns:
        ``[L]``, fp32.
    """
    if prompt_hits is None:
        newest, similarity = _newest_hits(unit, unit, threshold, shift=0)
        missing = (newest < 0).nonzero().squeeze(1)
    else:
        prompt_len = len(prompt_hits)
        if not is_filled:
            prompt = unit[:prompt_len]
            prompt_hits.copy_(_newest_hits(prompt, prompt, threshold, shift=0)[0].clamp_(min=0))
        newest, similarity = _newest_hits(unit, unit[prompt_len:], threshold, shift=prompt_len)
        newest = torch.where(newest < 0, newest, newest + prompt_len)
        _scan_prompt(unit, newest, similarity, prompt_len, threshold)
        missing = (newest < 0).nonzero().squeeze(1)
        newest[:prompt_len] = torch.where(newest[:prompt_len] < 0, prompt_hits, newest[:prompt_len])
    # A row without a hit exempts column 0; on the diagonal that is a 0.
    newest.clamp_(min=0)
    columns = newest[missing]
    known = (unit[missing] * unit[columns]).sum(dim=1)
    similarity[missing] = known.masked_fill_(columns == missing, 0.0)
    return unit.new_zeros(len(unit)).index_add_(0, newest, similarity)


def _scan_prompt(unit: Tensor, newest: Tensor, similarity: Tensor, prompt_len: int, threshold: float) -> None:
    """Let generated tokens without a hit scan the prompt; mutates ``newest`` and ``similarity`` of theirs.

    A pair is as similar one way as the other: a prompt token whose newest hit is older than a generated token is none
    of that one's near-duplicates, and need not be compared again.
    """
    rows = prompt_len + (newest[prompt_len:] < 0).nonzero().squeeze(1)
    if len(rows) == 0:
        return
    columns = (newest[:prompt_len] >= rows[0]).nonzero().squeeze(1)
    if len(columns) == 0:
        return
    found, of_rows = _newest_hits(unit[rows], unit[columns], threshold, shift=None)
    is_hit = found >= 0
    newest[rows[is_hit]] = columns[found[is_hit]]
    similarity[rows[is_hit]] = of_rows[is_hit]


def _newest_hits(
    row_keys: Tensor, column_keys: Tensor, threshold: float, *, shift: int | None
) -> tuple[Tensor, Tensor]:
    """Scan columns, oldest first in ``column_keys``, from the newest on.

    Args:
        row_keys, column_keys: ``[num_rows, head_dim]`` and ``[num_columns, head_dim]``, fp32.
        shift: Row i is column ``i - shift``, and its similarity with itself 0; None if no row is a column.

    Returns:
        Each row's newest column above the threshold, int64, -1 if there is none; and the similarity there, fp32.
    """
    num_rows, num_columns = len(row_keys), len(column_keys)
    # Columns are ranked from 1, so that rank 0 means no hit. Compared as fp32, which is exact up to 2^24 tokens.
    ranks = torch.arange(1, num_columns + 1, device=row_keys.device, dtype=row_keys.dtype)
    rows = torch.arange(num_rows, device=row_keys.device)
    newest, similarity_there = torch.full_like(rows, -1), row_keys.new_zeros(num_rows)
    end, width, area = num_columns, FIRST_WIDTH, FIRST_WIDTH
    while end > 0 and len(rows) > 0:
        start = max(0, end - width)
        # [len(rows), end - start]
        similarity = row_keys @ column_keys[start:end].T
        if shift is not None:
            _zero_diagonal(similarity, rows, start + shift, num_rows)
        # The comparison writes fp32: storing and reducing booleans is several times slower on a CPU.
        above = torch.gt(similarity, threshold, out=torch.empty_like(similarity))
        newest_rank = above.mul_(ranks[start:end]).amax(dim=1).long()
        column = (newest_rank - (start + 1)).clamp_(min=0).unsqueeze(1)
        there = similarity.gather(1, column).squeeze(1)
        if len(rows) == num_rows:
            newest, similarity_there = newest_rank - 1, there
        else:
            newest[rows], similarity_there[rows] = newest_rank - 1, there
        left = (newest_rank == 0).nonzero().squeeze(1)
        if len(left) < len(rows):
            rows, row_keys = rows.index_select(0, left), row_keys.index_select(0, left)
        area = min(2 * area, MAX_AREA)
        end, width = start, area * num_rows // max(1, len(rows))
    return newest, similarity_there


def _zero_diagonal(similarity: Tensor, rows: Tensor, start: int, num_rows: int) -> None:
    """Set to 0, in place, where the token ``rows[i]`` of row i is the token ``start + j`` of column j."""
    if len(rows) == num_rows:
        similarity.diagonal(-start).zero_()
        return
    diagonal = (rows - start).unsqueeze(1)
    nearest = diagonal.clamp(0, similarity.shape[1] - 1)
    similarity.scatter_(1, nearest, similarity.gather(1, nearest).masked_fill_(nearest == diagonal, 0.0))
