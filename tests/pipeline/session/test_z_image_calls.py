"""Calls of Z-Image's pipelines: what they tell of their rows, their words, and what is refused."""

import diffusers
import pytest
import torch

if not hasattr(diffusers, "ZImagePipeline"):
    pytest.skip("this diffusers has no Z-Image", allow_module_level=True)

from fpe_pipeline import (
    BatchRoles,
    FreePromptEdit,
    PromptToPromptEdit,
    Watcher,
    editing,
    heat_maps,
)
from fpe_pipeline.models.adapters.families import adapter_of
from tests.support.edited_transformers import SOURCE, placed
from tests.support.edited_z_image import EXACT, MODEL, QUERIES_KEYS, densely, drawn, farthest
from tests.support.tiny_transformers import tiny_vae
from tests.support.tiny_z_image import (
    captions,
    dense_z_image,
    draw_z_image,
    starting,
    tiny_z_image_pipeline,
    tiny_z_image_that_reads,
    wide_z_image,
)


@pytest.fixture(autouse=True)
def _wide():
    with wide_z_image():
        yield


@pytest.fixture(scope="module")
def tiny():
    return tiny_z_image_pipeline()


@pytest.fixture(scope="module")
def reading():
    return tiny_z_image_that_reads()


def test_images_of_a_prompt_are_counted(reading):
    """Image i of a target follows image i of its source, which the pipeline tells nobody but by its noise."""
    prompts = [SOURCE, "a photo of a big dog on a house in winter"]
    with editing(reading, FreePromptEdit(0.5)):
        both = draw_z_image(reading, prompts, num_images_per_prompt=2)
        alone = [draw_z_image(reading, prompts, latents=starting(2, (8, 8), images=2)[[i, i]]) for i in (0, 1)]
    for image in (0, 1):
        assert farthest(both[[image, 2 + image]], alone[image]) <= EXACT
    said = editing(reading, FreePromptEdit(0.5), images_per_prompt=1)
    with pytest.raises(ValueError, match="leave it out, it is read from the call"), said:
        draw_z_image(reading, prompts, num_images_per_prompt=2)


@pytest.mark.parametrize("images", [1, 2])
def test_rows_of_one_image_draw_the_same_noise(reading, images):
    seeded = {"latents": None, "num_images_per_prompt": images, "guidance": 0.0, "steps": 1}
    with editing(reading, FreePromptEdit(0.0)):
        out = draw_z_image(reading, ["a red car"] * 2, generator=torch.Generator().manual_seed(3), **seeded)
    assert farthest(out[:images], out[images:]) <= EXACT
    assert images == 1 or farthest(out[0], out[1]) > 1e-3


def test_a_run_of_embeddings_after_one_of_prompts(reading):
    """It encodes nothing, and is not taken for the prompts that came before."""
    embeds = captions((6, 20, 7), 5)
    with editing(reading, FreePromptEdit(0.5)):
        draw_z_image(reading, [SOURCE, "a red car"], steps=2)
        with pytest.raises(ValueError, match="does not say how many images each has"):
            draw_z_image(reading, 3)
    with editing(reading, FreePromptEdit(0.5), images_per_prompt=1):
        draw_z_image(reading, [SOURCE, "a red car"], steps=2)
        actual = draw_z_image(reading, 3, lengths=[len(each) for each in embeds], prompt_embeds=embeds)
    expected = densely(
        reading, QUERIES_KEYS, (0, 1), prompts=3, lengths=[len(each) for each in embeds], prompt_embeds=embeds
    )
    assert farthest(actual, expected) <= EXACT
    prompts = [SOURCE, "a photo of a big car on a mountain"]
    with editing(reading, PromptToPromptEdit(prompts, reading.tokenizer), images_per_prompt=1):
        draw_z_image(reading, prompts, steps=3)
        with pytest.raises(ValueError, match="got embeddings, in which no words are looked for"):
            draw_z_image(reading, 2)


def test_a_transformer_alone(tiny):
    """Its rows that see their prompts come first as well."""
    texts, noise = captions((5, 40, 7, 7), 0), list(starting(4, (8, 8)).unsqueeze(2))

    def run():
        return torch.stack(tiny.transformer(noise, torch.full((4,), 0.5).double(), texts, return_dict=False)[0])

    with torch.no_grad():
        plain = run()
        with editing(tiny.transformer, FreePromptEdit(1.0), classifier_free_guidance=True) as session:
            session.step(0, 1)
            actual = run()
    moved = [farthest(actual[row], plain[row]) for row in range(4)]
    assert moved[1] > 1e-4 and max(moved[0], *moved[2:]) <= EXACT
    assert "row 1 = A(q 0|1, k 0|1) @ v 1" in session.explain() and "row 3" not in session.explain()


