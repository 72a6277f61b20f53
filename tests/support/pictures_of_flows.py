"""Families of flow models for tests of real images: their runs, latents and velocities, written out."""

import inspect
import math
from itertools import pairwise
from typing import ClassVar

import diffusers
import torch

from fpe_pipeline import FreePromptAuraFlowPipeline, FreePromptCogView4Pipeline
from tests.support.tiny_aura_flow import tiny_aura_flow_that_encodes
from tests.support.tiny_cogview import tiny_cogview4_that_reads

__all__ = ["FAMILIES", "NARROW", "SIZE", "SOURCE", "STEPS", "TARGET", "OnAuraFlow", "OnCogView4", "OnKrea2"]
__all__ += ["OnHunyuanImage", "OnIdeogram4", "OnKandinsky5", "shifted"]

SOURCE, TARGET = "a photo of a red car on a mountain", "a photo of a big dog on a house in winter"
SIZE, STEPS = {"height": 48, "width": 80}, 3
SHIFT = 3.0


def guided_by(scale, towards, away):
    """(z, σ) ↦ the velocity, of two of them."""
    if scale is None:
        return towards
    return lambda z, sigma: away(z, sigma) + scale * (towards(z, sigma) - away(z, sigma))


class OnCogView4:
    kind = FreePromptCogView4Pipeline
    options: ClassVar = {"max_sequence_length": 20}
    calls = (1.0, 0.5, 0.001)  # σ before they are shifted; the model is told these, in thousandths

    def __init__(self, pipe):
        self.stock = tiny_cogview4_that_reads()

    @classmethod
    def run(cls, scheduler):
        scheduler.set_timesteps(sigmas=list(cls.calls))

    @staticmethod
    def start(vae, pixels):
        """Latents as the model takes them."""
        return vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor

    @staticmethod
    def velocity(tiny, guidance=None):
        towards, away = (
            tiny.encode_prompt(text, None, False, max_sequence_length=20, dtype=torch.float64)[0]
            for text in (SOURCE, "")
        )
        nodes = [*map(shifted, OnCogView4.calls), 0.0]
        told = [1000.0, 500.0, 1.0, 0.0]
        nodes += [(now + then) / 2 for now, then in pairwise(nodes)]
        told += [(now + then) / 2 for now, then in pairwise(told)]

        def of(texts):
            sizes = {name: torch.tensor([[48.0, 80.0]]) for name in ("original_size", "target_size")}

            def velocity(z, sigma):
                nearest = min(range(len(nodes)), key=lambda place: abs(nodes[place] - sigma))
                return tiny.transformer(
                    z,
                    encoder_hidden_states=texts,
                    timestep=torch.tensor([told[nearest]]),
                    crop_coords=torch.zeros(1, 2).double(),
                    **{name: size.double() for name, size in sizes.items()},
                ).sample

            return velocity

        return guided_by(guidance, of(towards), of(away))


class OnAuraFlow:
    kind = FreePromptAuraFlowPipeline
    options: ClassVar = {"max_sequence_length": 20}

    def __init__(self, pipe):
        self.stock = tiny_aura_flow_that_encodes(pipe)

    @staticmethod
    def run(scheduler):
        """σ is the scheduler's own."""
        scheduler.set_timesteps(STEPS)

    @staticmethod
    def start(vae, pixels):
        return vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor

    @staticmethod
    def velocity(tiny, guidance=None):
        towards, away = (tiny.encode_prompt(text, None, False, max_sequence_length=20)[0] for text in (SOURCE, ""))

        def of(texts):
            def velocity(z, sigma):
                timestep = (1000 * sigma / 1000).expand(1).double()
                return tiny.transformer(z, encoder_hidden_states=texts, timestep=timestep).sample

            return velocity

        return guided_by(guidance, of(towards), of(away))


