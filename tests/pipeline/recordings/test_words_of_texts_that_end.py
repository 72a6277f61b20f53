"""Recordings for edits of text tokens and words, on models whose texts end where they end or are masked there."""

import dataclasses

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
    ValueInjectionEdit,
    WordMask,
)
from fpe_pipeline.edits.joint_attention import JointAttentionEdit
from fpe_pipeline.errors import Lacking
from fpe_pipeline.recordings import padded_texts
from fpe_pipeline.recordings.keys import Part
from tests.support.flow_pipelines import distance, solving
from tests.support.slow_cases import few
from tests.support.texts_that_end import CASES, FAMILIES, GUIDED, UNGUIDED, made, run
from tests.support.tiny_z_image import wide_z_image

EXACT = 1e-12  # within rounding, in float64
SOURCE = "a photo of a red car on a mountain"
SHORT, LONG = "a red car", "a photo of a big red car on a mountain in winter"
EQUAL = "a photo of a big car on a mountain"


def refined(tokenizer, targets):
    return PromptToPromptEdit([SOURCE, *targets], tokenizer, "refine", self_replace_steps=0.4)


def weighed(tokenizer, targets):
    weights, steps = {"car": -3.0}, {"default_": 0.7, "car": (0.3, 1.0)}
    return PromptToPromptEdit([SOURCE, *targets], tokenizer, "refine", steps, 0, weights)


def blocks(tokenizer, targets):
    return ReFlexEdit([SOURCE, *targets], tokenizer, text_steps=2, image_steps=2, layers=[1])


def where_the_car_is(tokenizer, targets, source=SOURCE):
    return FreePromptEdit(1.0, mask=WordMask(source, "car", tokenizer, threshold=0.5))


@dataclasses.dataclass(frozen=True)
class LooksAtTheSource(JointAttentionEdit):
    """A target's image and text look at the source's image and text, of whatever length, and see what is there."""

    def products(self, site, step, roles):
        return {t: JointProduct((t, t), (s, s), (s, s)) for s, t in roles.pairs(conditional=None)}


@dataclasses.dataclass(frozen=True)
class AsksAsTheSource(JointAttentionEdit):
    """A target's own text is asked by the source's image and text."""

    def products(self, site, step, roles):
        return {t: JointProduct((s, s), (t, t), (t, t)) for s, t in roles.pairs(conditional=None)}


def asking(tokenizer, targets, source=SOURCE):
    return AsksAsTheSource(layers=[0])


def looking(tokenizer, targets, source=SOURCE):
    return LooksAtTheSource(layers=[1])


def blended(tokenizer, targets):
    words = ["car"] * (1 + len(targets))
    return refined(tokenizer, targets) + LocalBlend([SOURCE, *targets], tokenizer, words, 0.5, start=0.3)


def whole_maps(tokenizer, targets):
    """Of the source's text too, whose padding asks where a target's text is longer, as the next layer sees."""
    return FreePromptEdit(0.7, scope="joint", both_halves=True, layers=[1])


def values_of_text(tokenizer, targets):
    return ValueInjectionEdit(0.7, layers=[1])


EDITS = {
    "refine": refined,
    "re-weight": weighed,
    "reflex": blocks,
    "where the car is": where_the_car_is,
    "blended": blended,
    "whole maps": whole_maps,
    "values of text": values_of_text,
    "all of the source": looking,
}
#: Tokens of the source's text that are no padding, and of its recorded keys; 17 of Z-Image's fill up the image's 15.
LENGTHS = {"Qwen-Image": 21, "Chroma": 12, "Lumina 2": 16, "Z-Image": 32, "CogView 4": 16, "Krea 2": 21, "AuraFlow": 88}
KEYS = LENGTHS | {"Chroma": 80, "Z-Image": 32 + 17, "Krea 2": 80}
TARGETS = {"shorter": [SHORT], "longer": [LONG], "as long": [EQUAL], "of all lengths": [SHORT, EQUAL, LONG]}


@pytest.fixture(autouse=True)
def _wide():
    with wide_z_image():
        yield


@pytest.fixture(scope="module")
def pipes(pipe):
    return {family: made(family, pipe) for family in FAMILIES}


@pytest.fixture(params=CASES)
def family(request):
    return request.param


