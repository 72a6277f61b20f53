"""Edits of Sana's attention to its text, and of Sana-Sprint's: against maps that are written out, in float64."""

import diffusers
import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image
from torch.nn import functional as F

if not hasattr(diffusers, "SanaSprintPipeline"):
    pytest.skip("this diffusers has no Sana-Sprint", allow_module_level=True)

from fpe_pipeline import FreePromptEdit, LocalBlend, MasaCtrlEdit, PromptToPromptEdit, WordMask, editing, heat_maps
from fpe_pipeline.prompts.alignment import align_refine
from tests.support.placed_words import columns, placed
from tests.support.slow_cases import few
from tests.support.tiny_sana import PROMPTS, SAID, TEXTS, dense_sana, draw_sana, tiny_sana_pipeline, tiny_sana_videos

pytestmark = pytest.mark.usefixtures("in_float64")
EXACT = 1e-8


class Words:
    """Where the model's text has words: behind the last token of an instruction, where one comes before them."""

    family = "sana"

    def __init__(self, said=SAID):
        self.said = said

    def template(self, pipe):
        before = "\n".join(self.said or ())
        return before, "", len(pipe.tokenizer.encode(before)) - 2 if before else 0

    def tokenizer(self, pipe):
        return pipe.tokenizer

    def texts(self, longest):
        return TEXTS


@pytest.fixture(scope="module")
def sana():
    return tiny_sana_pipeline()


@pytest.fixture(scope="module")
def sprint():
    return tiny_sana_pipeline(
        kind=diffusers.SanaSprintPipeline,
        scheduler=diffusers.SCMScheduler(),
        qk_norm="rms_norm_across_heads",
        guidance_embeds=True,
    )


@pytest.fixture(scope="module")
def videos():
    return tiny_sana_videos()


def draw(pipe, **options):
    if isinstance(pipe, diffusers.SanaSprintPipeline):  # whose steps add noise
        options = {"generator": torch.Generator().manual_seed(5), "intermediate_timesteps": None, **options}
    return draw_sana(pipe, **options)


def edited(pipe, edit, **options):
    with editing(pipe, edit) as session:
        out = draw(pipe, **options)
    return out, session.report()


def reference(pipe, rule, within, **options):
    with dense_sana(pipe, {"attn2": rule}, within):
        return draw(pipe, **options)


def of_words(pipe, prompts, said=SAID):
    """Prompt-to-Prompt in the rows that see their prompts, which are the last ones."""

    def rule(row, rows, map_of, value):
        source = rows - len(prompts)
        if row <= source:
            return None
        text = columns(Words(said), pipe, align_refine, prompts, row - source)
        return text(map_of(source, source), map_of(row, row)) @ value[row]

    return rule


def words_of(pipe, prompts, until=0.5):
    return PromptToPromptEdit(prompts, pipe.tokenizer, "refine", cross_replace_steps=until, self_replace_steps=0)


def farthest(one, other):
    return float((torch.as_tensor(one) - torch.as_tensor(other)).abs().max())


CALLS = {
    "square": ("sana", {}),
    "not square": ("sana", {"size": (4, 6)}),
    "3 targets": ("sana", {"prompts": 4}),
    "no guidance": ("sana", {"guidance_scale": 1.0}),
    "no instruction": ("sana", {"complex_human_instruction": None}),
    "Sprint": ("sprint", {"prompts": 3}),
    "a video": ("videos", {"prompts": 3, "frames": 2, "size": (4, 8)}),
    "a video, no guidance": ("videos", {"frames": 3, "size": (4, 8), "guidance_scale": 1.0}),
    "a video, no instruction": ("videos", {"frames": 2, "complex_human_instruction": None}),
}


@pytest.mark.parametrize("call", few(CALLS, "not square", "Sprint", "a video"))
def test_prompt_to_prompt(request, call):
    name, options = call
    pipe, prompts = request.getfixturevalue(name), PROMPTS[: options.get("prompts", 2)]
    actual, report = edited(pipe, words_of(pipe, prompts), **options)
    rule = of_words(pipe, prompts, options.get("complex_human_instruction", SAID))
    plain = draw(pipe, **options)
    assert farthest(actual, reference(pipe, rule, (0, 1), **options)) <= EXACT
    assert farthest(actual, reference(pipe, rule, (0, 1, 2), **options)) > 1e-6
    assert (actual - plain)[1:].abs().flatten(1).amax(1).min() > 1e-5 and farthest(actual[0], plain[0]) <= EXACT
    assert report.layers == {f"transformer_blocks.{index}.attn2": [0, 1] for index in (0, 1)}


@pytest.mark.slow
def test_several_images_a_prompt(sana):
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)).double().repeat(2, 1, 1, 1)
    prompts = [PROMPTS[0], PROMPTS[3]]  # of one length: diffusers repeats masks in another order than texts
    options = {"latents": noise, "num_images_per_prompt": 2, "prompts": prompts}

    def rule(row, rows, map_of, value):
        if row < 6:
            return None
        text = columns(Words(), sana, align_refine, prompts, 1)
        return text(map_of(row - 2, row - 2), map_of(row, row)) @ value[row]

    actual, _ = edited(sana, words_of(sana, prompts), **options)
    assert farthest(actual, reference(sana, rule, (0, 1), **options)) <= EXACT


