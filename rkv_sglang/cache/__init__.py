"""State between compactions: the pool's buffers, query windows, host copies, traces; and one compaction."""
