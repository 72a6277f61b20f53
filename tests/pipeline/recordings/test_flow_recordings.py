"""Recordings on transformers: edits of a recorded source are those of full runs, within a budget of bytes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fpe_pipeline import (
    FreePromptEdit,
    JointProduct,
    KVEdit,
    MasaCtrlEdit,
    Recording,
)
from fpe_pipeline.edits.joint_products import plan_joint_products
from fpe_pipeline.edits.self_attention import SelfAttentionEdit
from fpe_pipeline.edits.watchers import Watcher
from fpe_pipeline.errors import InputError
from fpe_pipeline.models.flow_solvers import SOLVERS
from fpe_pipeline.recordings.keys import Part
from tests.support.flow_pipelines import (
    EXACT,
    FAMILIES,
    FAST,
    MADE,
    OTHER,
    SIZE,
    SOURCE,
    STEPS,
    TARGET,
    distance,
    edited_with,
    noise,
    solving,
)
from tests.support.free_prompt_pipelines import free_prompt_pipeline
from tests.support.slow_cases import few

RUN = {"num_inference_steps": STEPS, "max_sequence_length": 12, **SIZE}


class Values(SelfAttentionEdit):
    """The values of the source, of image and text, under a target's own map: RF-Solver-Edit's and FireFlow's rule."""

    def select(self, sites):
        return self.joint_sites(sites)

    def products(self, site, step, roles):
        return {
            target: JointProduct((target, target), (target, target), (source, source))
            for source, target in roles.pairs()
        }


EDITS = {
    "image maps": FreePromptEdit(0.5),
    "whole maps": FreePromptEdit(0.5, scope="joint"),
    "both halves": FreePromptEdit((0.25, 1.0), both_halves=True),
    "softly": FreePromptEdit(0.5, strength=0.4),
    "keys and values": MasaCtrlEdit(1, layers=range(1, 3)),
    "values": Values(layers=range(1, 3)),
}


@pytest.fixture(scope="module")
def pipes(pipe):
    return {family: solving(edited_with(MADE[family](pipe)), "euler") for family in FAMILIES}


def both(tiny, family, edit, targets=(TARGET, OTHER), **options):
    """Images of the targets in a full run, and from a recording."""
    options = {**RUN, "guidance_scale": 3.0, "latents": noise(family), **options}
    full = tiny(SOURCE, list(targets), edit=edit, output_type="latent", **options)
    recording = tiny.record(SOURCE, edit=edit, **options)
    return full, recording, tiny.edit(recording, list(targets), edit=edit, output_type="latent")


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_edits_are_those_of_full_runs(pipes, family, edit):
    tiny = solving(pipes[family], "euler")
    full, recording, replayed = both(tiny, family, edit)
    assert distance(replayed.images, full.images[1:]) <= EXACT[family]
    alone = tiny(TARGET, latents=noise(family), guidance_scale=3.0, **FAST, **SIZE).source
    assert distance(replayed.images[:1], alone) > 1e-4  # and the edit does something
    assert distance(recording.latents[-1], full.images[:1]) <= EXACT[family]
    assert replayed.source is None and replayed.prompts == (SOURCE, TARGET, OTHER)
    assert set(replayed.report.replayed) == set(recording.contents) and replayed.report.layers


@pytest.mark.parametrize("scales", [5.0, [5.0, 1.5]])
def test_targets_on_flux_have_a_guidance_of_their_own(pipes, scales):
    """As in a full run in which the source keeps the guidance that it was recorded with."""
    tiny = solving(pipes["flux"], "euler")
    each = scales if isinstance(scales, list) else [scales] * 2
    options = {**RUN, "latents": noise("flux"), "edit": FreePromptEdit(0.5)}
    full = tiny(SOURCE, [TARGET, OTHER], guidance_scale=[3.0, *each], output_type="latent", **options)
    recording = tiny.record(SOURCE, guidance_scale=3.0, **options)
    edited = {"edit": FreePromptEdit(0.5), "output_type": "latent"}
    replayed = tiny.edit(recording, [TARGET, OTHER], guidance_scale=scales, **edited)
    assert distance(replayed.images, full.images[1:]) <= EXACT["flux"]
    as_recorded = tiny.edit(recording, [TARGET, OTHER], **edited)
    assert distance(replayed.images, as_recorded.images) > 1e-4
    with pytest.raises(ValueError, match="one for each of the 2 targets, got 3"):
        tiny.edit(recording, [TARGET, OTHER], guidance_scale=[1.0, 2.0, 3.0])


