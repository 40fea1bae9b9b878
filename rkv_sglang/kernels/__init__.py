"""Triton kernels and their torch forms, on paged pools: capture queries, score, select, move."""
