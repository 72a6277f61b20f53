"""Recordings on transformers that serve edits of words: these are placed among the tokens that the source had."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from fpe_pipeline import (
    FreePromptEdit,
    JointProduct,
    LocalBlend,
    PromptToPromptEdit,
    Recording,
    ReFlexEdit,
    WordMask,
)
from fpe_pipeline.edits.joint_attention import JointAttentionEdit
from fpe_pipeline.errors import Lacking
from fpe_pipeline.recordings.keys import Part
from tests.support.flow_pipelines import EXACT, FAMILIES, FAST, MADE, SIZE, STEPS, distance, edited_with, noise, solving
from tests.support.slow_cases import few

RUN = {"num_inference_steps": STEPS, "max_sequence_length": 12, **SIZE}
SOURCE = "a photo of a red car"
BLUE, GREEN = "a photo of a blue car", "a photo of a greenish car"  # of other numbers of tokens
LONGER = "a photo of a big red car on the beach"


def replaced(tokenizer, targets):
    return PromptToPromptEdit([SOURCE, *targets], tokenizer, cross_replace_steps=0.8, self_replace_steps=0.5)


def refined(tokenizer, targets):
    return PromptToPromptEdit([SOURCE, *targets], tokenizer, "refine", self_replace_steps=0.25)


def weighed(tokenizer, targets):
    weights, steps = {"car": 3.0, "photo": -0.5}, {"default_": 0.5, "car": (0.25, 1.0)}
    return PromptToPromptEdit([SOURCE, *targets], tokenizer, "refine", steps, 0, weights)


def whole_blocks(tokenizer, targets):
    return ReFlexEdit([SOURCE, *targets], tokenizer, text_steps=3, image_steps=2, layers=range(1, 3))


def beside_another(tokenizer, targets):
    words = PromptToPromptEdit([SOURCE, *targets], tokenizer, "refine", self_replace_steps=0, cross_replace_steps=0.5)
    return FreePromptEdit((0.5, 1.0), layers=range(1, 3)) + words


def blended(tokenizer, targets):
    """What both keep is where the heat of their cars is, which is read of the source's recorded map."""
    words = ["car"] * (1 + len(targets))
    return replaced(tokenizer, targets) + LocalBlend([SOURCE, *targets], tokenizer, words, 0.5, start=0.25)


def where_the_car_is(tokenizer, targets):
    return FreePromptEdit(1.0, mask=WordMask(SOURCE, "car", tokenizer, threshold=0.5))


def softly_where_no_car_is(tokenizer, targets):
    return FreePromptEdit(1.0, mask=WordMask(SOURCE, "car", tokenizer, invert=True), strength=0.8)


@dataclasses.dataclass(frozen=True)
class ReadsMoreOncePlaced(JointAttentionEdit):
    """The source's image keys, and its image values as well once it was shown what the pipeline encodes."""

    is_placed: bool = False

    def written_for(self):
        return (SOURCE,)

    def encoded(self, encoding):
        return dataclasses.replace(self, is_placed=True)

    def products(self, site, step, roles):
        return {t: JointProduct((t, t), (s, t), (s if self.is_placed else t, t)) for s, t in roles.pairs()}


EDITS = {
    "replace": (replaced, [BLUE, GREEN]),
    "refine": (refined, [LONGER, BLUE]),
    "re-weight": (weighed, [SOURCE, LONGER]),
    "reflex": (whole_blocks, [LONGER, BLUE]),
    "beside another": (beside_another, [LONGER]),
    "blended": (blended, [BLUE, GREEN]),
    "where the car is": (where_the_car_is, [LONGER, "a photo of a house"]),
    "softly where no car is": (softly_where_no_car_is, [BLUE]),
}


@pytest.fixture(scope="module")
def pipes(pipe):
    return {family: solving(edited_with(MADE[family](pipe)), "euler") for family in FAMILIES}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def tiny(pipes, family):
    return solving(pipes[family], "euler")


def options_of(family, **options):
    return {**RUN, "guidance_scale": 3.0, "latents": noise(family), **options}


def edited(tiny, recording, edit, targets):
    return tiny.edit(recording, targets, edit=edit, output_type="latent").images


@pytest.mark.parametrize("case", few(EDITS, "refine", "reflex", "blended", "where the car is"))
def test_edits_are_those_of_full_runs(tiny, family, case, tmp_path):
    """Also when the recording was written and read again, and was made before the targets were known."""
    make, targets = case
    edit, options = make(tiny.tokenizer, targets), options_of(family)
    full = tiny(SOURCE, targets, edit=edit, output_type="latent", **options).images
    unknown = make(tiny.tokenizer, [SOURCE])
    recording = tiny.record(SOURCE, edit=unknown, placement=tmp_path / "kept", **options)
    assert distance(edited(tiny, recording, edit, targets), full[1:]) <= EXACT[family]
    assert distance(edited(tiny, Path(tmp_path / "kept"), edit, targets), full[1:]) <= EXACT[family]
    for index, target in enumerate(targets):  # and the edit does something
        alone = tiny(target, latents=noise(family), guidance_scale=3.0, **FAST, **SIZE).source
        assert distance(full[1 + index : 2 + index], alone) > 1e-4
    one = make(tiny.tokenizer, targets[:1])
    assert distance(edited(tiny, recording, one, targets[0]), full[1:2]) <= EXACT[family]