class Heat:
    """Where the rows of a dense run that see their prompts look for words, over heads, layers and the steps so far."""

    grid = (8, 12)

    def __init__(self, pipe):
        self.pipe, self.sums, self.count = pipe, {}, 0

    def __call__(self, row, rows, map_of, value):
        row -= rows - 2
        if row >= 0:
            self.sums[row] = self.sums.get(row, 0) + map_of(rows - 2 + row, rows - 2 + row).mean(0)
            self.count += not row

    def of(self, row, word):
        (prompt,) = placed(Words(), self.pipe, PROMPTS[:2])[row]
        return (self.sums[row] / self.count)[:, list(prompt.find(word))].sum(-1).reshape(self.grid)


def test_heat_of_words(sana):
    """Whatever letters they are written in: the pipeline encodes small ones."""
    options = {"size": Heat.grid, "prompts": [prompt.title() for prompt in PROMPTS[:2]]}
    with heat_maps(sana, ["mountain", "winter"]) as maps:
        draw(sana, **options)
    heat = Heat(sana)
    reference(sana, heat, range(4), **options)
    for word, row in (("mountain", 0), ("mountain", 1), ("winter", 1)):
        assert farthest(maps.word(word, row), heat.of(row, word)) <= 1e-6
    assert farthest(maps.word("mountain", 0), heat.of(0, "red")) > 1e-4


@pytest.mark.slow
def test_a_blend_where_words_are(sana):
    prompts, size = PROMPTS[:2], Heat.grid
    blend = LocalBlend(prompts, sana.tokenizer, ["photo", "mountain"], 0.9, start=0.25)
    actual, _ = edited(sana, words_of(sana, prompts, until=0.5) + blend, size=size)

    def expected(words):
        heat, rule = Heat(sana), of_words(sana, prompts)
        shares = []

        def watched(row, rows, map_of, value):
            out = rule(row, rows, map_of, value) if (sana.scheduler.step_index or 0) < 2 else None
            if row == rows - 1 and out is not None:  # heat is read of what the target's map became
                text = columns(Words(), sana, align_refine, prompts, 1)
                whole = text(map_of(rows - 2, rows - 2), map_of(row, row))
                heat.sums[1] = heat.sums.get(1, 0) + whole.mean(0)
            else:
                heat(row, rows, map_of, value)
            return out

        def blended(pipe, step, timestep, values):
            latents, mask = values["latents"], False
            for row, word in enumerate(words):
                found = F.max_pool2d(heat.of(row, word)[None, None], 3, stride=1, padding=1)[0, 0]
                mask = mask | (found / found.amax() > 0.9)
            shares.append(float(mask.double().mean()))
            both = torch.stack([latents[0], torch.where(mask, latents[1], latents[0])])
            return {"latents": both if step >= 1 else latents}

        out = reference(sana, watched, range(4), size=size, callback_on_step_end=blended)
        assert any(0 < share < 1 for share in shares)
        return out

    assert farthest(actual, expected(("photo", "mountain"))) <= EXACT < farthest(actual, expected(("red", "dog")))


@pytest.mark.parametrize(
    "edit",
    few(
        {
            "FPE": lambda pipe: FreePromptEdit(0.5),
            "MasaCtrl": lambda pipe: MasaCtrlEdit(0, start_layer=0),
            "Prompt-to-Prompt": lambda pipe: PromptToPromptEdit(PROMPTS[:2], pipe.tokenizer, "refine"),
            "a mask": lambda pipe: FreePromptEdit(1.0, mask=WordMask(PROMPTS[0], "car", pipe.tokenizer)),
        },
        "FPE",
        "Prompt-to-Prompt",
    ),
)
def test_linear_attention_has_no_map(sana, videos, edit):
    steps, before = [], dict(sana.transformer.attn_processors)
    asked = r"blocks\.0\.attn1: its attention is linear, .*no map.* self_replace_steps=0"
    with pytest.raises(ValueError, match=asked):
        edited(sana, edit(sana), callback_on_step_end=lambda *given: steps.append(1) or {})
    assert not steps and sana.transformer.attn_processors == before
    with pytest.raises(ValueError, match=asked):
        edited(videos, edit(videos), frames=2)


def test_a_video_from_a_picture():
    """Which the pipeline repeats for every row itself, and whose frame takes no steps."""
    torch.manual_seed(0)
    size = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    size |= {"latents_mean": [0.1] * 4, "latents_std": [0.5] * 4}
    vae = AutoencoderKLWan(**size, temperal_downsample=[False, True, True]).double().eval()
    tiny = tiny_sana_videos(kind="SanaImageToVideoPipeline", vae=vae)
    shown = Image.radial_gradient("L").convert("RGB").resize((64, 32))
    options = {"image": shown, "frames": 2, "size": (4, 8), "latents": None}

    def generators():
        return [torch.Generator().manual_seed(3) for _ in range(2)]

    with editing(tiny, words_of(tiny, PROMPTS[:2])):
        actual = draw(tiny, generator=torch.Generator().manual_seed(3), **options)
    with dense_sana(tiny, {"attn2": of_words(tiny, PROMPTS[:2])}, (0, 1)):
        expected = draw(tiny, generator=generators(), **options)
    plain = draw(tiny, generator=generators(), **options)
    assert farthest(actual, expected) <= EXACT < farthest(actual[1], plain[1])