def test_values_that_are_not_finite_in_a_loop_of_ones_own(tiny):
    """The model gives a list of rows, and each of them is looked at."""
    texts, noise = captions((5, 40), 0), list(starting(2, (8, 8)).unsqueeze(2))
    noise[1] = noise[1] * float("nan")
    session = editing(tiny.transformer, FreePromptEdit(1.0), classifier_free_guidance=False)
    with pytest.raises(FloatingPointError, match="got latents that are not finite"), session, torch.no_grad():
        session.step(0, 1)
        tiny.transformer(noise, torch.full((2,), 0.5).double(), texts, return_dict=False)


def test_a_layout_of_ones_own(tiny):
    """Also once guidance has ended."""
    roles = BatchRoles((True, True, False, False), (0, 0, 2, 2))
    with editing(tiny, FreePromptEdit(1.0), roles=roles):
        actual = draw_z_image(tiny, cfg_truncation=0.4)
    assert farthest(actual, densely(tiny, QUERIES_KEYS, range(4), cfg_truncation=0.4)) <= EXACT


class TestWords:
    PROMPTS = (SOURCE, "a big dog on a house in winter, a photo of a big dog on a mountain in winter")

    def heat(self, pipe, prompts, word, number, **options):
        sums = []

        def keep(row, rows, block):
            if row == number:
                sums.append(block.mean(0))

        with dense_z_image(pipe, lambda row, rows: None, keep=keep):
            draw_z_image(pipe, prompts, **options)
        tokens = placed(MODEL, pipe, prompts)[number][0].find(word)
        return (sum(sums) / len(sums))[:, list(tokens)].sum(1).reshape(3, 6)

    @pytest.mark.parametrize("guidance", [3.0, pytest.param(0.0, marks=pytest.mark.slow)])
    def test_heat(self, reading, guidance):
        """Of captions of 32 and of 64 tokens: each word's own columns, and not those beside them."""
        options = {"size": (6, 12), "guidance": guidance}
        with heat_maps(reading, ["car", "dog"]) as maps:
            draw_z_image(reading, self.PROMPTS, **options)
        for word, number in (("car", 0), ("dog", 1)):
            expected = self.heat(reading, self.PROMPTS, word, number, **options)
            assert farthest(torch.as_tensor(maps.word(word, number)), expected) <= 1e-6
        assert farthest(torch.as_tensor(maps.word("car")), self.heat(reading, self.PROMPTS, "red", 0, **options)) > 1e-4

    def test_heat_where_the_longest_text_leaves_the_batch(self, reading):
        """Negative prompts that are longer than the prompts, in a run whose guidance ends."""
        prompts = [SOURCE, "a big dog on a house in winter"]
        options = {"size": (6, 12), "cfg_truncation": 0.4, "negative": " ".join(["a drawing of a house,"] * 6)}
        with heat_maps(reading, ["dog"]) as maps:
            out = draw_z_image(reading, prompts, **options)
        assert farthest(torch.as_tensor(maps.word("dog", 1)), self.heat(reading, prompts, "dog", 1, **options)) <= 1e-6
        assert farthest(out, draw_z_image(reading, prompts, **options)) <= EXACT

    def test_captions_of_other_lengths(self, reading):
        """A shorter one lacks tokens that the longer one attends to, so that no words can stand for them."""
        edit = PromptToPromptEdit(self.PROMPTS, reading.tokenizer, "refine")
        message, computed = "words of a caption of 32 tokens stand for those of one of 64", []
        handle = reading.transformer.noise_refiner[0].register_forward_hook(lambda *_: computed.append(True))
        with pytest.raises(ValueError, match=message), editing(reading, edit):
            draw_z_image(reading, self.PROMPTS)
        handle.remove()
        assert not computed  # it is said before anything is

    @pytest.mark.parametrize("align", ["replace", "refine"])
    def test_negative_prompts_of_another_length(self, reading, align):
        """Words do not stand for tokens that only a longer text of the batch has."""
        prompts = ["a photo of a red car", "a photo of a blue car"]  # "blue" is spelt in more tokens
        edit = PromptToPromptEdit(prompts, reading.tokenizer, align, cross_replace_steps=1.0, self_replace_steps=0.0)
        predictions = []
        for negative in ("a drawing", "a drawing, " * 6):
            seen = []
            handle = reading.transformer.register_forward_hook(lambda *call, seen=seen: seen.append(call[2][0]))
            with editing(reading, edit):
                draw_z_image(reading, prompts, negative=negative)
            handle.remove()
            predictions.append(torch.stack(seen[0][:2]))  # of the prompts, before guidance mixes the halves
        assert farthest(*predictions) <= EXACT

    def test_the_callers_prompts_stay_as_they_are(self, reading):
        prompts = [SOURCE, "a photo of a big car on a mountain"]
        known, negative = list(prompts), ["a drawing"] * 2
        with editing(reading, PromptToPromptEdit(prompts, reading.tokenizer)):
            first, second = (
                reading(
                    prompts,
                    negative_prompt=negative,
                    latents=starting(2, (8, 8)),
                    height=64,
                    width=64,
                    num_inference_steps=2,
                    max_sequence_length=64,
                    output_type="latent",
                ).images
                for _ in range(2)
            )
        assert prompts == known and negative == ["a drawing"] * 2 and torch.equal(first, second)


