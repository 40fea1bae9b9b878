"""How much a request of the pool machine may come to hold."""

from collections.abc import Iterable
from typing import Any

from rkv_sglang.config import PolicyConfig
from rkv_sglang.integration.runtime.restore import host_copy_of
from rkv_sglang.sizes.pages import ceil_to_page
from tests.fuzz.pool.held import Held
from tests.fuzz.pool.pools import Pools


class Room:
    """Room in the pool, as what admits requests has to count it."""

    def __init__(self, pools: Pools, config: PolicyConfig) -> None:
        self._pools, self._config = pools, config

    def has(self, tokens: int, running: Iterable[Held]) -> bool:
        """Return whether so many tokens fit beside what those that run hold, and may still need."""
        return self._pools.free() - self._reserved(running) >= ceil_to_page(tokens, self._pools.page_size)

    def _reserved(self, running: Iterable[Held]) -> int:
        total, page_size = 0, self._pools.page_size
        for held in running:
            # One that was computed again holds its whole history until its next compaction.
            most = max(self.most_held(held.req), held.req.kv.kv_allocated_len + self._config.window + 1)
            total += ceil_to_page(most + 1, page_size) - ceil_to_page(held.req.kv.kv_allocated_len, page_size)
        return total

    def most_held(self, req: Any) -> int:
        """Return the tokens that are kept for a request, the prompt's and as many more as there is a query row for."""
        runtime = self._pools.runtime
        config = runtime.config_of(req)
        assert config is not None
        capacity = max(config.capacity, self._config.capacity) if runtime.may_compact(req) else config.capacity
        # Alone in the pool it needs no more than that has: there is always one row.
        prompt_len, most = len(req.origin_input_ids), self.pool_size(req) - 1
        if 0 < config.prompt_budget < prompt_len and host_copy_of(req) is None:
            # For a moment it has what stays of its prompt twice.
            capacity += config.prompt_budget + config.window + self._pools.page_size
        return max(min(prompt_len + capacity, most), prompt_len + config.capacity)

    def pool_size(self, req: Any) -> int:
        """Return what the pool has for it and others, without what named prefixes hold."""
        return self._pools.runtime.parts.pool_size_for(req)

    def until_compacted(self, req: Any) -> int:
        """Return the tokens that a request that comes back may generate before it is compacted."""
        config = self._pools.runtime.config_of(req)
        assert config is not None
        return max(config.window, config.capacity - len(req.output_ids))
