"""Scores of a whole batch, straight from the paged pool."""
