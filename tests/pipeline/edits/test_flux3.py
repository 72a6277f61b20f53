"""Edits of FLUX.3, which diffusers calls from modular pipelines, against layers that are written out."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, modular_pipelines
from PIL import Image

from fpe_pipeline import (
    ConsistEdit,
    FreePromptEdit,
    MasaCtrlEdit,
    PromptToPromptEdit,
    StableFlowEdit,
    editing,
    heat_maps,
)
from fpe_pipeline.errors import EditWarning
from tests.support.tiny_flux3 import (
    FLUX3,
    WINDOW,
    dense_flux3,
    draw_flux3,
    draw_flux3_prompts,
    tiny_flux3,
    tiny_flux3_pipeline,
    tiny_flux3_that_reads,
)
from tests.support.tiny_ideogram4 import tiny_ideogram4_pipeline

TOLERANCE = 2e-4
STEPS = 2  # of four
CALL = {"height": 64, "width": 64}
OWN = [f"mode_blocks.image.{index}.attn" for index in range(2)]
COMMON = [f"single_transformer_blocks.{index}.attn" for index in range(3)]


def queries_and_keys(row, joint, image, own, every, state):
    """Free-Prompt-Editing, of image tokens."""
    if row == 0 or state["step"] >= STEPS or state["calls"] > 1 or not joint:
        return None
    for part, all_rows in zip(own[:2], every[:2], strict=True):
        part[:, image] = all_rows[0][:, image]
    return own


def keys_and_values(row, joint, image, own, every, state):
    """MasaCtrl's rule in every layer, those of image tokens alone too, and in both halves of the rows."""
    if row == 0:
        return None
    for part, all_rows in zip(own[1:], every[1:], strict=True):
        part[:, image] = all_rows[0][:, image]
    return own


def whole_maps(row, joint, image, own, every, state):
    if row == 0 or state["step"] >= STEPS or state["calls"] > 1 or not joint:
        return None
    return every[0][0], every[1][0], own[2]


EDITS = {
    "image": (lambda: FreePromptEdit(0.5), queries_and_keys),
    "whole maps": (lambda: FreePromptEdit(0.5, scope="joint"), whole_maps),
    "masactrl": (lambda: MasaCtrlEdit(0, layers=[*OWN, *COMMON]), keys_and_values),
}


