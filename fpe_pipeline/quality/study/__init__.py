"""Edits of held-out scenes, where the right answer is known."""