@pytest.fixture
def tiny(pipes, family):
    return solving(pipes[family], "euler")


def taken(family, edit, targets):
    """Targets that a full run takes: Lumina 2 applies a map to texts of as many tokens alone."""
    return [EQUAL] if family == "Lumina 2" and edit in (whole_maps, values_of_text) else targets


def edited(tiny, recording, edit, targets):
    return tiny.edit(recording, targets, edit=edit, output_type="latent").images


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("edit", few(EDITS, "refine", "whole maps"))
@pytest.mark.parametrize("targets", few(TARGETS, "shorter"))
@pytest.mark.parametrize("guided", few({"guided": True, "unguided": False}, "guided"))
def test_edits_are_those_of_full_runs(tiny, family, edit, targets, guided, tmp_path):
    """Made before the targets were known, written and read again."""
    options, targets = (GUIDED if guided else UNGUIDED)[family], taken(family, edit, targets)
    written = edit(tiny.tokenizer, targets)
    full = tiny(SOURCE, targets, edit=written, output_type="latent", **run(**options)).images
    tiny.record(SOURCE, edit=edit(tiny.tokenizer, [SOURCE]), placement=tmp_path / "kept", **run(**options))
    replayed = edited(tiny, Recording.load(tmp_path / "kept"), written, targets)
    assert distance(replayed, full[1:]) <= EXACT
    alone = tiny(targets[0], output_type="latent", **run(**options)).source
    assert distance(full[1:2], alone) > 1e-3  # and the edit does something


@pytest.mark.parametrize("edit", few(EDITS, "refine"))
@pytest.mark.parametrize("length", few({"truncated": -3, "as long": 0}))
def test_texts_that_are_truncated(tiny, family, edit, length):
    """To fewer tokens than the source has, with what a template writes behind it, or to as many."""
    if family in ("CogView 4", "Krea 2") and length:
        pytest.skip("words of truncated texts whose padding is not at their end are refused in full runs as well")
    options = run(**GUIDED[family]) | {"max_sequence_length": LENGTHS[family] + length}
    targets = [SHORT, "a red car on a mountain, a mountain, a mountain, a mountain"]
    if family == "Krea 2":
        targets = [SHORT]  # the other is truncated
    written = edit(tiny.tokenizer, targets)
    if taken(family, edit, targets) != targets:
        with pytest.raises(ValueError, match="write prompts of as many tokens"):
            tiny(SOURCE, targets, edit=written, output_type="latent", **options)
        return
    full = tiny(SOURCE, targets, edit=written, output_type="latent", **options).images
    options["generator"].manual_seed(2)
    recording = tiny.record(SOURCE, edit=written, **options)
    assert distance(edited(tiny, recording, written, targets), full[1:]) <= EXACT


def test_solvers_that_call_the_model_within_a_step(pipes, family):
    tiny, written = solving(pipes[family], "fireflow"), refined(pipes[family].tokenizer, [SHORT])
    photo = np.random.default_rng(3).random((48, 80, 3))
    inversion = tiny.invert(photo, SOURCE, num_inference_steps=3, max_sequence_length=80, height=48, width=80)
    options = {"inversion": inversion, "max_sequence_length": 80, **GUIDED[family]}
    full = tiny(target_prompt=[SHORT], edit=written, output_type="latent", **options).images
    recording = tiny.record(edit=written, **options)
    assert distance(edited(tiny, recording, written, [SHORT]), full[1:]) <= 1e-9  # a longer way for what is rounded


@pytest.mark.parametrize("placement", few(["cpu", "device"], "cpu"))
def test_what_is_kept(tiny, family, placement):
    """Of words the keys of the source's text, without padding where no padding is looked at; counted beforehand."""
    options = GUIDED[family]
    recording = tiny.record(SOURCE, edit=refined(tiny.tokenizer, [LONG]), placement=placement, **run(**options))
    parts = {part for parts in recording.contents.values() for part in parts}
    assert parts == {Part(True, name) for name in ("image-query", "image-key", "text-key")}
    kept = recording.store.read(0, torch.device("cpu"))
    lengths = {tensor.shape[2] for key, tensor in kept.items() if key.part.name == "text-key"}
    assert lengths == {KEYS[family]} and recording.text_lengths["conditional"] == LENGTHS[family]
    edits = [refined(tiny.tokenizer, [LONG]), whole_maps(tiny.tokenizer, [LONG])]
    needed = tiny.record(SOURCE, edit=edits, **run(**options)).nbytes
    with pytest.raises(ValueError, match=f"more than budget_bytes={needed - 1} "):
        tiny.record(SOURCE, edit=edits, budget_bytes=needed - 1, **run(**options))
    assert tiny.record(SOURCE, edit=edits, budget_bytes=needed, **run(**options)).nbytes == needed


