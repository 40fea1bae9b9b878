"""What the kernels are measured with and against: rows, timers, a pool of keys, the quadratic score, the plot."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, normalize
from tqdm import tqdm

from benchmarks.common.device import REHEARSAL
from benchmarks.common.drawing import load_pyplot
from benchmarks.common.schema import read_table, run_info, write_table
from benchmarks.common.tables import KERNELS
from rkv_sglang.algorithm.reference import NORM_EPS
from rkv_sglang.cache.buffers import KVBuffers
from rkv_sglang.cache.compact import DueRequest, compact_requests
from rkv_sglang.policies import RKV
from rkv_sglang.sizes.compaction_plan import plan_compaction

# Llama-3.1-8B; in a rehearsal as little as runs every line.
NUM_LAYERS, NUM_KV_HEADS, NUM_QO_HEADS, HEAD_DIM = (2, 1, 2, 32) if REHEARSAL else (32, 8, 32, 128)
WINDOW, BUFFER = 8, 128
KV_BYTES_PER_TOKEN = 2 * NUM_LAYERS * NUM_KV_HEADS * HEAD_DIM * 2
SETTINGS: dict[str, Any] = {"mix_lambda": 0.5, "kernel_size": 7, "similarity_threshold": 0.5}
NUM_CLUSTERS = 32


@dataclass
class Row:
    """One measurement; times of all layers together unless ``op`` says otherwise."""

    op: str
    keys: str
    num_tokens: int
    num_requests: int
    p20_ms: float
    p50_ms: float
    p80_ms: float
    bound_ms: float = 0.0
    over_bound: float = 0.0
    extra_bytes: int = 0
    note: str = ""

    def as_table_row(self) -> dict[str, Any]:
        """Return it as a row of ``tables.KERNELS``, rounded."""
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(self).items()}


@dataclass
class Report:
    """All rows of a run, each printed and written to ``folder`` as it comes, so that a run cut short loses none."""

    bandwidth: float
    folder: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row, bound_bytes: float = 0.0) -> Row:
        """Append a row, held against the time that so many bytes take."""
        if bound_bytes:
            row.bound_ms = bound_bytes / self.bandwidth * 1e3
            row.over_bound = row.p50_ms / row.bound_ms
        self.rows.append(row)
        if self.folder is not None:
            info = run_info(**self.settings, copy_bytes_per_s=round(self.bandwidth))
            write_table(self.folder, KERNELS, [each.as_table_row() for each in self.rows], info)
        bound = f"  {row.over_bound:6.2f} x its bound" if row.over_bound else ""
        extra = f"  {row.extra_bytes / 2**20:9.1f} MiB extra" if row.extra_bytes else ""
        where = f"{row.keys:9} L {row.num_tokens:5} due {row.num_requests:3}"
        tqdm.write(f"{row.op:28} {where}  {row.p50_ms:9.3f} ms{bound}{extra}  {row.note}")
        return row


def wall_times(run: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Return the quantiles of the time from the call to the end of its work, in ms."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = []
    for _ in range(rounds + 1):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    p20, _, _, p80 = statistics.quantiles(times[1:], n=5)
    return p20, statistics.median(times[1:]), p80


def make_keys(kind: str, num_tokens: int, device: str, dtype: torch.dtype) -> Tensor:
    """Return the keys of one layer of either kind, ``[num_tokens, NUM_KV_HEADS, HEAD_DIM]``."""
    keys = torch.randn(num_tokens, NUM_KV_HEADS, HEAD_DIM, device=device, dtype=dtype)
    if kind == "clustered":
        # Noise of norm 0.65 beside a unit centre: cosine 1 / (1 + 0.65 ** 2) = 0.7.
        centres = normalize(torch.randn(NUM_CLUSTERS, NUM_KV_HEADS, HEAD_DIM, device=device), dim=-1).to(dtype)
        keys = keys.mul_(0.65 / HEAD_DIM**0.5).add_(centres[torch.randint(NUM_CLUSTERS, (num_tokens,), device=device)])
    return keys


@dataclass(frozen=True)
class RecordedKeys:
    """The keys that a model cached for one text, after RoPE.

    Attributes:
        keys: ``[num_layers, num_tokens, num_kv_heads, head_dim]``, fp16.
        num_qo_heads: Query heads of the model.
    """

    keys: Tensor
    num_qo_heads: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the text."""
        return self.keys.shape[1]

    def save(self, path: Path) -> None:
        """Write them to a file."""
        torch.save(asdict(self), path)

    @classmethod
    def load(cls, path: Path) -> "RecordedKeys":
        """Read what ``save`` wrote."""
        return cls(**torch.load(path, map_location="cpu", weights_only=True))


