"""Scores by programs that each serve one head of a request from its keys to its scores."""
