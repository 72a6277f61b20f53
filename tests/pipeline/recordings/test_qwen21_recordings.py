"""Recordings on Qwen-Image 2.1: edits from them are those of full runs whose texts are as long, of words too."""

import diffusers
import pytest
import torch

if not hasattr(diffusers, "QwenImage21Pipeline"):
    pytest.skip("this diffusers has no Qwen-Image 2.1", allow_module_level=True)

from PIL import Image

from fpe_pipeline import (
    ConsistEdit,
    FreePromptEdit,
    FreePromptPipeline,
    KVEdit,
    LocalBlend,
    MasaCtrlEdit,
    PromptToPromptEdit,
    Recording,
    ReFlexEdit,
    WordMask,
)
from fpe_pipeline.recordings.keys import Part
from tests.support.flow_pipelines import distance, solving
from tests.support.slow_cases import few
from tests.support.tiny_qwen21 import tiny_qwen21_pipeline

pytestmark = pytest.mark.usefixtures("in_float64")
EXACT = 1e-12  # within rounding, in float64
SOURCE, TARGETS = "a photo of a red car on a mountain", ["a photo of a big car", "a red dog on a mountain"]
LONG = "a photo of a big red car on a mountain in winter"
GUIDED, UNGUIDED = {"negative_prompt": "a drawing", "true_cfg_scale": 3.0}, {}
MASK = Image.linear_gradient("L").resize((96, 64)).point(lambda level: 255 * (level > 127))
EDITS = {
    "image maps": lambda read, prompts: FreePromptEdit(0.5),
    "both halves": lambda read, prompts: FreePromptEdit((0.25, 1.0), both_halves=True),
    "keys and values": lambda read, prompts: MasaCtrlEdit(1, layers=[1, 2]),
    "consistedit": lambda read, prompts: ConsistEdit(0.5),
    "kv-edit": lambda read, prompts: KVEdit(mask=MASK),
    "words": lambda read, prompts: refined(read, prompts),
    "blended": lambda read, prompts: refined(read, prompts) + blend(read, prompts),
    "blocks of the map": lambda read, prompts: ReFlexEdit(prompts, read, text_steps=2, image_steps=2, layers=[1, 2]),
    "masks of words": lambda read, prompts: FreePromptEdit(1.0, mask=WordMask(SOURCE, "mountain", read, threshold=0.9)),
}


def refined(read, prompts):
    return PromptToPromptEdit(prompts, read, "refine", cross_replace_steps=0.7, self_replace_steps=0.4)


def blend(read, prompts):
    return LocalBlend(prompts, read, ["photo"] + ["a"] * (len(prompts) - 1), 0.9, start=0.3)


@pytest.fixture(scope="module")
def made():
    tiny = FreePromptPipeline.from_pipe(tiny_qwen21_pipeline())
    tiny.set_progress_bar_config(disable=True)
    return tiny


@pytest.fixture
def tiny(made):
    return solving(made, "euler")


def run(**options):
    given = {"num_inference_steps": 3, "height": 64, "width": 96, "generator": torch.Generator().manual_seed(2)}
    return {**given, **options}


def check(tiny, edit, targets, options, placement="device", lengths=UNGUIDED):
    """An edit made before the targets are known, of which nothing is padded in a full run unless it is told so."""
    read = tiny.processor.tokenizer
    written = edit(read, [SOURCE, *targets])
    full = tiny(SOURCE, targets, edit=written, output_type="latent", **run(**options, **lengths)).images
    before = edit(read, [SOURCE, SOURCE, SOURCE][: 1 + len(targets)])
    recording = tiny.record(SOURCE, edit=before, placement=placement, **run(**options, **lengths))
    kept = recording if placement == "device" else Recording.load(placement)
    replayed = tiny.edit(kept, targets, edit=written, output_type="latent")
    assert distance(replayed.images, full[1:]) <= EXACT
    assert distance(recording.latents[-1], full[:1]) <= EXACT
    alone = tiny(targets[0], output_type="latent", **run(**options)).source
    assert distance(replayed.images[:1], alone) > 1e-4
    assert set(replayed.report.replayed) == set(recording.contents)
    return recording


