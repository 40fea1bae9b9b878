"""Patches for SGLang: the series that makes hooks unnecessary, and how it is applied to a tree and taken back."""
