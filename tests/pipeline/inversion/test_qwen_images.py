"""Real images on Qwen-Image: inverted by the papers' formulas, edited, saved, decoded, and what is refused."""

import pytest
import torch
from PIL import Image

from fpe_pipeline import FreePromptEdit, FreePromptPipeline, FreePromptQwenImagePipeline, Inversion, flow_scheduler
from fpe_pipeline.inversion.flow import invert_flow
from fpe_pipeline.sampling.decoding import decoded
from tests.support.dense_rows import wide
from tests.support.flow_formulas import path_to_noise
from tests.support.slow_cases import few
from tests.support.tiny_language import tiny_qwen_that_reads
from tests.support.tiny_transformers import ExactEuler

EXACT = 1e-8
SOURCE, TARGET = "a photo of a red car on a mountain", "a photo of a big dog on a house in winter"
SIZE = {"height": 48, "width": 80}
SOLVERS = ["euler", "rf-solver", "fireflow"]


@pytest.fixture(autouse=True)
def _wide():
    with wide():
        yield


@pytest.fixture(scope="module")
def stock():
    return tiny_qwen_that_reads()


@pytest.fixture
def tiny(stock):
    made = FreePromptPipeline.from_pipe(stock)
    made.prompt_template_encode_start_idx = stock.prompt_template_encode_start_idx  # of the tiny tokenizer
    made.scheduler = ExactEuler(shift=3.0)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def photo():
    return torch.rand(3, 48, 80, generator=torch.Generator().manual_seed(3)).permute(1, 2, 0).numpy()


def solving(tiny, solver):
    tiny.scheduler = tiny.scheduler if solver == "euler" else flow_scheduler(tiny.scheduler, solver)
    return tiny


def start(tiny, photo):
    """The photo as the model takes it: of the autoencoder's mean, normalised by channel, 2 x 2 to a token."""
    pixels = (torch.from_numpy(photo * 255).round().float() / 127.5 - 1).permute(2, 0, 1)[None, :, None].double()
    mean = tiny.vae.encode(pixels).latent_dist.mean[0, :, 0]
    config = tiny.vae.config
    parts = zip(mean, config.latents_mean, config.latents_std, strict=True)
    latents = torch.stack([(part - shift) / spread for part, shift, spread in parts])
    channels, height, width = latents.shape
    tokens = latents.reshape(channels, height // 2, 2, width // 2, 2).permute(1, 3, 0, 2, 4)
    return tokens.reshape(1, -1, 4 * channels)


@pytest.mark.parametrize("solver", few(SOLVERS, "fireflow"))
def test_the_papers_formulas(tiny, photo, solver):
    inversion = solving(tiny, solver).invert(photo, SOURCE, num_inference_steps=3, **SIZE)
    tiny.scheduler.set_timesteps(sigmas=[1.0, 2 / 3, 1 / 3], mu=0.5)
    nodes = ExactEuler(shift=3.0)
    nodes.set_timesteps(sigmas=[1.0, 2 / 3, 1 / 3])
    texts, mask = tiny.encode_prompt(SOURCE)

    def velocity(z, sigma):
        timestep = (1000 * sigma).double().expand(1) / 1000
        given = {"encoder_hidden_states": texts, "encoder_hidden_states_mask": mask, "img_shapes": [[(1, 3, 5)]]}
        return tiny.transformer(z, timestep=timestep, **given).sample

    with torch.no_grad():
        expected = path_to_noise(start(tiny, photo), velocity, nodes.sigmas, solver)
    assert (inversion.latents - expected).abs().max() <= EXACT


@pytest.mark.parametrize("method", few(["direct", "reference", "free"]))
def test_what_holds_the_source(tiny, photo, method):
    inversion = tiny.invert(photo, SOURCE, num_inference_steps=3, method=method, **SIZE)
    guided = {"negative_prompt": "a drawing", "true_cfg_scale": 3.0, "output_type": "latent"}
    out = tiny(inversion=inversion, target_prompt=TARGET, self_replace_steps=0.5, **guided)
    apart = (out.source - inversion.latents[0]).abs().max()
    assert bool(apart == 0) is (method == "direct")
    assert (out.targets[0] - out.source).abs().max() > 1e-3


@pytest.mark.slow
def test_pictures_and_files(stock, tiny, photo, tmp_path):
    assert type(tiny) is FreePromptQwenImagePipeline
    inversion = tiny.invert(photo, SOURCE, num_inference_steps=2, **SIZE)
    loaded = Inversion.load(inversion.save(tmp_path / "inversion.safetensors"))
    options = {"self_replace_steps": 0.5, "negative_prompt": "a drawing"}
    out, again = (tiny(inversion=one, target_prompt=TARGET, **options) for one in (inversion, loaded))
    assert [image.size for image in out.images] == [(80, 48)] * 2
    assert out.images[1].tobytes() == again.images[1].tobytes()
    latents = tiny(inversion=inversion, target_prompt=TARGET, output_type="latent", **options).images
    assert decoded(tiny, latents, (48, 80))[1].tobytes() == out.images[1].tobytes()
    options |= {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    generated = tiny(SOURCE, TARGET, **options, **SIZE)
    assert generated.source.size == (80, 48) and generated.report.layers


class TestRefusals:
    def test_guided_inversions(self, tiny, photo):
        with pytest.raises(ValueError, match="an inversion has none of, got guidance_scale=3: leave it at 1"):
            tiny.invert(photo, SOURCE, guidance_scale=3.0, num_inference_steps=2, **SIZE)

    def test_a_source_that_is_dropped(self, tiny):
        with pytest.raises(ValueError, match="keeps masks of padding to itself"):
            tiny(SOURCE, TARGET, keep_source=False)

    def test_a_size_between_tokens(self, tiny):
        with pytest.raises(ValueError, match="positive multiple of 16"):
            tiny(SOURCE, TARGET, height=40, width=64)

    def test_solvers(self, stock):
        """A stock pipeline is inverted with too, by a scheduler whose steps can be undone."""
        stock.scheduler = ExactEuler(stochastic_sampling=True)
        try:
            with pytest.raises(ValueError, match="flow_scheduler"):
                invert_flow(stock, Image.new("RGB", (64, 64)))
        finally:
            stock.scheduler = ExactEuler()


@pytest.mark.slow
def test_equal_bits_for_equal_seeds(tiny):
    options = {"num_inference_steps": 2, "output_type": "latent", **SIZE, "edit": FreePromptEdit(1.0)}
    first, second = (tiny(SOURCE, TARGET, generator=torch.Generator().manual_seed(5), **options) for _ in range(2))
    assert torch.equal(first.images, second.images)
