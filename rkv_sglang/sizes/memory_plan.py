"""Requests that fit into a KV pool, with and without a policy: arithmetic on a model's shape."""

from dataclasses import dataclass

from rkv_sglang.config import PolicyConfig
from rkv_sglang.sizes.lengths import RequestState
from rkv_sglang.sizes.pages import ceil_to_page
from rkv_sglang.sizes.query_rows import query_bytes_per_slot
from rkv_sglang.sizes.reservation import prompt_budget_after, tokens_to_reserve


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Shape of a model on one rank: it decides the bytes of a token's KV.

    Attributes:
        num_layers: Attention layers.
        num_qo_heads: Query heads of this rank.
        num_kv_heads: KV heads of this rank.
        head_dim: Of queries and keys.
        v_head_dim: Of values.
        kv_itemsize: Bytes of a cached number.
        query_itemsize: Bytes of a query's number: the model's dtype.
    """

    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    kv_itemsize: int
    query_itemsize: int

    @property
    def kv_bytes(self) -> int:
        """Bytes of one token's K and V in all layers."""
        return self.num_layers * self.num_kv_heads * (self.head_dim + self.v_head_dim) * self.kv_itemsize

    @property
    def statistics_bytes(self) -> int:
        """Bytes of statistics of the model's queries, and of as many that a compaction makes of them: fp32.

        Three numbers for each pair of a query, in each layer.
        """
        return 2 * self.num_layers * self.num_qo_heads * (self.head_dim // 2) * 3 * 4

    def side_bytes(
        self,
        config: PolicyConfig,
        *,
        stateful: bool = False,
        memory_numbers: int = 0,
        observed_numbers: int = 0,
        prompt_hits: bool = False,
    ) -> float:
        """Bytes of the policy's own per token of the pool: the query window, and what requests carry for it.

        A stateful policy has them carry one fp32 number a kept token, layer and KV head, one that remembers
        ``memory_numbers`` of the type of queries a layer and KV head, one that observes ``observed_numbers`` int64
        numbers in all; as many requests as the pool holds at their capacity. What long prompts find within themselves
        is one int32 number of the same, as if all tokens of the pool were of such prompts.
        """
        carried = 4 * (config.budget - config.window) if stateful else 0
        carried += memory_numbers * self.query_itemsize
        queries = query_bytes_per_slot(config, self.num_layers, self.num_qo_heads, self.head_dim, self.query_itemsize)
        carried += 4 * config.capacity if prompt_hits else 0
        carried *= self.num_layers * self.num_kv_heads
        return queries + (carried + 8 * observed_numbers) / config.capacity


def pool_tokens(
    shape: ModelShape,
    num_bytes: int,
    config: PolicyConfig | None,
    page_size: int = 1,
    *,
    looks_at_nothing: bool = False,
) -> int:
    """Return how many tokens the pool holds when it shares ``num_bytes`` with the side buffers of the policy rkv.

    A policy that looks at no queries, keys or values has none.
    """
    side_bytes = 0.0 if config is None or looks_at_nothing else shape.side_bytes(config, prompt_hits=True)
    per_token = shape.kv_bytes + side_bytes
    return int(num_bytes / per_token) // page_size * page_size


def requests_at_once(
    pool_size: int, *, prompt_len: int, output_len: int, page_size: int = 1, config: PolicyConfig | None = None
) -> int:
    """Return how many equal requests, none sharing a prefix, the pool of ``pool_size`` tokens holds to their end.

    Without ``config`` every token stays; with it, at most the prompt, or what stays of it, and ``config.capacity``
    tokens.
    """
    growth = output_len if config is None else min(output_len, config.capacity)
    kept = 0
    if config is not None:
        kept = prompt_budget_after(config, RequestState(prompt_len, output_len), prompt_len, pool_size, page_size)
    if config is not None and kept > 0:
        more = tokens_to_reserve(
            config,
            output_len=0,
            max_new_tokens=output_len,
            prompt_len=prompt_len,
            prompt_budget=kept,
            page_size=page_size,
        )
        # The last one to come needs its whole prompt and what stays of it beside the others, which have let go of it.
        return 1 + (pool_size - ceil_to_page(prompt_len + more, page_size)) // ceil_to_page(kept + growth, page_size)
    each = ceil_to_page(prompt_len + growth, page_size)
    count = pool_size // each
    if config is None:
        # PrefillAdder.add_one_req counts a page more (per_req_token_overhead) for the request that it admits, and wants
        # something to be left.
        while count > 0 and pool_size - (count - 1) * each <= prompt_len + growth + page_size:
            count -= 1
    return count