def test_guidance_by_a_negative_prompt(tiny, family):
    """The text encoders are called for negative prompts too; of FLUX.1 by a call of their own."""
    scales = {"guidance_scale": 3.0} if family == "sd3" else {"true_cfg_scale": 3.0}
    edit, options = refined(tiny.tokenizer, [LONGER]), options_of(family, negative_prompt="a drawing", **scales)
    full = tiny(SOURCE, [LONGER], edit=edit, output_type="latent", **options).images
    replayed = edited(tiny, tiny.record(SOURCE, edit=edit, **options), edit, [LONGER])
    assert distance(replayed, full[1:]) <= EXACT[family]
    unguided = options_of(family, guidance_scale=1.0)
    full = tiny(SOURCE, [LONGER], edit=edit, output_type="latent", **unguided).images
    replayed = edited(tiny, tiny.record(SOURCE, edit=edit, **unguided), edit, [LONGER])
    assert distance(replayed, full[1:]) <= EXACT[family]


def test_inverted_sources(pipes, family):
    tiny = solving(pipes[family], "fireflow")
    photo = np.random.default_rng(3).random((48, 80, 3))
    options = {"inversion": tiny.invert(photo, SOURCE, **RUN), "max_sequence_length": 12, "guidance_scale": 3.0}
    edit = refined(tiny.tokenizer, [LONGER])
    full = tiny(target_prompt=[LONGER], edit=edit, output_type="latent", **options).images
    replayed = edited(tiny, tiny.record(edit=edit, **options), edit, [LONGER])
    assert distance(replayed, full[1:]) <= EXACT[family]


def test_what_is_kept(tiny, family, tmp_path):
    """Image queries and keys and text keys of the steps, and the tokens of the source, of each text encoder."""
    edit = replaced(tiny.tokenizer, [BLUE])
    recording = tiny.record(SOURCE, edit=edit, placement=tmp_path / "kept", **options_of(family))
    names = {part for parts in recording.contents.values() for part in parts}
    assert names == {Part(True, name) for name in ("image-query", "image-key", "text-key")}
    loaded = Recording.load(tmp_path / "kept").source_text
    # Of Stable Diffusion 3 CLIP's two and T5, each of the prompt and of the negative one; of FLUX.1 T5.
    assert len(loaded) == {"sd3": 6, "flux": 1}[family]
    assert all(torch.equal(tokens, recording.source_text[name]) for name, tokens in loaded.items())
    assert all(tokens.shape[0] == 1 and not tokens.is_floating_point() for tokens in loaded.values())


def test_masks_are_where_the_sources_word_is(tiny, family):
    """Nowhere is one of them all white or all black, of which the equality of runs would say nothing."""
    options, targets = options_of(family), [LONGER]
    recording = tiny.record(SOURCE, edit=where_the_car_is(tiny.tokenizer, targets), **options)
    masks = {
        word: FreePromptEdit(1.0, mask=WordMask(SOURCE, word, tiny.tokenizer, threshold=0.5))
        for word in ("car", "photo")
    }
    pictures = [edited(tiny, recording, edit, targets) for edit in (*masks.values(), FreePromptEdit(1.0))]
    pictures.append(tiny(LONGER, latents=noise(family), guidance_scale=3.0, **FAST, **SIZE).source)
    apart = [distance(one, other) for index, one in enumerate(pictures) for other in pictures[:index]]
    assert min(apart) > 1e-4


def test_heat_is_a_product_of_what_maps_are_made_of(tiny, family):
    """Image queries and keys and text keys of every step, and no values, of layers that no edit changes too."""
    blend = LocalBlend([SOURCE, BLUE], tiny.tokenizer, ["car", "car"])
    recording = tiny.record(SOURCE, edit=FreePromptEdit(0.25, layers=[1]) + blend, **options_of(family))
    assert len(recording.contents) == len(tiny.transformer.attn_processors)
    kept = {part: steps for parts in recording.contents.values() for part, steps in parts.items()}
    assert kept == {Part(True, name): (0, 1, 2, 3) for name in ("image-query", "image-key", "text-key")}


