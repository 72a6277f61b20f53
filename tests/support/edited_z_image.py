"""Edits of tiny Z-Image pipelines, by the package and written out densely."""

from fpe_pipeline import editing
from tests.support.edited_transformers import Model
from tests.support.tiny_z_image import (
    CONVERSATION,
    MULTIPLE,
    dense_z_image,
    draw_z_image,
    tiny_z_image_that_reads,
)

__all__ = ["EXACT", "MODEL", "QUERIES_KEYS", "densely", "drawn", "farthest", "taking"]

EXACT = 1e-8


class ZImage(Model):
    """Rows that see their prompts come first in a call that holds both halves."""

    def roles(self, row, rows, calls, prompts):
        source = row // prompts * prompts
        return source, row - source, source == 0

    def dense(self, pipe, rule, layers, fault):
        return dense_z_image(pipe, rule, fault=fault)

    def template(self, pipe):
        return *CONVERSATION.split("{}"), 0

    def texts(self, longest):
        return longest + -longest % MULTIPLE


MODEL = ZImage(lambda pipe: tiny_z_image_that_reads(), draw_z_image, family="z_image")


def farthest(one, other):
    """The largest difference."""
    return float((one - other).abs().max())


def taking(*names):
    """Each target's tokens of these names are its source's."""
    return lambda source: [(1.0, dict.fromkeys(names, source))]


QUERIES_KEYS = taking("q_image", "k_image")


def drawn(pipe, edit, **options):
    """Latents of captions by the package, and its report."""
    with editing(pipe, edit, images_per_prompt=1) as session:
        out = draw_z_image(pipe, **options)
    return out, session.report()


def densely(pipe, rule, steps, *, both=False, prompts=2, turns=True, after=None, **options):
    """The same by dense layers: rows of the first half see their prompts, those of a second do not.

    At other steps targets follow the rule ``after``, where there is one.
    """

    def followed(row, rows):
        source = row // prompts * prompts
        chosen = rule if state["step"] in steps else after
        return chosen(source) if chosen is not None and (both or not source) and row != source else None

    with dense_z_image(pipe, followed, turns=turns) as state:
        return draw_z_image(pipe, prompts, **options)