@pytest.mark.parametrize("edit", few(EDITS, "both halves", "blended"))
@pytest.mark.parametrize("options", few({"guided": GUIDED, "unguided": UNGUIDED}, "guided"))
def test_edits_are_those_of_full_runs(tiny, edit, options, tmp_path):
    check(tiny, edit, TARGETS, options, tmp_path / "kept")


@pytest.mark.parametrize("edit", few(EDITS, "words"))
def test_targets_that_are_longer(tiny, edit):
    """Their texts, and with them the place of images, are as long as the recording was told beforehand."""
    tokens = tiny.encode_prompt(LONG)[0].shape[1] + 2
    assert check(tiny, edit, [LONG], GUIDED, lengths={"max_sequence_length": tokens}).text_length == tokens


@pytest.mark.parametrize("solver", few(["rf-solver", "fireflow"], "fireflow"))
def test_of_a_real_image_by_solvers_that_call_the_model_within_a_step(tiny, solver):
    solving(tiny, solver)
    photo, edit = torch.rand(3, 64, 96, generator=torch.Generator().manual_seed(3)), KVEdit(mask=MASK)
    inversion = tiny.invert(photo, SOURCE, num_inference_steps=3, height=64, width=96)
    full = tiny(inversion=inversion, target_prompt=TARGETS, edit=edit, output_type="latent", **GUIDED).images
    recording = tiny.record(inversion=inversion, edit=edit, **GUIDED)
    assert distance(tiny.edit(recording, TARGETS, edit=edit, output_type="latent").images, full[1:]) <= 1e-9
    assert distance(full[0], inversion.latents[0, 0]) <= EXACT


def test_what_is_kept(tiny):
    """Of words the keys of the source's text, without padding; counted beforehand."""
    read, tokens = tiny.processor.tokenizer, tiny.encode_prompt(SOURCE)[0].shape[1]
    edit, options = refined(read, [SOURCE, *TARGETS]), {**GUIDED, "max_sequence_length": tokens + 3}
    recording = tiny.record(SOURCE, edit=edit, placement="cpu", **run(**options))
    assert {part for parts in recording.contents.values() for part in parts} == {
        Part(True, name) for name in ("image-query", "image-key", "text-key")
    }
    kept = recording.store.read(0, torch.device("cpu"))
    assert {tensor.shape[2] for key, tensor in kept.items() if key.part.name == "text-key"} == {tokens}
    assert recording.text_lengths["conditional"] == tokens
    with pytest.raises(ValueError, match=f"more than budget_bytes={recording.nbytes - 1} "):
        tiny.record(SOURCE, edit=edit, budget_bytes=recording.nbytes - 1, **run(**options))
    tiny.record(SOURCE, edit=edit, budget_bytes=recording.nbytes, **run(**options))


@pytest.mark.slow
def test_half_precision(tiny):
    edit = refined(tiny.processor.tokenizer, [SOURCE, *TARGETS])
    full = tiny(SOURCE, TARGETS, edit=edit, output_type="latent", **run(**GUIDED)).images
    half = tiny.record(SOURCE, edit=edit, precision="half", **run(**GUIDED))
    assert 1e-6 < half.error < 1e-2
    assert EXACT < distance(tiny.edit(half, TARGETS, edit=edit, output_type="latent").images, full[1:]) < 5e-2


class TestRefusals:
    def test_longer_targets(self, tiny, monkeypatch):
        recording = tiny.record(SOURCE, self_replace_steps=1 / 3, **run())
        monkeypatch.setattr(tiny.transformer, "forward", lambda *args, **kwargs: pytest.fail("it ran"))
        with pytest.raises(ValueError, match=f"at most {recording.text_length} tokens, .*record or invert with"):
            tiny.edit(recording, [LONG])

    def test_what_changes_texts(self, tiny, monkeypatch):
        monkeypatch.setattr(tiny.transformer, "forward", lambda *args, **kwargs: pytest.fail("it ran"))
        with pytest.raises(ValueError, match=r"changes what text tokens become.* use an edit of image tokens"):
            tiny.record(SOURCE, edit=FreePromptEdit(0.7, scope="joint"), **run())

    def test_guidance_that_does_nothing(self, tiny):
        with pytest.raises(ValueError, match=r"on QwenImage21Pipeline a negative prompt guides together"):
            tiny.record(SOURCE, **run(true_cfg_scale=3.0))
