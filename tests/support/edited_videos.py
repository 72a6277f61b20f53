"""Edits of tiny CogVideoX and HunyuanVideo pipelines, by the package and written out densely."""

from tests.support.edited_transformers import Model
from tests.support.tiny_cogvideox import dense_cogvideox, draw_cogvideox, tiny_cogvideox_pipeline
from tests.support.tiny_hunyuan_video import (
    SAID,
    TEXTS,
    dense_hunyuan_video,
    draw_hunyuan_video,
    template_of,
    tiny_hunyuan_video_pipeline,
    wide_hunyuan_video,
)

__all__ = ["COGVIDEOX", "HUNYUAN_VIDEO"]


class CogVideoX(Model):
    """All frames stand in one sequence, behind the text."""

    def dense(self, pipe, rule, layers, fault):
        return dense_cogvideox(pipe, rule, layers=layers, fault=fault)


class HunyuanVideo(Model):
    """All frames stand in one sequence, before the text."""

    def dense(self, pipe, rule, layers, fault):
        return dense_hunyuan_video(pipe, rule, layers=layers, fault=fault)

    def template(self, pipe):
        return *SAID.split("{}"), template_of(pipe)["crop_start"]

    def texts(self, longest):
        return TEXTS


def _drawn(*args, **options):
    with wide_hunyuan_video():
        return draw_hunyuan_video(*args, **options)


COGVIDEOX = CogVideoX(tiny_cogvideox_pipeline, draw_cogvideox, is_doubled=True, family="cogvideox")
HUNYUAN_VIDEO = HunyuanVideo(tiny_hunyuan_video_pipeline, _drawn, family="hunyuan_video")