class Pool:
    """A pool of slots for many requests and the pieces of a compaction on it.

    Args:
        kind: What the keys are: ``clustered``, ``random`` or ``recorded``.
        recorded: For ``recorded``: what every request gets; the pool has their shape.
    """

    def __init__(
        self,
        kind: str,
        num_slots: int,
        num_layers: int,
        device: str,
        dtype: torch.dtype,
        recorded: RecordedKeys | None = None,
    ) -> None:
        self.kind, self.num_slots, self.device = kind, num_slots, device
        self.recorded = None if recorded is None else recorded.keys.to(device, dtype)
        if recorded is None:
            keys = [make_keys(kind, num_slots, device, dtype) for _ in range(num_layers)]
            num_qo_heads = NUM_QO_HEADS
        else:
            num_layers, _, *row = recorded.keys.shape
            keys = [torch.zeros(num_slots, *row, device=device, dtype=dtype) for _ in range(num_layers)]
            num_qo_heads = recorded.num_qo_heads
        # The time of a score depends on the keys, not on the queries.
        shape = (num_layers, 1, WINDOW, num_qo_heads, keys[0].shape[-1])
        self.queries = torch.randn(shape, device=device, dtype=dtype)
        values = [torch.randn_like(layer) for layer in keys]
        ones = [1.0] * num_layers
        self.buffers = KVBuffers.from_layers(keys, values, dtype=dtype, key_scales=ones, value_scales=ones)

    @property
    def key_bytes_per_token(self) -> int:
        """Bytes of a token's keys in all layers."""
        return sum(tensor[0].nbytes for tensor in self.buffers.keys.tensors)

    def fill(self, requests: Sequence[DueRequest]) -> None:
        """Write all keys anew."""
        for layer, tensor in enumerate(self.buffers.keys.tensors):
            if self.recorded is None:
                tensor[:, 0] = make_keys(self.kind, self.num_slots, self.device, tensor.dtype)
            else:
                for request in requests:
                    tensor[request.slots, 0] = self.recorded[layer, : len(request.slots)]

    def requests(self, num_tokens: int, num_requests: int) -> list[DueRequest]:
        """Return requests of that many tokens, all generated, on scattered slots."""
        slots = torch.randperm(self.num_slots, device=self.device)[: num_tokens * num_requests]
        plan = plan_compaction(prompt_len=0, resident_len=num_tokens, budget=num_tokens - BUFFER, page_size=1)
        return [DueRequest(plan, own, num_tokens) for own in slots.split(num_tokens)]

    def compact(self, requests: list[DueRequest]) -> None:
        """Compact them as a server does."""

        def read_queries(part: slice, layers: slice) -> Tensor:
            return self.queries[layers].expand(-1, len(requests[part]), -1, -1, -1)

        compact_requests(self.buffers, requests, read_queries, RKV(**SETTINGS), WINDOW)


def quadratic_scores(
    queries: Tensor, keys: Tensor, *, mix_lambda: float, kernel_size: int, similarity_threshold: float
) -> Tensor:
    """The R-KV score of one layer with the full matrices of all heads at once, as it is usually written in torch.

    Arguments and result as ``rkv_sglang.algorithm.scoring.rkv_scores``.
    """
    num_tokens, num_kv_heads, head_dim = keys.shape
    window = queries.shape[0]
    head_keys = keys.float().transpose(0, 1)
    unit = head_keys / (head_keys.norm(dim=-1, keepdim=True) + NORM_EPS)
    similarity = unit @ unit.transpose(1, 2)
    similarity.diagonal(dim1=1, dim2=2).zero_()
    positions = torch.arange(num_tokens, device=keys.device, dtype=torch.float32)
    most_recent = ((similarity > similarity_threshold) * positions).amax(dim=2, keepdim=True).long()
    similarity.scatter_(2, most_recent, 0.0)
    redundant = similarity.mean(dim=1).softmax(dim=-1)
    grouped = queries.float().transpose(0, 1).reshape(num_kv_heads, -1, head_dim)
    logits = grouped @ head_keys[:, : num_tokens - window].transpose(1, 2) / math.sqrt(head_dim)
    attention = logits.view(num_kv_heads, -1, window, num_tokens - window).amax(dim=1).softmax(dim=-1).mean(dim=1)
    important = max_pool1d(attention, kernel_size, stride=1, padding=kernel_size // 2)
    return mix_lambda * important - (1.0 - mix_lambda) * redundant[:, : num_tokens - window]


def plot(folder: Path) -> Path:
    """Draw ``kernels.png`` from ``kernels.csv``: times over their bounds, and the speed-up over the quadratic form.

    Of the bounds what is shipped, with the fewest and the most requests due; variants stand in the CSV.
    """
    pyplot = load_pyplot()
    rows = [Row(**row) for row in read_table(folder, KERNELS)]  # type: ignore[arg-type]
    figure, (bounds, speed_ups) = pyplot.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    bounded = [row for row in rows if row.bound_ms and row.op in ("score", "select", "move")]
    lines = {(row.op, row.keys, row.num_requests) for row in bounded}
    counts = {(op, keys): [due for *which, due in lines if which == [op, keys]] for op, keys, _ in lines}
    for op, keys, due in sorted(line for line in lines if line[2] in (min(counts[line[:2]]), max(counts[line[:2]]))):
        line = [row for row in bounded if (row.op, row.keys, row.num_requests) == (op, keys, due)]
        style = "--" if keys == "random" else "-"
        xs, ys = [row.num_tokens for row in line], [row.over_bound for row in line]
        bounds.plot(xs, ys, style, marker=".", label=f"{op}, {keys}, {due} due")
    bounds.set_ylabel("time over the time that its bytes take")
    for keys in dict.fromkeys(row.keys for row in rows if row.op == "quadratic"):
        pairs = [
            (slow.num_tokens, slow.p50_ms / fast.p50_ms)
            for slow in rows
            for fast in rows
            if (slow.op, slow.keys, fast.op) == ("quadratic", keys, "score")
            and (fast.keys, fast.num_tokens, fast.num_requests) == (slow.keys, slow.num_tokens, slow.num_requests)
        ]
        speed_ups.plot(*zip(*pairs, strict=True), marker=".", label=f"{keys} keys, one request")
    speed_ups.set_ylabel("times as fast as the quadratic form")
    for axes in (bounds, speed_ups):
        axes.set_xlabel("resident tokens")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=5, ncols=2)
    path = folder / "kernels.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