@pytest.mark.slow
@pytest.mark.parametrize("edit", few(EDITS, "refine"))
def test_half_precision(tiny, family, edit):
    options, targets = GUIDED[family], taken(family, edit, [LONG])
    written = edit(tiny.tokenizer, targets)
    full = tiny(SOURCE, targets, edit=written, output_type="latent", **run(**options)).images
    half = tiny.record(SOURCE, edit=written, precision="half", **run(**options))
    assert 1e-6 < half.error < 1e-2
    assert EXACT < distance(edited(tiny, half, written, targets), full[1:]) < 5e-2


def test_a_recording_for_words_serves_other_edits(tiny, family):
    """Of image tokens alone, beside which no text is padded."""
    options = GUIDED[family]
    recording = tiny.record(SOURCE, edit=refined(tiny.tokenizer, [SHORT]), **run(**options))
    full = tiny(SOURCE, [SHORT], edit=FreePromptEdit(0.4), output_type="latent", **run(**options)).images
    assert distance(edited(tiny, recording, FreePromptEdit(0.4), [SHORT]), full[1:]) <= EXACT


def test_words_are_placed_by_the_sources_tokens(tiny, family, monkeypatch):
    """Tokens of another prompt are seen before anything is denoised."""
    written, options = refined(tiny.tokenizer, [LONG]), UNGUIDED[family]
    recording = tiny.record(SOURCE, edit=written, **run(**options))
    other = tiny.record("a big dog", edit=FreePromptEdit(0.5), **run(**options))
    monkeypatch.setattr(tiny.transformer, "forward", lambda *args, **kwargs: pytest.fail("it ran"))
    swapped = dataclasses.replace(recording, source_text=other.source_text)
    with pytest.raises(ValueError, match=f"encodes other tokens than those of the prompt '{SOURCE}'"):
        edited(tiny, swapped, written, [LONG])


def test_a_recording_of_an_earlier_version(tiny, family, tmp_path, monkeypatch):
    """It held image tokens alone, and serves their edits as before."""
    options = UNGUIDED[family]
    with monkeypatch.context() as before:
        before.setattr("fpe_pipeline.recordings.folder_store.FORMAT", 6)
        before.setattr("fpe_pipeline.recordings.capture.source_text", lambda encoding: {})
        before.setattr("fpe_pipeline.recordings.flow_capture.JointCapture._end_of_text", lambda *args: None)
        recording = tiny.record(SOURCE, edit=FreePromptEdit(1.0), placement=tmp_path / "kept", **run(**options))
    earlier = Recording.load(tmp_path / "kept")
    assert not earlier.source_text and not earlier.text_lengths and not recording.text_lengths
    full = tiny(SOURCE, [LONG], edit=FreePromptEdit(0.7), output_type="latent", **run(**options)).images
    assert distance(edited(tiny, earlier, FreePromptEdit(0.7), [LONG]), full[1:]) <= EXACT
    monkeypatch.setattr(tiny.transformer, "forward", lambda *args, **kwargs: pytest.fail("it ran"))
    for make in (refined, blocks, where_the_car_is, blended):
        with pytest.raises(Lacking, match=r"Edit.* looks for words .* does not hold .*\. Record it again"):
            edited(tiny, earlier, make(tiny.tokenizer, [LONG]), [LONG])
    for make in (whole_maps, values_of_text):
        with pytest.raises(Lacking, match=r"the recording lacks what \w+ needs of the source: .*text-.*Record it for"):
            edited(tiny, earlier, make(tiny.tokenizer, [LONG]), [LONG])


