"""The R-KV algorithm in torch: as the paper words it, and vectorised."""
