"""Values of the source under the target's own maps: against a dense processor in float64, on both families."""

import pytest
import torch

from fpe_pipeline import ValueInjectionEdit, editing
from fpe_pipeline.models.adapters.families import adapter_of
from tests.support.dense_joint import dense
from tests.support.flow_pipelines import EXACT, FAMILIES, MADE, SOURCE, TARGET, edited_with, solving
from tests.support.tiny_pipelines import tiny_pipeline
from tests.support.tiny_transformers import draw, draw_flux, tiny_flux

RUNS = {"sd3": draw, "flux": draw_flux}
LATE = ["transformer_blocks.1", "transformer_blocks.2"]
LAYERS = {"sd3": LATE, "flux": ["single_transformer_blocks"]}
PATHS = {"sd3": "transformer_blocks.", "flux": "single_transformer_blocks"}


@pytest.fixture(scope="module")
def pipes(pipe):
    return {family: MADE[family](pipe) for family in FAMILIES}


def source_of(row, rows, family):
    half = rows // 2 if family == "sd3" else rows
    return row // half * half


def values(family):
    def rule(row, rows):
        source = source_of(row, rows, family)
        return [(1.0, {"v_image": source, "v_text": source})] if row != source else None

    return rule


def wrong(parts):
    def made(family):
        def rule(row, rows):
            source = source_of(row, rows, family)
            return [(1.0, dict.fromkeys(parts, source))] if row != source else None

        return rule

    return made


def reference(tiny, family, rule, steps, layers, **options):
    with dense(tiny, rule, steps=steps, layers=layers):
        return RUNS[family](tiny, **options)


@pytest.mark.parametrize("options", [{}, {"prompts": 4}, {"size": (6, 12)}], ids=["1 target", "3", "not square"])
@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_the_papers(pipes, family, options):
    """In FLUX, whose late layers have one stream; in Stable Diffusion 3 all."""
    tiny, layers = pipes[family], None if family == "sd3" else LAYERS[family]
    edit = ValueInjectionEdit(0.5, layers=layers or range(3))
    with editing(tiny, edit) as session:
        actual = RUNS[family](tiny, **options)
    expected = reference(tiny, family, values(family), (0, 1), PATHS[family], **options)
    assert (actual - expected).abs().max() <= EXACT[family]
    assert all(steps == [0, 1] for steps in session.report().layers.values()) and session.report().layers
    assert (actual - RUNS[family](tiny, **options))[1:].abs().max() > 1e-4


WRONG = {
    "image alone": ("v_image",),
    "text alone": ("v_text",),
    "keys too": ("k_image", "k_text", "v_image", "v_text"),
    "nothing": (),
}


@pytest.mark.parametrize("parts", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_rules_and_steps_are_told_apart(pipes, family, parts):
    tiny = pipes[family]
    with editing(tiny, ValueInjectionEdit(0.5, layers=range(3) if family == "sd3" else LAYERS[family])):
        actual = RUNS[family](tiny)
    assert (actual - reference(tiny, family, wrong(parts)(family), (0, 1), PATHS[family])).abs().max() > 1e-5
    for steps in ((0,), (1, 2), (0, 1, 2)):
        assert (actual - reference(tiny, family, values(family), steps, PATHS[family])).abs().max() > 1e-5


@pytest.mark.parametrize("solver", ["rf-solver", "fireflow"])
@pytest.mark.parametrize("family", FAMILIES)
def test_of_inverted_images_and_their_recordings(pipe, family, solver):
    """The recording keeps values alone, and its edits are those of full runs."""
    tiny = solving(edited_with(MADE[family](pipe)), solver)
    photo = torch.rand(3, 48, 80, generator=torch.Generator().manual_seed(3))
    options = {"num_inference_steps": 4, "max_sequence_length": 12, "height": 48, "width": 80}
    inversion = tiny.invert(photo, SOURCE, **options)
    edit = ValueInjectionEdit(0.5, layers=LAYERS[family])
    full = tiny(inversion=inversion, target_prompt=TARGET, edit=edit, max_sequence_length=12, output_type="latent")
    recording = tiny.record(inversion=inversion, edit=edit, max_sequence_length=12)
    replayed = tiny.edit(recording, TARGET, edit=edit, output_type="latent")
    assert (replayed.images - full.images[1:]).abs().max() <= EXACT[family]
    parts = {part.name for kept in recording.contents.values() for part in kept}
    assert parts == {"image-value", "text-value"}


def test_layers_by_default():
    sites = adapter_of(tiny_flux(num_layers=1, num_single_layers=38)).sites
    chosen = [site.path for site in ValueInjectionEdit().select(sites)]
    assert chosen == [f"single_transformer_blocks.{index}.attn" for index in range(20, 38)]


class TestRefusals:
    def test_models(self, pipe, pipes):
        for family in FAMILIES:
            with pytest.raises(ValueError, match=r"FLUX\.1's single blocks 20 to 37, and this transformer"):
                editing(pipes[family], ValueInjectionEdit())
        with pytest.raises(ValueError, match="a UNet has no such layers"):
            editing(tiny_pipeline(pipe), ValueInjectionEdit())

    def test_arguments(self, pipes):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            ValueInjectionEdit(2.0)
        with pytest.raises(ValueError, match="a transformer has one"):
            ValueInjectionEdit(levels=1).select(adapter_of(pipes["flux"]).sites)