def held(pipe, edit, rule, **options):
    with dense_flux3(pipe, rule):
        expected = draw_flux3(pipe, **options)
    with editing(pipe, edit) as session:
        found = draw_flux3(pipe, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    with dense_flux3(pipe, lambda *_: None):
        unedited = draw_flux3(pipe, **options)
    torch.testing.assert_close(found[0], unedited[0], rtol=0, atol=TOLERANCE)
    assert (found[1:] - unedited[1:]).abs().max() > 5 * TOLERANCE
    return session


@pytest.mark.parametrize("shown", [False, True], ids=["alone", "beside a reference picture"])
@pytest.mark.parametrize("name", EDITS)
def test_edits(name, shown):
    edit, rule = EDITS[name]
    held(tiny_flux3_pipeline(), edit(), rule, rows=3, shown=shown)


def test_the_distilled_model():
    """It is told where each step ends, and guides by nothing."""
    session = held(tiny_flux3_pipeline(distilled=True), FreePromptEdit(0.5), queries_and_keys)
    assert "single_transformer_blocks.2.attn" in session.explain()


def test_layers_as_diffusers_computes_them():
    pipe = tiny_flux3_pipeline()
    plain = draw_flux3(pipe)
    with dense_flux3(pipe, lambda *_: None):
        torch.testing.assert_close(draw_flux3(pipe), plain, rtol=0, atol=TOLERANCE)
    with editing(pipe, ConsistEdit()):
        both = draw_flux3(pipe)
    with editing(pipe, StableFlowEdit(layers=[0, 2])):
        assert (draw_flux3(pipe) - both).abs().max() > TOLERANCE


def test_fused_projections():
    pipe = tiny_flux3_pipeline()
    with editing(pipe, FreePromptEdit(0.5)):
        expected = draw_flux3(pipe)
    pipe.transformer.fuse_qkv_projections()
    with editing(pipe, FreePromptEdit(0.5)):
        torch.testing.assert_close(draw_flux3(pipe), expected, rtol=0, atol=TOLERANCE)


def test_reduced_precision():
    """Queries and keys are normed and turned in float32, by weights that stay in it."""
    pipe = tiny_flux3_pipeline()
    pipe.transformer.to(torch.bfloat16)
    for block in pipe.transformer.single_transformer_blocks:
        for norm in (block.attn.norm_q, block.attn.norm_k):
            norm.float()
    with editing(pipe, FreePromptEdit(0.5)):
        assert draw_flux3(pipe).isfinite().all()


def test_the_model_alone():
    model = tiny_flux3()
    places = torch.cartesian_prod(*(torch.arange(float(side)) for side in (1, 4, 6, 1)))
    given = {"hidden_states": torch.randn(1, 24, 16).repeat(2, 1, 1), "encoder_hidden_states": torch.randn(2, 6, 32)}
    given |= {"timestep": torch.full((2,), 0.5), "img_ids": places, "txt_ids": torch.zeros(6, 4)}
    with torch.no_grad(), editing(model, FreePromptEdit(0.5), classifier_free_guidance=False) as session:
        session.step(0, 4)
        edited = model(**given).sample
    assert session.explain().startswith("3 layers replaced")
    assert not torch.equal(edited, model(**given).sample)
    with (
        pytest.raises(ValueError, match="24 image tokens, whose places are 4 rows and 5 columns"),
        editing(model, FreePromptEdit(0.5), classifier_free_guidance=False) as session,
    ):
        session.step(0, 4)
        model(**given | {"img_ids": places[:20].roll(1, 0) * torch.tensor([1, 1, 1, 1]) % 5})


def test_words_of_blocks_without_an_encoder(pipe):
    with pytest.raises(ValueError, match="do not say what text they encode prompts in"):
        editing(tiny_flux3_pipeline(), PromptToPromptEdit(["a cat", "a dog"], pipe.tokenizer))


class TestListsOfPrompts:
    """Blocks of diffusers encode one prompt a call; the edits of them are with those of other models."""

    @pytest.fixture(scope="class", params=[False, True], ids=["guided", "distilled"])
    def reads(self, request):
        return tiny_flux3_that_reads(dtype=torch.float32, distilled=request.param)

    def test_are_what_each_prompt_is_alone(self, reads):
        """Row by row, with the negative prompt's embeddings too, and several images of a prompt."""
        both = ["a photo of a red car", "a photo of a blue car"]
        seen = []
        handle = reads.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
        )
        options = {"steps": 1, "num_images_per_prompt": 2}
        if hasattr(reads, "guider"):
            options["negative_prompt"] = "a drawing"
        try:
            with editing(reads, FreePromptEdit(0.5)):
                draw_flux3_prompts(reads, both, latents=torch.zeros(4, 16, 4, 4), **options)
            together, seen[:] = list(seen), []
            for prompt in both:
                reads(
                    prompt=prompt,
                    text_encoder_out_layers=(1, 2),
                    num_inference_steps=1,
                    output="latents",
                    **CALL | {name: value for name, value in options.items() if name != "steps"},
                )
        finally:
            handle.remove()
        calls = len(together)
        assert calls == len(seen) // 2 == (2 if hasattr(reads, "guider") else 1)
        for call in range(calls):
            torch.testing.assert_close(together[call], torch.cat([seen[call], seen[calls + call]]), rtol=0, atol=1e-5)

    def test_are_one_prompts_business_again_after_the_session(self, reads):
        blocks = reads._blocks.sub_blocks["text_encoder"]
        with editing(reads, FreePromptEdit(0.5)):
            assert {"check_inputs", "_get_qwen3_vl_prompt_embeds"} <= vars(blocks).keys()
        assert not {"check_inputs", "_get_qwen3_vl_prompt_embeds"} & vars(blocks).keys()
        with pytest.raises(ValueError, match="batched prompts are not supported"):
            reads(prompt=["a car", "a dog"], **CALL)

    def test_padding_that_a_longer_prompt_adds_is_told(self, reads):
        longer = ["a red car", "a photo of a red car on a snow mountain in winter, a photo of a red dog"]
        with (
            editing(reads, FreePromptEdit(0.5)),
            pytest.warns(EditWarning, match=r"padded to 40 tokens, .* texts \[0\] have fewer alone"),
        ):
            draw_flux3_prompts(reads, longer, steps=1)

    def test_are_cut_where_the_call_says(self, reads):
        """Windows end there too, as those of one prompt do."""
        widths = set()
        handle = reads.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: widths.add(kwargs["encoder_hidden_states"].shape[1]), with_kwargs=True
        )
        try:
            with editing(reads, FreePromptEdit(1.0)):
                draw_flux3_prompts(
                    reads, ["a car", "a red car on a mountain in winter"], steps=1, max_sequence_length=12
                )
        finally:
            handle.remove()
        assert widths == {12}

    @pytest.mark.parametrize(
        ("prompts", "negative", "said"),
        [
            (("a car", "a dog"), None, "prompt must be a text or a list of them, got tuple"),
            (["a car", 3], None, "prompt must be texts, or a list of them"),
            ([], None, "prompt must be texts"),
            (["a car", "a dog"], ["a"], "got 2 prompts and 1 negative ones"),
            (["a car", "a dog"], 3, "negative_prompt must be a text or a list of them, got int"),
        ],
    )
    def test_that_do_not_go_together_are_refused(self, prompts, negative, said):
        reads = tiny_flux3_that_reads(dtype=torch.float32)
        with editing(reads, FreePromptEdit(0.5)), pytest.raises(ValueError, match=said):
            reads(prompt=prompts, negative_prompt=negative, **CALL)


