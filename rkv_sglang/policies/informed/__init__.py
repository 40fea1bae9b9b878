"""Policies that are told more than the keys, values and queries of the moment: a memory, a budget, statistics."""
