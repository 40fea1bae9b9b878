"""A look into the KV cache of one answer: record it from a running server, keep it as a file, show it as a page."""

__all__: list[str] = []
