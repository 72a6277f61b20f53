"""Real images come back from their inversion as well as the embedded model's autoencoder can draw them.

The autoencoder bounds every inversion, so what holds the source to its photo is measured against its own picture.
"""

import numpy as np
import pytest
import torch

from fpe_pipeline import FreePromptPipeline
from fpe_pipeline.embedded import embedded_path
from fpe_pipeline.quality import held_out_pairs, render_subjects
from fpe_pipeline.quality.similarity import psnr

STEPS = 10
# Of each kind of edit a scene that the model was not trained on.
SCENES = held_out_pairs(1)


@pytest.fixture(scope="module")
def embedded():
    pipe = FreePromptPipeline.from_pretrained(embedded_path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def autoencoded(pipe, inversion):
    with torch.no_grad():
        image = pipe.vae.decode(inversion.latents[0] / pipe.vae.config.scaling_factor).sample
    return np.asarray(pipe.image_processor.postprocess(image)[0])


@pytest.mark.slow
@pytest.mark.parametrize(("method", "beside_autoencoder"), [("ddim", 45), ("direct", 59)])
def test_scenes_come_back_at_the_guidance_of_an_edit(embedded, method, beside_autoencoder):
    found, possible = [], []
    for scene in render_subjects(SCENES, embedded.native_size[0]):
        inversion = embedded.invert(scene.picture, scene.source_prompt, num_inference_steps=STEPS, method=method)
        photo, source = np.asarray(inversion.image), np.asarray(embedded(inversion=inversion).source)
        best = autoencoded(embedded, inversion)
        found.append(psnr(photo, source))
        possible.append(psnr(photo, best))
        assert psnr(source, best) >= beside_autoencoder, scene.name
    # Not one of them is worse than its autoencoder by more than can be seen.
    assert np.max(np.subtract(possible, found)) <= 0.25


@pytest.mark.slow
def test_another_noise_does_not_bring_it_back(embedded):
    scene = render_subjects(SCENES[:1], embedded.native_size[0])[0]
    config = embedded.unet.config
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    drawn = embedded(scene.source_prompt, latents=noise, num_inference_steps=STEPS).source
    assert psnr(scene.picture, np.asarray(drawn)) < 20