class TextMaps(Watcher):
    """The maps of two rows over their captions, of each layer and step."""

    def __init__(self):
        self.seen = []

    def select(self, sites):
        return tuple(site for site in sites if site.kind == "joint")

    def maps(self, site, step, roles):
        return (0, 1)

    def receive(self, site, step, roles, columns, maps):
        self.seen += [maps[row].dense()[:, 0] for row in (0, 1)]


@pytest.mark.parametrize("lengths", [(5, 40), (6, 20)], ids=str)
def test_maps_over_captions(tiny, lengths):
    """Columns of the one softmax, in which the tokens that fill up the image and the caption count."""
    watcher, expected = TextMaps(), []

    def keep(row, rows, block):
        if row < 2:
            expected.append(block)

    with editing(tiny, FreePromptEdit(0.0), images_per_prompt=1) as session:
        session.watch(watcher)
        draw_z_image(tiny, lengths=lengths, steps=2)
    with dense_z_image(tiny, lambda row, rows: None, keep=keep):
        draw_z_image(tiny, lengths=lengths, steps=2)
    for actual, block in zip(watcher.seen, expected, strict=True):
        tokens = block.shape[-1]
        assert farthest(actual[..., :tokens], block) <= EXACT and not actual[..., tokens:].any()
        assert float(block.sum(-1).min()) < 0.5 < float(block.sum(-1).max()) < 1


class TestRefused:
    def test_maps_over_another_captions_tokens(self, tiny):
        with pytest.raises(ValueError, match="the 32 tokens of one row's caption is applied to the 64"):
            drawn(tiny, FreePromptEdit(0.5, scope="joint"))
        drawn(tiny, FreePromptEdit(0.5, scope="joint"), lengths=(6, 20))

    def test_omni(self, tiny):
        kind = type("ZImageOmniPipeline", (type(tiny),), {})
        with pytest.raises(ValueError, match="Z-Image Omni's sequences"):
            editing(tiny_z_image_pipeline(kind=kind), FreePromptEdit())
        rows = [[row] for row in starting(2, (8, 8)).unsqueeze(2)]
        with pytest.raises(ValueError, match="Z-Image Omni's sequences"):
            adapter_of(tiny.transformer).read((rows, torch.ones(2), captions((5, 5), 0)), {})

    @pytest.mark.parametrize(
        ("shapes", "given", "message"),
        [
            ([(1, 8, 8), (1, 8, 12)], {}, "latents of one size"),
            ([(2, 8, 8)] * 2, {}, "latents of 1 frame in patches of 2, got 2"),
            ([(1, 8, 8)] * 2, {"patch_size": 4}, "patches of 2, got 1 in patches of 4"),
        ],
    )
    def test_tokens_that_are_not_known(self, tiny, shapes, given, message):
        rows = [torch.zeros(16, *shape) for shape in shapes]
        with pytest.raises(ValueError, match=message):
            adapter_of(tiny.transformer).read((rows, torch.ones(2), captions((5, 5), 0)), given)

    def test_context_parallelism(self, tiny):
        processor = tiny.transformer.layers[0].attention.processor
        processor._parallel_config = object()
        try:
            with pytest.raises(ValueError, match="context parallelism"):
                drawn(tiny, FreePromptEdit(0.5))
        finally:
            processor._parallel_config = None

    def test_another_processor(self):
        other = tiny_z_image_pipeline()
        attention = other.transformer.layers[1].attention
        attention.set_processor(type("TheirAttnProcessor", (type(attention.processor),), {})())
        with pytest.raises(ValueError, match="TheirAttnProcessor may do more"):
            drawn(other, FreePromptEdit(0.5))