@pytest.mark.slow
@pytest.mark.parametrize("solver", few(SOLVERS, "euler"))
@pytest.mark.parametrize("edit", few(EDITS, "both halves"))
def test_negative_prompts_on_flux(pipes, edit, solver, tmp_path):
    """They see a call of their own in each step, which is kept where an edit takes something of it."""
    tiny = solving(pipes["flux"], solver)
    guided = {"negative_prompt": "a drawing", "true_cfg_scale": 3.0}
    full, recording, replayed = both(tiny, "flux", edit, **guided)
    assert distance(replayed.images, full.images[1:]) <= EXACT["flux"]
    alone = tiny(TARGET, latents=noise("flux"), guidance_scale=3.0, **FAST, **SIZE, **guided).source
    assert distance(replayed.images[:1], alone) > 1e-4
    unguided = both(tiny, "flux", edit)[2]
    assert distance(replayed.images, unguided.images) > 1e-4
    halves = {part.conditional for parts in recording.contents.values() for part in parts}
    reads_both = edit.both_halves if isinstance(edit, FreePromptEdit) else isinstance(edit, MasaCtrlEdit)
    assert halves == ({True, False} if reads_both else {True})
    options = {**RUN, **guided, "latents": noise("flux"), "guidance_scale": 3.0, "edit": edit}
    tiny.record(SOURCE, placement=tmp_path / "kept", budget_bytes=recording.nbytes, **options)
    loaded = Recording.load(tmp_path / "kept")
    assert (loaded.negative_prompt, loaded.true_cfg_scale) == ("a drawing", 3.0)
    assert recording.nbytes <= loaded.nbytes < 1.1 * recording.nbytes  # with the heads of files
    again = tiny.edit(loaded, [TARGET, OTHER], edit=edit, output_type="latent")
    assert distance(again.images, replayed.images) <= EXACT["flux"]