@pytest.mark.parametrize("edit", few(EDITS, "refine"))
def test_masks_of_truth_values(pipes, edit, monkeypatch):
    """Of Chroma's padding, which takes no attention then, where diffusers' pipeline makes numbers of them."""
    tiny, targets = solving(pipes["Chroma"], "euler"), [SHORT, LONG]
    written, options = edit(tiny.tokenizer, targets), GUIDED["Chroma"]
    of_numbers = tiny.record(SOURCE, edit=written, **run(**options))
    made = tiny._prepare_attention_mask
    monkeypatch.setattr(tiny, "_prepare_attention_mask", lambda *args, **kwargs: made(*args, **kwargs).bool())
    full = tiny(SOURCE, targets, edit=written, output_type="latent", **run(**options)).images
    recording = tiny.record(SOURCE, edit=written, **run(**options))
    assert distance(edited(tiny, recording, written, targets), full[1:]) <= EXACT
    assert recording.text_lengths == of_numbers.text_lengths
    assert distance(recording.latents[-1], of_numbers.latents[-1]) > 1e-3


FILLED = "a photo of a red car on a mountain, of a big house beside it, and of a dog on a street"  # to 64 tokens
TURNED = {"Lumina 2": {SOURCE: 16, FILLED: 46}, "Z-Image": {SOURCE: 32, FILLED: 64}}


@pytest.mark.parametrize("family", list(TURNED))
class TestTextsThatTurnImages:
    """Those of Lumina 2 and of Z-Image, filled up to multiples of 32 tokens, behind which an image stands elsewhere."""

    @pytest.mark.parametrize(
        "make", few({"where the car is": where_the_car_is, "all of the source": looking}, "all of the source")
    )
    @pytest.mark.parametrize("guided", few({"guided": True, "unguided": False}, "guided"))
    @pytest.mark.parametrize(
        "texts", few({"longer": (SOURCE, FILLED), "shorter": (FILLED, SHORT)}, "longer", "shorter")
    )
    def test_words_of_another_number(self, tiny, family, make, guided, texts, tmp_path):
        options = (GUIDED if guided else UNGUIDED)[family]
        source, target = texts
        written = make(tiny.tokenizer, [target], source)
        options = {**options, "max_sequence_length": 96}
        full = tiny(source, [target, SOURCE], edit=written, output_type="latent", **(run() | options)).images
        tiny.record(source, edit=written, placement=tmp_path / "kept", **(run() | options))
        recording = Recording.load(tmp_path / "kept")
        assert distance(edited(tiny, recording, written, [target, SOURCE]), full[1:]) <= EXACT
        assert recording.text_lengths["conditional"] == TURNED[family][source]

    def test_queries_of_a_longer_text(self, tiny, family):
        options = {**run(**UNGUIDED[family]), "max_sequence_length": 96}
        written = asking(tiny.tokenizer, [SHORT])
        full = tiny(FILLED, [SHORT], edit=written, output_type="latent", **options).images
        options["generator"].manual_seed(2)
        recording = tiny.record(FILLED, edit=written, **options)
        assert distance(edited(tiny, recording, written, [SHORT]), full[1:]) <= EXACT

    @pytest.mark.parametrize("edit", few(EDITS, "refine", "whole maps"))
    def test_beside_a_longer_negative_prompt(self, tiny, family, edit):
        targets = taken(family, edit, [SHORT])
        options = {**run(), "negative_prompt": FILLED, "guidance_scale": 3.0, "max_sequence_length": 96}
        written = edit(tiny.tokenizer, targets)
        full = tiny(SOURCE, targets, edit=written, output_type="latent", **options).images
        options["generator"].manual_seed(2)
        recording = tiny.record(SOURCE, edit=written, **options)
        assert distance(edited(tiny, recording, written, targets), full[1:]) <= EXACT


REFUSED = {
    "words of texts that are filled up": ("Z-Image", refined, "a caption of 32 tokens stand for those of one of 64"),
    "maps, filled up": ("Z-Image", whole_maps, "the 32 tokens of one row's caption is applied to the 64"),
    "maps": ("Lumina 2", whole_maps, "the 16 tokens of one row's caption is applied to the 46"),
    "values": ("Lumina 2", values_of_text, "the 46 tokens of one row's caption is applied to the 16"),
    "queries": ("Lumina 2", asking, "the 16 tokens of one row's caption ask in the place of the 46 of another's"),
    "queries, filled up": ("Z-Image", asking, "the 32 tokens of one row's caption ask in the place of the 64"),
}