class OnKrea2:
    options: ClassVar = {"max_sequence_length": 40}

    def __init__(self, pipe):
        from fpe_pipeline import FreePromptKrea2Pipeline
        from tests.support.tiny_krea2 import tiny_krea2_pipeline

        self.kind, self.stock = FreePromptKrea2Pipeline, tiny_krea2_pipeline()

    @staticmethod
    def run(scheduler):
        scheduler.set_timesteps(sigmas=[1.0, 2 / 3, 1 / 3])

    @staticmethod
    def start(vae, pixels):
        """2 x 2 to a token, normalised by channel, of a video of one frame."""
        mean = vae.encode(pixels[:, :, None]).latent_dist.mean[0, :, 0]
        parts = zip(mean, vae.config.latents_mean, vae.config.latents_std, strict=True)
        latents = torch.stack([(part - shift) / spread for part, shift, spread in parts])
        return latents.reshape(16, 3, 2, 5, 2).permute(1, 3, 0, 2, 4).reshape(1, 15, 64)

    @staticmethod
    def velocity(tiny):
        texts, mask = tiny.get_text_hidden_states(SOURCE, max_sequence_length=40)
        grid = torch.stack(torch.meshgrid(torch.arange(3.0), torch.arange(5.0), indexing="ij"), -1).reshape(15, 2)
        places = torch.cat([torch.zeros(40, 3), torch.nn.functional.pad(grid, (1, 0))])

        def velocity(z, sigma):
            timestep = (1000 * sigma / 1000).expand(1).double()
            given = {"encoder_hidden_states": texts, "encoder_attention_mask": mask, "position_ids": places}
            return tiny.transformer(z, timestep=timestep, **given).sample

        return velocity


class OnIdeogram4:
    """Guided by a model of its own that sees no text, from the same latents."""

    options: ClassVar = {"max_sequence_length": 40}
    guided: ClassVar = {"guidance_scale": 3.0}

    def __init__(self, pipe):
        from fpe_pipeline import FreePromptIdeogram4Pipeline
        from tests.support.tiny_ideogram4 import tiny_ideogram4_pipeline

        self.kind, self.stock = FreePromptIdeogram4Pipeline, tiny_ideogram4_pipeline()
        seen, generator = self.stock.vae.bn, torch.Generator().manual_seed(7)
        seen.running_mean.copy_(torch.randn(16, generator=generator) * 0.1)
        seen.running_var.copy_(torch.rand(16, generator=generator) + 0.1)

    @staticmethod
    def told_by_calls(options, solver):
        """What diffusers' pipeline, which counts calls, takes for the same; it looks at how many steps there are."""

        class OfCalls(list):
            def __len__(self):
                return 2 if inspect.stack()[1].function == "check_inputs" else super().__len__()

        calls = {"euler": 2, "rf-solver": 4, "fireflow": 3}[solver]
        return options | {"guidance_scale": None, "guidance_schedule": OfCalls([options["guidance_scale"]] * calls)}

    @staticmethod
    def run(scheduler):
        """Quantiles of a normal distribution that is wider in larger images, in log-odds."""
        normal = torch.distributions.Normal(math.log(48 * 80 / 512**2) / 2, 1.5)
        odds = [9.0, *normal.icdf(torch.tensor([2 / 3, 1 / 3], dtype=torch.float64)).tolist()]
        scheduler.set_timesteps(sigmas=torch.tensor(odds, dtype=torch.float64).sigmoid().to(torch.float32).tolist())

    @staticmethod
    def start(vae, pixels):
        """2 x 2 to a token, place by place, normalised by what the autoencoder saw."""
        mean = vae.encode(pixels).latent_dist.mean.reshape(4, 3, 2, 5, 2)
        tokens = torch.stack([mean[:, :, up, :, left] for up in (0, 1) for left in (0, 1)]).reshape(16, 15).T
        return ((tokens - vae.bn.running_mean) / (vae.bn.running_var + vae.config.batch_norm_eps).sqrt())[None]

    @staticmethod
    def velocity(tiny, guidance=None):
        texts, places, segments, kinds = tiny.encode_prompt(SOURCE, 3, 5, 40, torch.device("cpu"))

        def of(model, texts, since):
            given = {"encoder_hidden_states": texts.double(), "position_ids": places[:, since:]}
            given |= {"segment_ids": segments[:, since:], "indicator": kinds[:, since:]}

            def velocity(z, sigma):
                sequence = torch.nn.functional.pad(z, (0, 0, 40 - since, 0))
                timestep = (1 - 1000 * sigma / 1000).expand(1).double()
                return -model(sequence, timestep=timestep, **given).sample[:, 40 - since :]

            return velocity

        towards = of(tiny.transformer, texts, 0)
        return guided_by(guidance, towards, of(tiny.unconditional_transformer, torch.zeros_like(texts[:, 40:]), 40))


