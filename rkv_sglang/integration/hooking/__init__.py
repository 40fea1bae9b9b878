"""Hooks as such: the shape of a row, the check of what it names in SGLang, its application."""