def test_negative_prompts_of_each_row():
    reads = tiny_flux3_that_reads(dtype=torch.float32)
    prompts, drawings = ["a photo of a red car", "a photo of a blue car"], ["a drawing", "a house"]
    with editing(reads, FreePromptEdit(0.5)):
        one = draw_flux3_prompts(reads, prompts, negative_prompt="a drawing")
        same = draw_flux3_prompts(reads, prompts, negative_prompt=["a drawing"] * 2)
        others = draw_flux3_prompts(reads, prompts, negative_prompt=drawings)
    torch.testing.assert_close(same, one, rtol=0, atol=1e-5)
    torch.testing.assert_close(others[0], one[0], rtol=0, atol=1e-5)
    assert (others[1] - one[1]).abs().max() > 1e-3


def test_an_upsampler_writes_each_prompt_anew():
    blocks = modular_pipelines.Flux3AutoBlocks()
    upsampling = blocks.init_pipeline()
    given = tiny_flux3_that_reads(dtype=torch.float32).components
    upsampling.update_components(**{name: part for name, part in given.items() if part is not None})
    with editing(upsampling, FreePromptEdit(0.5)), pytest.raises(ValueError, match=r"sub_blocks\.pop\(.prompt_ups"):
        upsampling(prompt=["a car", "a dog"], **CALL)


def test_a_reference_picture_beside_noise_that_is_drawn():
    """Its latents are the autoencoder's mode: no generator encodes it, so that one may draw the rows' noise."""
    seeing = modular_pipelines.Flux3AutoBlocks()
    for name in ("prompt_upsampler", "decode"):
        seeing.sub_blocks.pop(name)
    seeing.sub_blocks["text_encoder"].pad_multiple = WINDOW
    pipe = seeing.init_pipeline()
    parts = {name: part for name, part in tiny_flux3_that_reads(dtype=torch.float32).components.items() if part}
    parts |= {"vae": tiny_ideogram4_pipeline(dtype=torch.float32).vae, "scheduler": FlowMatchEulerDiscreteScheduler()}
    pipe.update_components(**parts)
    pipe.set_progress_bar_config(disable=True)
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    given = {"image": picture, "text_encoder_out_layers": (1, 2), "num_inference_steps": 2, "output": "latents", **CALL}

    def drawn(prompt):
        return pipe(prompt=prompt, generator=torch.Generator().manual_seed(1), **given)

    prompts = ["a photo of a red car", "a photo of a blue car"]
    with editing(pipe, FreePromptEdit(0.5)):
        edited, same = drawn(prompts), drawn(prompts[:1] * 2)
    torch.testing.assert_close(edited[:1], drawn(prompts[0]), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(same[0], same[1], rtol=0, atol=TOLERANCE)
    assert (edited[1] - edited[0]).abs().max() > 1e-3


def test_heat_of_a_word():
    """In its own columns of the joint map, between those of the conversation around the prompt."""
    reads = tiny_flux3_that_reads()
    prompts = ["a photo of a red car", "a photo of a red dog in winter"]
    with heat_maps(reads, ["dog", "winter"]) as maps:
        draw_flux3_prompts(reads, prompts, steps=1)
    before, after, _ = FLUX3.template(reads)
    read, kept = FLUX3.tokenizer(reads), []
    tokens = read.convert_ids_to_tokens(read(f"{before}{prompts[1]}{after}")["input_ids"])
    with FLUX3.dense(reads, lambda row, rows: None, "", None) as state:
        for block in reads.transformer.single_transformer_blocks:
            block.attn.processor.keep = lambda row, rows, seen: (
                kept.append(seen) if row and state["calls"] == 1 else None
            )
        draw_flux3_prompts(reads, prompts, steps=1)
    heat = torch.stack([seen.mean(0) for seen in kept]).mean(0)
    for word in ("dog", "winter"):
        (place,) = [number for number, token in enumerate(tokens) if token.strip("Ġ") == word]
        found = torch.as_tensor(maps.word(word, 1))
        assert abs(found - heat[:, place].reshape(4, 4)).max() <= 1e-6
    assert len(kept) == 3