class OnNucleus:
    """Guided by the empty prompt, to tokens as long as those without."""

    options: ClassVar = {}

    def __init__(self, pipe):
        from fpe_pipeline import FreePromptNucleusMoEImagePipeline
        from tests.support.tiny_nucleus import tiny_nucleus_pipeline

        self.kind, self.stock = FreePromptNucleusMoEImagePipeline, tiny_nucleus_pipeline(saves=True)

    @staticmethod
    def run(scheduler):
        scheduler.set_timesteps(sigmas=[1.0, 2 / 3, 1 / 3])

    start = staticmethod(OnKrea2.start)

    @staticmethod
    def velocity(tiny, guidance=None):
        def of(text):
            texts, mask = tiny.encode_prompt(text)
            given = {"encoder_hidden_states": texts, "encoder_hidden_states_mask": mask, "img_shapes": [(1, 3, 5)]}

            def velocity(z, sigma):
                return -tiny.transformer(z, timestep=(1000 * sigma).expand(1).double() / 1000, **given).sample

            return velocity

        towards = of(SOURCE)
        guided = guided_by(guidance, towards, of(""))
        if guidance is None:
            return towards

        def scaled(z, sigma):
            velocity = guided(z, sigma)
            return velocity * (towards(z, sigma).norm(dim=-1, keepdim=True) / velocity.norm(dim=-1, keepdim=True))

        return scaled


class OnHunyuanImage:
    """Guided by the guider of its pipeline."""

    options: ClassVar = {}
    guided: ClassVar = {"negative_prompt": "a drawing", "guidance_scale": 3.0}

    def __init__(self, pipe):
        from fpe_pipeline import FreePromptHunyuanImagePipeline
        from tests.support.tiny_hunyuan_guided import tiny_hunyuan_image_pipeline

        self.kind, self.stock = FreePromptHunyuanImagePipeline, tiny_hunyuan_image_pipeline(decodes=True)

    def told_by_calls(self, options, solver):
        """diffusers' pipeline has the scale in its guider."""
        self.stock.guider = diffusers.ClassifierFreeGuidance(guidance_scale=options["guidance_scale"])
        return {name: given for name, given in options.items() if name != "guidance_scale"}

    @staticmethod
    def run(scheduler):
        scheduler.set_timesteps(sigmas=[1.0, 2 / 3, 1 / 3])

    @staticmethod
    def start(vae, pixels):
        return vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor

    @staticmethod
    def velocity(tiny, guidance=None):
        def of(text):
            texts, mask, quoted, quoted_mask = tiny.encode_prompt(text)
            given = {"encoder_hidden_states": texts, "encoder_attention_mask": mask}
            given |= {"encoder_hidden_states_2": quoted.double(), "encoder_attention_mask_2": quoted_mask}

            def velocity(z, sigma):
                return tiny.transformer(z, timestep=(1000 * sigma).expand(1).double(), **given).sample

            return velocity

        return guided_by(guidance, of(SOURCE), of(""))