@pytest.mark.parametrize(("family", "make", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_of_full_runs_is_refused(tiny, family, make, said, monkeypatch):
    """Maps over texts of other lengths, before anything is denoised."""
    options = {**UNGUIDED[family], "max_sequence_length": 96}
    written = make(tiny.tokenizer, [FILLED])
    recording = tiny.record(SOURCE, edit=written, **(run() | options))
    monkeypatch.setattr(tiny.transformer, "forward", lambda *args, **kwargs: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=said):
        tiny(SOURCE, [FILLED], edit=written, **(run() | options))
    with pytest.raises(ValueError, match=said):
        edited(tiny, recording, written, [FILLED])


class TestTextsThatAreAsLongAsTheLongest:
    """CogView 4's texts are padded to that of their call, in multiples of 16 tokens, and padding is attended to."""

    @pytest.mark.parametrize("make", few({"where the car is": where_the_car_is, "asking": asking}, "where the car is"))
    def test_targets_of_fewer_tokens_are_padded_as_beside_their_source(self, pipes, make):
        tiny, options = pipes["CogView 4"], GUIDED["CogView 4"]
        written = make(tiny.tokenizer, [SHORT], FILLED)
        full = tiny(FILLED, [SHORT], edit=written, output_type="latent", **run(**options)).images
        recording = tiny.record(FILLED, edit=written, **run(**options))
        assert distance(edited(tiny, recording, written, [SHORT]), full[1:]) <= EXACT
        alone = tiny.encode_prompt(SHORT, do_classifier_free_guidance=False)[0]
        assert alone.shape[1] == 16 and recording.text_lengths["conditional"] == 48

    def test_targets_of_more_are_refused(self, pipes, monkeypatch):
        tiny = pipes["CogView 4"]
        recording = tiny.record(SOURCE, **run(**UNGUIDED["CogView 4"]))
        monkeypatch.setattr(tiny.transformer, "forward", lambda *args, **kwargs: pytest.fail("it ran"))
        with pytest.raises(ValueError, match=r"takes 48 tokens, and the recorded source 16: .* at most 16 tokens"):
            edited(tiny, recording, FreePromptEdit(0.2), [SHORT, FILLED])


class TestPaddedTexts:
    """Qwen-Image's texts are padded to as many tokens as those of source and targets together would have."""

    def called_with(self, tiny, edit, targets, monkeypatch):
        widths = []
        recording = tiny.record(SOURCE, edit=edit, **run(**GUIDED["Qwen-Image"]))
        forward = type(tiny.transformer).forward

        def watched(self, **given):
            widths.append(given["encoder_hidden_states"].shape[1])
            return forward(self, **given)

        with monkeypatch.context() as within:
            within.setattr(tiny.transformer, "forward", watched.__get__(tiny.transformer))
            edited(tiny, recording, edit, targets)
        return set(widths)

    def test_where_text_tokens_are_replayed(self, pipes, monkeypatch):
        tiny, lengths = pipes["Qwen-Image"], {21, 14}  # of the source, and of the negative prompt
        assert self.called_with(tiny, refined(tiny.tokenizer, [SHORT]), [SHORT], monkeypatch) == lengths
        shown = self.called_with(tiny, FreePromptEdit(0.5), [SHORT], monkeypatch)
        assert shown == {14, tiny.encode_prompt(SHORT)[0].shape[1]}  # image tokens alone

    def test_they_are_padded_once_a_run(self, pipes, monkeypatch):
        tiny, asked = pipes["Qwen-Image"], []
        adapter = type("", (), {"model": tiny.transformer})()
        adapter.longer_texts = lambda kwargs, tokens: asked.append(tokens) or {"encoder_hidden_states": "longer"}
        seen = []
        monkeypatch.setattr(tiny.transformer, "forward", lambda **given: seen.append(given))
        remove, texts = padded_texts.pad_texts(adapter, {True: 30}), torch.zeros(1)
        for _ in range(3):
            tiny.transformer(encoder_hidden_states=texts, other=1)
        remove()
        tiny.transformer(encoder_hidden_states=texts)
        assert asked == [{True: 30}]
        assert seen == [{"encoder_hidden_states": "longer", "other": 1}] * 3 + [{"encoder_hidden_states": texts}]