def test_sites_are_found_by_walking(tiny):
    assert not hasattr(tiny.transformer, "attn_processors")
    sites = adapter_of(tiny).sites
    assert [(site.kind, site.index) for site in sites] == [("image", 0), ("joint", 0), ("joint", 1), ("joint", 2)]


def test_a_controlnet_shares_the_layers_of_the_image_alone():
    """They compute its tokens too, and are no site beside it."""
    beside = tiny_z_image_pipeline()
    beside.controlnet = torch.nn.Identity()
    assert [site.kind for site in adapter_of(beside).sites] == ["joint"] * 3


def test_residuals_of_a_controlnet_pass(tiny):
    """They are added between blocks, which no layer's attention sees."""
    texts, noise = captions((6, 20), 0), list(starting(2, (8, 8)).unsqueeze(2))
    residuals = {0: torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}

    def run(**given):
        time = torch.full((2,), 0.5).double()
        with torch.no_grad():
            return torch.stack(tiny.transformer(noise, time, texts, return_dict=False, **given)[0])

    with editing(tiny.transformer, FreePromptEdit(1.0), classifier_free_guidance=False) as session:
        session.step(0, 1)
        actual = run(controlnet_block_samples=residuals)
    taken = [(1.0, {"q_image": 0, "k_image": 0})]
    tiny.scheduler.set_timesteps(1)
    with dense_z_image(tiny, lambda row, rows: taken if row else None):
        assert farthest(actual, run(controlnet_block_samples=residuals)) <= EXACT
        assert farthest(actual, run()) > 1e-4


def test_processors_are_put_back(tiny):
    blocks = (*tiny.transformer.noise_refiner, *tiny.transformer.layers)
    before, plain = [block.attention.processor for block in blocks], draw_z_image(tiny)
    with pytest.raises(RuntimeError, match="stop"), editing(tiny, FreePromptEdit(0.5), images_per_prompt=1):
        draw_z_image(tiny)
        raise RuntimeError("stop")
    assert [block.attention.processor for block in blocks] == before
    assert torch.equal(draw_z_image(tiny), plain)


@pytest.mark.slow
def test_a_pipeline_with_a_controlnet():
    """In float32, as its latents are."""
    torch.manual_seed(3)
    size = {"control_in_dim": 16, "dim": 16, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    net = diffusers.ZImageControlNetModel(control_layers_places=[0, 2], control_refiner_layers_places=[0], **size)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.3)
    parts = {"kind": diffusers.ZImageControlNetPipeline, "vae": tiny_vae(), "controlnet": net.eval()}
    pipe = tiny_z_image_that_reads(torch.float32, **parts)
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(4))

    def run():
        return draw_z_image(pipe, [SOURCE, "a big dog on a house in winter"], control_image=picture)

    plain = run()
    with editing(pipe, FreePromptEdit(0.5)):
        actual = run()

    def rule(row, rows):
        return [(1.0, {"q_image": 0, "k_image": 0})] if row == 1 and state["step"] < 2 else None

    with dense_z_image(pipe, rule) as state:
        assert farthest(actual, run()) <= 1e-4 < 1e-2 < farthest(actual[1], plain[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ZImageImg2ImgPipeline", "ZImageInpaintPipeline"])
def test_pictures_that_are_changed(name):
    """Steps are those of the whole schedule, of which the call makes the last three."""
    pipe = tiny_z_image_that_reads(kind=getattr(diffusers, name), vae=tiny_vae().double())
    generator = torch.Generator().manual_seed(4)
    given = {"image": torch.rand(1, 3, 64, 64, generator=generator, dtype=torch.float64), "strength": 0.6}
    given |= {"mask_image": torch.ones(1, 1, 64, 64).double()} if "Inpaint" in name else {}
    prompts = [SOURCE, "a big dog on a house in winter"]

    def run(seeds):
        return draw_z_image(pipe, prompts, steps=5, latents=None, generator=seeds, **given)

    with editing(pipe, FreePromptEdit(0.8)):
        actual = run(torch.Generator().manual_seed(0))

    def rule(row, rows):
        return [(1.0, {"q_image": 0, "k_image": 0})] if row == 1 and state["step"] in (2, 3) else None

    images = given["image"].repeat(2, 1, 1, 1)  # a list of generators wants a picture for each
    given["image"] = images
    with dense_z_image(pipe, rule) as state:
        expected = run([torch.Generator().manual_seed(0) for _ in prompts])
    assert farthest(actual, expected) <= EXACT
    assert farthest(actual[1], run([torch.Generator().manual_seed(0) for _ in prompts])[1]) > 1e-4