class OnKandinsky5:
    """Latents have their channels last; the autoencoder's shift stays."""

    options: ClassVar = {}
    target = "a photo of a big dog on a mountain"  # as long as the source, whose text would be padded beside a longer

    def __init__(self, pipe):
        from fpe_pipeline import FreePromptKandinsky5T2IPipeline
        from tests.support.tiny_kandinsky5 import tiny_kandinsky5_pipeline, with_a_plain_tokenizer

        self.kind = FreePromptKandinsky5T2IPipeline
        self.stock = with_a_plain_tokenizer(tiny_kandinsky5_pipeline(pipe, decodes=True, sizes=[(80, 48), (160, 96)]))

    @staticmethod
    def run(scheduler):
        """σ is the scheduler's own."""
        scheduler.set_timesteps(STEPS)

    @staticmethod
    def start(vae, pixels):
        return (vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor).permute(0, 2, 3, 1)[None]

    @staticmethod
    def velocity(tiny, guidance=None):
        places = [torch.arange(1), torch.arange(3), torch.arange(5)]

        def of(text):
            texts, pooled, _ = tiny.encode_prompt(text)
            given = {"encoder_hidden_states": texts, "pooled_projections": pooled, "visual_rope_pos": places}
            given |= {"text_rope_pos": torch.arange(texts.shape[1]), "scale_factor": [1.0, 1.0, 1.0]}

            def velocity(z, sigma):
                return tiny.transformer(z, timestep=(1000 * sigma).expand(1).double(), **given).sample

            return velocity

        return guided_by(guidance, of(SOURCE), of(""))


class OnBriaFibo:
    """Guided in one call, whose texts are as long as the longest of both; every block reads another layer of them."""

    options: ClassVar = {}

    def __init__(self, pipe):
        from fpe_pipeline import FreePromptBriaFiboPipeline
        from tests.support.tiny_bria_fibo import tiny_fibo_pipeline

        self.kind, self.stock = FreePromptBriaFiboPipeline, tiny_fibo_pipeline(decodes=True)

    @staticmethod
    def run(scheduler):
        scheduler.set_timesteps(sigmas=[1.0, 2 / 3, 1 / 3])

    @staticmethod
    def start(vae, pixels):
        """A latent to a token, normalised by channel, of a video of one frame."""
        mean = vae.encode(pixels[:, :, None]).latent_dist.mean[0, :, 0]
        parts = zip(mean, vae.config.latents_mean, vae.config.latents_std, strict=True)
        return torch.stack([((part - shift) / spread).flatten() for part, shift, spread in parts]).T[None]

    @staticmethod
    def velocity(tiny, guidance=None):
        grid = torch.stack(torch.meshgrid(torch.arange(3.0), torch.arange(5.0), indexing="ij"), -1).reshape(15, 2)
        places = torch.nn.functional.pad(grid, (1, 0)).double()

        def of(text):
            texts, layers, _ = tiny.get_prompt_embeds(text)
            given = {"encoder_hidden_states": texts, "text_encoder_layers": list(layers[-3:])}
            given |= {"txt_ids": torch.zeros(texts.shape[1], 3).double(), "img_ids": places}

            def velocity(z, sigma):
                return tiny.transformer(z, timestep=(1000 * sigma).expand(1).double(), **given).sample

            return velocity

        return guided_by(guidance, of(SOURCE), of(""))


def shifted(share):
    return SHIFT * share / (1 + (SHIFT - 1) * share)


FAMILIES = {"CogView 4": OnCogView4, "AuraFlow": OnAuraFlow}
if hasattr(diffusers, "Krea2Pipeline"):
    FAMILIES["Krea 2"] = OnKrea2


if hasattr(diffusers, "NucleusMoEImagePipeline"):
    FAMILIES["Nucleus-Image"] = OnNucleus
NARROW = ()
if hasattr(diffusers, "HunyuanImagePipeline"):
    FAMILIES["HunyuanImage"] = OnHunyuanImage
if hasattr(diffusers, "BriaFiboPipeline"):
    FAMILIES["Bria FIBO"] = OnBriaFibo
if hasattr(diffusers, "Kandinsky5T2IPipeline"):
    from diffusers.models.transformers import transformer_kandinsky

    FAMILIES["Kandinsky 5"], NARROW = OnKandinsky5, (*NARROW, transformer_kandinsky)
if hasattr(diffusers, "Ideogram4Pipeline"):
    from diffusers.models.transformers import transformer_ideogram4
    from diffusers.pipelines.ideogram4 import pipeline_ideogram4

    FAMILIES["Ideogram 4"], NARROW = OnIdeogram4, (*NARROW, pipeline_ideogram4, transformer_ideogram4)
