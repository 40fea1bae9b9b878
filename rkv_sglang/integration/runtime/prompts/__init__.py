"""Compaction of one request's prompt into slots of its own: whether, when, and how."""
