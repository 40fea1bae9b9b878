"""Integers, from pages to whole pools: lengths, plans, reservations, memory. No torch, no device."""