def test_bytes_are_counted_beforehand(tiny, family):
    edit, options = replaced(tiny.tokenizer, [BLUE]), options_of(family)
    needed = tiny.record(SOURCE, edit=edit, **options).nbytes
    with pytest.raises(ValueError, match=f"more than budget_bytes={needed - 1} "):
        tiny.record(SOURCE, edit=edit, budget_bytes=needed - 1, **options)
    assert tiny.record(SOURCE, edit=edit, budget_bytes=needed, **options).nbytes == needed


def test_half_precision(tiny, family):
    edit, options = refined(tiny.tokenizer, [LONGER]), options_of(family)
    full = tiny(SOURCE, [LONGER], edit=edit, output_type="latent", **options).images
    half = tiny.record(SOURCE, edit=edit, precision="half", **options)
    assert 1e-6 < half.error < 1e-2
    assert EXACT[family] < distance(edited(tiny, half, edit, [LONGER]), full[1:]) < 1e-2


def test_words_are_placed_by_the_sources_tokens(tiny, family, monkeypatch):
    """Tokens of another prompt are seen, and so are texts of another length; before anything is denoised."""
    edit, options = refined(tiny.tokenizer, [LONGER]), options_of(family)
    recording = tiny.record(SOURCE, edit=edit, **options)
    other = tiny.record("two dogs", edit=FreePromptEdit(0.5), **options)
    monkeypatch.setattr(tiny.transformer, "forward", lambda *args, **kwargs: pytest.fail("it ran"))
    swapped = dataclasses.replace(recording, source_text=other.source_text)
    with pytest.raises(ValueError, match=f"encodes other tokens than those of the prompt '{SOURCE}'"):
        edited(tiny, swapped, edit, [LONGER])
    shorter = {name: tokens[:, :-1] for name, tokens in recording.source_text.items()}
    with pytest.raises(ValueError, match="encodes texts otherwise than when the source was recorded"):
        edited(tiny, dataclasses.replace(recording, source_text=shorter), edit, [LONGER])


def test_a_recording_of_an_earlier_version(tiny, family, tmp_path, monkeypatch):
    """It serves what places no word, as it did."""
    edit, layout = replaced(tiny.tokenizer, [BLUE]), PromptToPromptEdit([SOURCE, BLUE], tiny.tokenizer, "replace", 0)
    recording = tiny.record(SOURCE, edit=edit, **options_of(family))
    without_text = tiny.record(SOURCE, edit=FreePromptEdit(1.0), **options_of(family))
    with monkeypatch.context() as before:
        before.setattr("fpe_pipeline.recordings.folder_store.FORMAT", 5)
        before.setattr("fpe_pipeline.recordings.capture.source_text", lambda encoding: {})
        tiny.record(SOURCE, edit=edit, placement=tmp_path / "earlier", **options_of(family))
    earlier = Recording.load(tmp_path / "earlier")
    assert earlier.source_text == {} and recording.source_text
    assert torch.equal(edited(tiny, earlier, layout, [BLUE]), edited(tiny, recording, layout, [BLUE]))
    monkeypatch.setattr(tiny.transformer, "forward", lambda *args, **kwargs: pytest.fail("it ran"))
    for looking in (edit, where_the_car_is(tiny.tokenizer, [BLUE]), blended(tiny.tokenizer, [BLUE])):
        with pytest.raises(Lacking, match=r"Edit.* looks for words .* does not hold .*\. Record it again"):
            edited(tiny, earlier, looking, [BLUE])
    with pytest.raises(Lacking, match="lacks what PromptToPromptEdit needs of the source: conditional text-key of"):
        edited(tiny, without_text, edit, [BLUE])


def test_an_edit_that_reads_more_once_its_words_are_placed(tiny, family, monkeypatch):
    """What is missing is found when the targets are encoded, and what was recorded for the placed edit is enough."""
    edit, options = ReadsMoreOncePlaced(), options_of(family)
    recording = tiny.record(SOURCE, edit=edit, **options)
    full = tiny(SOURCE, [BLUE], edit=edit, output_type="latent", **options).images
    enough = tiny.record(SOURCE, edit=ReadsMoreOncePlaced(is_placed=True), **options)
    assert distance(edited(tiny, enough, edit, [BLUE]), full[1:]) <= EXACT[family]
    monkeypatch.setattr(tiny.transformer, "forward", lambda *args, **kwargs: pytest.fail("it ran"))
    with pytest.raises(Lacking, match="lacks what ReadsMoreOncePlaced needs of the source: conditional image-value"):
        edited(tiny, recording, edit, [BLUE])


def test_other_prompts_than_those_of_the_recording(tiny, family):
    recording = tiny.record(SOURCE, edit=replaced(tiny.tokenizer, [BLUE]), **options_of(family))
    with pytest.raises(ValueError, match="is written for the prompts"):
        edited(tiny, recording, replaced(tiny.tokenizer, [BLUE]), [GREEN])
