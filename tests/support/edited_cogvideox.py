"""Edits of tiny CogVideoX pipelines, by the package and written out densely."""

from tests.support.edited_transformers import Model
from tests.support.tiny_cogvideox import dense_cogvideox, draw_cogvideox, tiny_cogvideox_pipeline

__all__ = ["COGVIDEOX"]


class CogVideoX(Model):
    """All frames stand in one sequence, behind the text."""

    def dense(self, pipe, rule, layers, fault):
        return dense_cogvideox(pipe, rule, layers=layers, fault=fault)


COGVIDEOX = CogVideoX(tiny_cogvideox_pipeline, draw_cogvideox, is_doubled=True, family="cogvideox")
