"""Recordings on models whose texts are masked or end where they end, for edits that take image tokens alone."""

import pytest
from PIL import Image

from fpe_pipeline import (
    ConsistEdit,
    FreePromptEdit,
    KVEdit,
    MasaCtrlEdit,
    Recording,
)
from fpe_pipeline.errors import Lacking
from fpe_pipeline.recordings.keys import Part
from tests.support.flow_pipelines import StandIn, distance, solving
from tests.support.slow_cases import few
from tests.support.texts_that_end import CASES, EXACT, FAMILIES, GUIDED, UNGUIDED, made, run
from tests.support.tiny_z_image import wide_z_image

# Of other lengths, also once Z-Image has filled them up.
SOURCE = "a photo of a red car on a mountain, of a big house beside it, and of a dog on a street"
TARGETS = ["a big dog", "a photo of a big dog on a house in winter"]
WHITE = Image.new("L", (80, 48), 255)
EDITS = {
    "image maps": FreePromptEdit(0.5),
    "both halves": FreePromptEdit((0.25, 1.0), both_halves=True),
    "softly": FreePromptEdit(0.5, strength=0.4),
    "keys and values": MasaCtrlEdit(1, layers=range(1, 3)),
    "consistedit": ConsistEdit(0.5, layers=range(1, 3)),
    "kv-edit": KVEdit(mask=Image.linear_gradient("L").resize((80, 48)).point(lambda level: 255 * (level > 127))),
}


@pytest.fixture(autouse=True)
def _wide():
    with wide_z_image():
        yield


@pytest.fixture(scope="module")
def pipes(pipe):
    return {family: made(family, pipe) for family in FAMILIES}


def edited(tiny, recording, edit=None):
    return tiny.edit(recording, TARGETS, edit=edit, output_type="latent")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("edit", few(EDITS, "both halves", "kv-edit"))
@pytest.mark.parametrize("guided", few({"guided": True, "unguided": False}, "guided"))
def test_edits_are_those_of_full_runs(pipes, family, edit, guided, tmp_path):
    tiny, options = pipes[family], (GUIDED if guided else UNGUIDED)[family]
    full = tiny(SOURCE, TARGETS, edit=edit, output_type="latent", **run(**options))
    recording = tiny.record(SOURCE, edit=edit, placement=tmp_path / "kept", **run(**options))
    replayed = edited(tiny, Recording.load(tmp_path / "kept"), edit)
    assert distance(replayed.images, full.images[1:]) <= EXACT[family]
    assert replayed.prompts == (SOURCE, *TARGETS)  # Z-Image's pipeline writes into the list that it is given
    assert distance(recording.latents[-1], full.images[:1]) <= EXACT[family]
    alone = tiny(TARGETS[0], output_type="latent", **run(**options)).source
    assert distance(replayed.images[:1], alone) > 1e-4  # and the edit does something
    assert set(replayed.report.replayed) == set(recording.contents)
    assert {part.name.split("-")[0] for parts in recording.contents.values() for part in parts} == {"image"}


@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("solver", few(["rf-solver", "fireflow"], "fireflow"))
def test_guidance_by_solvers_that_call_the_model_within_a_step(pipes, family, solver):
    """Each of their calls has a guided twin, told apart where a pipeline names neither (Chroma, Lumina 2)."""
    tiny, options, edit = solving(pipes[family], solver), GUIDED[family], EDITS["both halves"]
    full = tiny(SOURCE, TARGETS, edit=edit, output_type="latent", **run(**options))
    alone = StandIn(tiny)(SOURCE, output_type="latent", **run(**options)).images
    replayed = edited(tiny, tiny.record(SOURCE, edit=edit, **run(**options)), edit)
    solving(tiny, "euler")
    assert distance(full.images[:1], alone) <= EXACT[family]
    assert distance(replayed.images, full.images[1:]) <= EXACT[family]


@pytest.mark.parametrize("family", CASES)
def test_what_is_kept(pipes, family):
    """Queries and keys of image tokens, of the step that is replaced; guidance is by a call of its own."""
    tiny = pipes[family]
    recording = tiny.record(SOURCE, self_replace_steps=1 / 3, **run(**GUIDED[family]))
    kept = {Part(True, "image-query"): (0,), Part(True, "image-key"): (0,)}
    assert all(dict(parts) == kept for parts in recording.contents.values())
    both = tiny.record(SOURCE, edit=FreePromptEdit(1 / 3, both_halves=True), **run(**GUIDED[family]))
    latents = recording.latents.nbytes
    assert both.nbytes - latents == 2 * (recording.nbytes - latents)
    with pytest.raises(ValueError, match=f"more than budget_bytes={recording.nbytes - 1} "):  # counted beforehand
        tiny.record(SOURCE, self_replace_steps=1 / 3, budget_bytes=recording.nbytes - 1, **run(**GUIDED[family]))
    tiny.record(SOURCE, self_replace_steps=1 / 3, budget_bytes=recording.nbytes, **run(**GUIDED[family]))


@pytest.mark.slow
@pytest.mark.parametrize("family", few(FAMILIES, "Qwen-Image"))
def test_half_precision_says_what_it_costs(pipes, family):
    tiny = pipes[family]
    exact, half = (
        tiny.record(SOURCE, self_replace_steps=1.0, precision=precision, **run(**GUIDED[family]))
        for precision in ("exact", "half")
    )
    assert exact.error == 0 < half.error < 1e-2
    latents = exact.latents.nbytes
    assert half.nbytes - latents == (exact.nbytes - latents) // 4  # of the tests' float64
    apart = distance(edited(tiny, half).images, edited(tiny, exact).images)
    assert 0 < apart < 0.1


class TestRefusals:
    @pytest.mark.parametrize("family", CASES)
    def test_more_than_was_recorded(self, pipes, family):
        tiny = pipes[family]
        recording = tiny.record(SOURCE, self_replace_steps=1 / 3, **run(**UNGUIDED[family]))
        with pytest.raises(Lacking, match="image-query"):
            edited(tiny, recording, FreePromptEdit(1.0))
        with pytest.raises(ValueError, match="is the recording's, of both halves"):
            tiny.edit(recording, TARGETS, guidance_scale=4.0)

    def test_guidance_that_does_nothing(self, pipes):
        qwen = pipes["Qwen-Image"]
        with pytest.raises(ValueError, match=r"on QwenImagePipeline a negative prompt guides together .*=3: pass both"):
            qwen.record(SOURCE, **run(true_cfg_scale=3.0))
        with pytest.raises(ValueError, match="'a drawing' and true_cfg_scale=1: pass both"):
            qwen.record(SOURCE, **run(negative_prompt="a drawing", true_cfg_scale=1.0))
        with pytest.raises(TypeError, match="guidance_scale"):
            qwen.record(SOURCE, **run(guidance_scale=3.0))
