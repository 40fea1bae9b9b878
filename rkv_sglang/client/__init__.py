"""HTTP to a running server: requests whose failures are one line, and the named prefixes that it holds."""

__all__: list[str] = []
