"""Edits at work in a model: for the length of a `with` block, step by step, layer by layer."""
