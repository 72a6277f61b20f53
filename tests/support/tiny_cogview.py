"""Tiny CogView 3 Plus and CogView 4 pipelines, and their layers written out densely."""

import diffusers
import torch
from diffusers import CogVideoXDDIMScheduler
from tokenizers import processors
from transformers import GlmConfig, GlmModel

from tests.support.edited_transformers import Model
from tests.support.tiny_cogvideox import DenseCogVideoX, dense_cogvideox
from tests.support.tiny_language import qwen_tokenizer
from tests.support.tiny_transformers import ExactEuler, sharpened, tiny_t5, tiny_vae

__all__ = ["COGVIEW", "COGVIEW3", "COGVIEW4", "DenseCogView4", "tiny_cogview4_that_reads"]

TEXTS = 12  # that CogView 3 Plus receives
_SIZE = {"num_attention_heads": 2, "attention_head_dim": 16, "time_embed_dim": 16, "text_embed_dim": 32}
_SIZE |= {"num_layers": 3, "condition_dim": 8, "sample_size": 8}


def tiny_cogview3_pipeline(pipe, dtype=torch.float64, vae=None, **config):
    """A CogView 3 Plus pipeline; its tokenizer is that of ``pipe``.

    Args:
        config: of its scheduler.
    """
    torch.manual_seed(0)
    model = diffusers.CogView3PlusTransformer2DModel(**_SIZE, pos_embed_max_size=8)
    tiny = diffusers.CogView3PlusPipeline(
        tokenizer=pipe.tokenizer,
        text_encoder=tiny_t5(pipe.tokenizer).to(dtype),
        vae=vae,
        transformer=sharpened(model).to(dtype).eval(),
        scheduler=CogVideoXDDIMScheduler(**config),
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def tiny_cogview3_that_decodes(pipe, dtype=torch.float64):
    """A CogView 3 Plus pipeline with an autoencoder, and its scheduler's settings as they are published."""
    vae = tiny_vae().to(dtype)
    vae.register_to_config(shift_factor=None)  # of which the pipeline would take no notice
    told = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return tiny_cogview3_pipeline(pipe, dtype, vae, **told)


def tiny_cogview4_pipeline(pipe=None, dtype=torch.float64, kind=diffusers.CogView4Pipeline, vae=None, **config):
    """A CogView 4 pipeline, whose tokenizer pads on the left."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    tokenizer.padding_side = "left"
    size = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    model = diffusers.CogView4Transformer2DModel(**_SIZE, rope_axes_dim=(16, 16), **config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f"{part}." in name for part in ("norm1.linear", "to_v", "to_out.0")):  # so that layers say something
                parameter.mul_(4)
    tiny = kind(
        tokenizer=tokenizer,
        text_encoder=GlmModel(GlmConfig(vocab_size=len(tokenizer), **size, **heads)).to(dtype).eval(),
        vae=vae,
        transformer=sharpened(model).to(dtype).eval(),
        scheduler=ExactEuler(),
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def tiny_cogview4_that_reads():
    """A CogView 4 pipeline with an autoencoder, whose texts begin with a token of their own, as GLM's do."""
    vae = tiny_vae().double()
    vae.register_to_config(shift_factor=None)  # of which the pipeline would take no notice
    tiny = tiny_cogview4_pipeline(vae=vae)
    tokenizer = tiny.tokenizer
    begins = [("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))]
    made = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=begins)
    tokenizer.backend_tokenizer.post_processor = made
    return tiny


def tiny_cogview4_control_pipeline(vae):
    """A CogView 4 pipeline whose transformer receives a control picture beside the latents."""
    made = {"kind": diffusers.CogView4ControlPipeline, "in_channels": 32, "out_channels": 16}
    return tiny_cogview4_pipeline(vae=vae, **made)


def draw_cogview(pipe, prompts, *, steps=4, size=(8, 8), guidance=3.0, seed=0, **options):
    """Latents [prompts, 16, h, w]; the rows start from the same noise."""
    noise = torch.randn(1, 16, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options.setdefault("latents", noise.to(pipe.transformer.dtype).repeat(len(prompts), 1, 1, 1))
    if isinstance(pipe, diffusers.CogView3PlusPipeline):
        options["max_sequence_length"] = TEXTS
    return pipe(
        list(prompts),
        negative_prompt=["a drawing"] * len(prompts),
        height=size[0] * 8,
        width=size[1] * 8,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
        **options,
    ).images


class DenseCogView4(DenseCogVideoX):
    parts_at = -2


class _CogView(Model):
    """The layers of CogVideoX for one frame."""

    def dense(self, pipe, rule, layers, fault):
        calls = 1 if self.is_doubled else 2
        made = DenseCogVideoX if self.is_doubled else DenseCogView4
        return dense_cogvideox(pipe, rule, layers=layers, fault=fault, calls=calls, made=made)


class _CogView4(_CogView):
    """Texts are as long as the longest, and then as a multiple of 16 tokens; all of the padding is on the left."""

    def texts(self, longest):
        return -(-longest // 16) * 16


COGVIEW3 = _CogView(tiny_cogview3_pipeline, draw_cogview, is_doubled=True, family="cogvideox")
COGVIEW4 = _CogView4(tiny_cogview4_pipeline, draw_cogview, family="cogview4")
COGVIEW = {"CogView 3 Plus": COGVIEW3, "CogView 4": COGVIEW4}
