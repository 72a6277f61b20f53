"""Refusals name what the page has: fields, and no options of the command."""

import html

import pytest

from fpe_pipeline.studio.labels import LABELS, in_fields
from tests.pipeline.studio.conftest import last


@pytest.mark.parametrize(
    "told, said",
    [
        ("target prompts with words in them; pass --target", "with words in them; fill in “Targets”"),
        (
            "which --guidance 1 switches off; pass a larger one, or --inversion direct",
            "“Guidance” 1 switches off; pass a larger one, or set “How the source is held to the photo” to direct",
        ),
        (
            "leave --negative out, or pass --inversion direct",
            "leave “Negative prompt” empty, or set “How the source is held to the photo” to direct",
        ),
        ("all of whose layers are of one size; choose with --layers", "are of one size; choose with “Layers”"),
        ("pass layers=, indices or paths, of those that carry", "choose “Layers” of those that carry"),
        ("choose some with levels=, max_tokens= or layers=\nself 0: down_blocks.0", "choose some with “Layers”"),
        ("in two lines\nwithout layers", "in two lines\nwithout layers"),
        ("cannot be used here; leave --backend out", "cannot be used here; leave --backend out"),
        ("repeat these settings by fpe edit --from", "repeat these settings by fpe edit --from"),
        ("", ""),
    ],
)
def test_options_are_fields(told, said):
    assert said in in_fields(told) and in_fields(told).count("\n") == said.count("\n")


def test_what_is_missing_is_named_as_the_page_calls_it(desk, visitor, values, photo):
    desk.receive_photo(visitor, photo)
    for field, value in (("targets", " "), ("guidance", 1.0), ("negative", "x")):
        said = html.unescape(last(desk.invert(visitor, "null-text", *values(**{field: value}))).status)
        assert "--" not in said and f"“{LABELS[field].partition(',')[0]}”" in said, said