def test_guidance_on_sd3_is_the_recordings(pipes):
    sd3 = solving(pipes["sd3"], "euler")
    recording = sd3.record(SOURCE, edit=FreePromptEdit(0.5), latents=noise("sd3"), **RUN)
    with pytest.raises(ValueError, match="is the recording's, of both halves"):
        sd3.edit(recording, TARGET, guidance_scale=4.0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_solvers(pipes, family, solver):
    full, recording, replayed = both(solving(pipes[family], solver), family, FreePromptEdit(0.5))
    assert distance(replayed.images, full.images[1:]) <= EXACT[family]
    calls = {"euler": (0, 1), "rf-solver": (0, 1, 2, 3), "fireflow": (0, 1, 2)}[solver]
    assert all(at == calls for parts in recording.contents.values() for at in parts.values())


@pytest.mark.parametrize("inverted", [False, True], ids=["generated", "inverted"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_blends_are_with_latents_at_the_end_of_a_step(pipes, family, solver, inverted):
    """Also by FireFlow, whose loop then holds the source's in the middle of the next step; in the first half of the
    steps, so that others go on from what was blended."""
    tiny = solving(pipes[family], solver)
    edit = KVEdit(mask=torch.cat([torch.ones(48, 48), torch.zeros(48, 32)], dim=1), steps=0.5)
    if inverted:
        photo = np.random.default_rng(3).random((48, 80, 3))
        options = {"inversion": tiny.invert(photo, SOURCE, **RUN)}
        full = tiny(target_prompt=TARGET, edit=edit, output_type="latent", **options)
        replayed = tiny.edit(tiny.record(edit=edit, **options), TARGET, edit=edit, output_type="latent")
    else:
        full, _, replayed = both(tiny, family, edit, [TARGET])
    assert distance(replayed.images, full.images[1:]) <= EXACT[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_inverted_sources(pipes, family):
    tiny = solving(pipes[family], "fireflow")
    photo = np.random.default_rng(3).random((48, 80, 3))
    inversion = tiny.invert(photo, SOURCE, **RUN)
    options = {"max_sequence_length": 12, "guidance_scale": 3.0}
    full = tiny(inversion=inversion, target_prompt=TARGET, self_replace_steps=0.5, output_type="latent", **options)
    recording = tiny.record(inversion=inversion, self_replace_steps=0.5, **options)
    assert torch.equal(recording.latents[-1], inversion.latents[0])
    replayed = tiny.edit(recording, TARGET, output_type="latent")
    assert distance(replayed.images, full.images[1:]) <= EXACT[family]


def test_what_fireflow_left_in_an_earlier_format_is_refused(pipes, tmp_path, monkeypatch):
    """It held latents of the middle of steps; by other solvers they are those that are kept today."""
    monkeypatch.setattr("fpe_pipeline.recordings.folder_store.FORMAT", 4)
    for solver in ("euler", "fireflow"):
        tiny = solving(pipes["sd3"], solver)
        tiny.record(SOURCE, placement=tmp_path / solver, latents=noise("sd3"), self_replace_steps=0.5, **RUN)
    assert Recording.load(tmp_path / "euler").steps == STEPS
    with pytest.raises(InputError, match=r"of an earlier version.*: record it again"):
        Recording.load(tmp_path / "fireflow")


@pytest.mark.slow
@pytest.mark.parametrize(
    "edit",
    [
        FreePromptEdit(0.5, layers=["transformer_blocks.0.attn2", "transformer_blocks.1.attn"]),
        FreePromptEdit(0.5, scope="joint", layers=["transformer_blocks.0.attn2", "transformer_blocks.1.attn"]),
        Values(layers=["transformer_blocks.0.attn2", "transformer_blocks.1.attn"]),
    ],
    ids=["image maps", "whole maps", "values"],
)
def test_layers_of_image_tokens_alone(pipe, edit):
    """Stable Diffusion 3.5's second layers hold no text."""
    tiny = edited_with(MADE["sd3"](pipe, "sd3.5"))
    full, recording, replayed = both(tiny, "sd3", edit)
    assert distance(replayed.images, full.images[1:]) <= EXACT["sd3"]
    assert set(recording.contents) == {"transformer_blocks.0.attn2", "transformer_blocks.1.attn"}


@pytest.mark.parametrize("family", FAMILIES)
def test_guidance(pipes, family):
    """Rows that see no prompt are kept only of edits that replace in both halves, and only where there are any."""
    tiny = solving(pipes[family], "euler")
    names = {}
    for edit in ("image maps", "both halves"):
        for scale in (3.0, 1.0):
            recording = both(tiny, family, EDITS[edit], guidance_scale=scale)[1]
            names[edit, scale] = {part.conditional for parts in recording.contents.values() for part in parts}
    away = {False} if family == "sd3" else set()
    assert names["both halves", 3.0] == {True} | away
    assert {tuple(kept) for kept in (names["image maps", 3.0], names["both halves", 1.0])} == {(True,)}


class TestBytes:
    @pytest.mark.slow
    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("edit", ["image maps", "whole maps", "keys and values", "values"])
    def test_they_are_counted_beforehand(self, pipes, family, edit, monkeypatch):
        tiny = solving(pipes[family], "fireflow")
        recording = both(tiny, family, EDITS[edit])[1]
        needed = recording.nbytes
        given = {"edit": EDITS[edit], "latents": noise(family), "guidance_scale": 3.0, **RUN}
        message = rf"more than budget_bytes={needed - 1} .* pass precision='half'"
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=message):
            patch.setattr(tiny.transformer, "forward", lambda *args, **kwargs: pytest.fail("denoised"))
            tiny.record(SOURCE, budget_bytes=needed - 1, **given)
        again = tiny.record(SOURCE, budget_bytes=needed, **given)
        assert again.nbytes == needed

    def test_what_is_kept(self, pipes):
        """Image queries and keys, of two calls: 15 tokens of 16 numbers in 8 bytes, in each of the layers."""
        recording = both(solving(pipes["flux"], "euler"), "flux", FreePromptEdit(0.5))[1]
        assert len(recording.contents) == 5
        parts = {Part(True, "image-query"): (0, 1), Part(True, "image-key"): (0, 1)}
        assert all(kept == parts for kept in recording.contents.values())
        assert recording.store.nbytes == 5 * 2 * 2 * 15 * 16 * 8

    @pytest.mark.slow
    @pytest.mark.parametrize("family", FAMILIES)
    def test_half_precision(self, pipes, family):
        tiny = solving(pipes[family], "euler")
        full, exact, _ = both(tiny, family, FreePromptEdit(0.5))
        half = tiny.record(
            SOURCE, self_replace_steps=0.5, precision="half", latents=noise(family), guidance_scale=3.0, **RUN
        )
        assert half.store.nbytes == exact.store.nbytes // 4
        assert exact.error == 0 and 1e-6 < half.error < 1e-2
        replayed = tiny.edit(half, [TARGET, OTHER], output_type="latent")
        assert EXACT[family] < distance(replayed.images, full.images[1:]) < 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_folders(pipes, family, tmp_path):
    tiny = solving(pipes[family], "rf-solver")
    options = {"latents": noise(family), **RUN}
    recorded = tiny.record(SOURCE, self_replace_steps=0.5, placement=tmp_path / "kept", **options)
    loaded = Recording.load(tmp_path / "kept")
    assert (loaded.size, loaded.text_length) == ((48, 80), 12)
    assert loaded.contents.keys() == recorded.contents.keys() and torch.equal(loaded.latents, recorded.latents)
    expected = tiny(SOURCE, TARGET, self_replace_steps=0.25, output_type="latent", **options).images
    actual = tiny.edit(Path(tmp_path / "kept"), TARGET, self_replace_steps=0.25, output_type="latent").images
    assert distance(actual, expected[1:]) <= EXACT[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_of_its_own(pipes, family):
    tiny = solving(pipes[family], "euler")
    full = tiny(SOURCE, TARGET, generator=torch.Generator().manual_seed(2), **FAST, **SIZE)
    recording = tiny.record(SOURCE, generator=torch.Generator().manual_seed(2), **RUN)
    assert distance(recording.latents[-1], full.images[:1]) <= 1e-6


class TestRefusals:
    def test_of_recordings(self, pipes):
        sd3, flux = (solving(pipes[family], "euler") for family in FAMILIES)
        for given, error, message in (
            ({"precision": "int8-keys"}, ValueError, "must be exact or half for layers of joint attention"),
            ({"skip_guidance_layers": [1]}, TypeError, "unknown option skip_guidance_layers"),
            ({"layers": 9}, ValueError, "match none"),
            ({"edit": []}, ValueError, "expected an edit to record for"),
            ({"placement": "gpu"}, ValueError, "if a folder is meant"),
            ({"latents": noise("sd3", 2)}, ValueError, r"expected latents \[1, 16, h, w\], got \[2"),
        ):
            with pytest.raises(error, match=message):
                sd3.record(SOURCE, **{**RUN, **given})
        for given in ({"negative_prompt": "cars"}, {"true_cfg_scale": 2.0}):
            with pytest.raises(ValueError, match=r"on FluxPipeline a negative prompt guides together with true_cfg"):
                flux.record(SOURCE, **given, **RUN)
        with pytest.raises(TypeError, match="unknown option true_cfg_scale"):
            sd3.record(SOURCE, true_cfg_scale=2.0, **RUN)
        with pytest.raises(TypeError, match="expected one source prompt, got list"):
            flux.record([SOURCE], **RUN)

    def test_of_edits(self, pipe, pipes):
        sd3, flux = (solving(pipes[family], "euler") for family in FAMILIES)
        recording = sd3.record(SOURCE, self_replace_steps=0.5, latents=noise("sd3"), **RUN)
        with pytest.raises(ValueError, match=r"lacks what MasaCtrlEdit needs .* image-value"):
            sd3.edit(recording, TARGET, edit=MasaCtrlEdit(0, layers=[0]))
        with pytest.raises(ValueError, match="the recording holds 0 to 1"):
            sd3.edit(recording, TARGET, self_replace_steps=1.0)
        with pytest.raises(ValueError, match="recording is of another model"):
            flux.edit(recording, TARGET)
        with pytest.raises(ValueError, match="another noise schedule: scheduler ExactEuler there and FireFlow"):
            solving(sd3, "fireflow").edit(recording, TARGET)
        other = solving(sd3, "euler").record(SOURCE, edit=MasaCtrlEdit(0, layers=[0]), **RUN)
        with pytest.raises(ValueError, match="was not made for plain Free-Prompt-Editing"):
            sd3.edit(other, TARGET)
        unet = free_prompt_pipeline(pipe)
        with pytest.raises(ValueError, match="recording is of another model"):
            unet.edit(recording, TARGET)
        of_unet = unet.record(SOURCE, num_inference_steps=2)
        with pytest.raises(ValueError, match="the recording is of a UNet"):
            sd3.edit(of_unet, TARGET)

    def test_of_maps_as_operators(self, pipes, monkeypatch):
        """Before anything is denoised."""

        class Reads(Watcher):
            def select(self, sites):
                return sites

            def maps(self, site, step, roles):
                return roles.sources

        class Looks(SelfAttentionEdit):
            def select(self, sites):
                return ()

            def products(self, site, step, roles):
                return {}

            def watchers(self):
                return (Reads(),)

        sd3 = solving(pipes["sd3"], "euler")
        monkeypatch.setattr(sd3.transformer, "forward", lambda *args, **kwargs: pytest.fail("it ran"))
        with pytest.raises(ValueError, match=r"Looks asks for the source's map as an operator .* ask for columns"):
            sd3.record(SOURCE, edit=Looks(), **RUN)

    def test_products_for_a_recorded_row(self):
        with pytest.raises(ValueError, match="would change row 1, whose run is recorded"):
            plan_joint_products({1: JointProduct.own(1)}, 1, 1)
        with pytest.raises(ValueError, match="outside the batch of 1"):
            plan_joint_products({0: JointProduct.own(2)}, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_projections_that_are_fused_later(pipe, family):
    """Copies of the projections, of image and text, stay behind on Stable Diffusion 3 when they are parted."""
    tiny = solving(edited_with(MADE[family](pipe)), "euler")
    recording = tiny.record(SOURCE, self_replace_steps=0.5, **RUN, latents=noise(family))
    expected = tiny.edit(recording, TARGET, output_type="latent").images
    tiny.transformer.fuse_qkv_projections()
    assert distance(tiny.edit(recording, TARGET, output_type="latent").images, expected) <= EXACT[family]
    tiny.transformer.unfuse_qkv_projections()
    assert distance(tiny.edit(recording, TARGET, output_type="latent").images, expected) == 0
