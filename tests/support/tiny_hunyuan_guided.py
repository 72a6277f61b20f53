"""Tiny HunyuanVideo 1.5 and HunyuanImage 2.1 pipelines, and their layers written out densely."""

import diffusers
import torch
from diffusers.guiders import ClassifierFreeGuidance
from transformers import ByT5Tokenizer, Qwen2_5_VLTextConfig, T5Config, T5EncoderModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from tests.support.edited_transformers import Model
from tests.support.tiny_hunyuan_video import DenseHunyuanVideo15, dense_hunyuan_video
from tests.support.tiny_language import qwen_tokenizer
from tests.support.tiny_transformers import ExactEuler, sharpened, told_of_steps

__all__ = ["HUNYUAN_IMAGE", "HUNYUAN_VIDEO15"]

TEXT, QUOTED, PICTURE = 60, 12, 3  # tokens that the models receive of each

_SIZE = {
    "in_channels": 65,
    "out_channels": 32,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 3,
    "num_refiner_layers": 1,
    "mlp_ratio": 1.0,
    "text_embed_dim": 16,
    "text_embed_2_dim": 16,
    "image_embed_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}
_CHAT = "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>\n{% endfor %}"


def tiny_hunyuan_video15_pipeline(pipe=None, dtype=torch.float64, guidance=3.0):
    """A HunyuanVideo 1.5 pipeline whose texts are short."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = _CHAT
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    glyphs = T5Config(vocab_size=400, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    tiny = diffusers.HunyuanVideo15Pipeline(
        text_encoder=Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(vocab_size=len(tokenizer), **text)).to(dtype).eval(),
        tokenizer=tokenizer,
        transformer=sharpened(diffusers.HunyuanVideo15Transformer3DModel(**_SIZE)).to(dtype).eval(),
        vae=diffusers.AutoencoderKLHunyuanVideo15(block_out_channels=(32, 32, 32, 32, 32), layers_per_block=1).to(
            dtype
        ),
        scheduler=ExactEuler(),
        text_encoder_2=T5EncoderModel(glyphs).to(dtype).eval(),
        tokenizer_2=ByT5Tokenizer(),
        guider=ClassifierFreeGuidance(guidance_scale=guidance),
    )
    tiny.system_message = "a photo"
    tiny.prompt_template_encode_start_idx = len(tokenizer("<|im_start|>a photo<|im_end|>\n<|im_start|>")["input_ids"])
    tiny.tokenizer_max_length, tiny.tokenizer_2_max_length, tiny.vision_num_semantic_tokens = TEXT, QUOTED, PICTURE
    tiny.set_progress_bar_config(disable=True)
    return tiny


def draw_hunyuan_video15(
    pipe, prompts, *, steps=4, size=(8, 8), frames=2, seed=0, callback_on_step_end=None, **options
):
    """Latents [prompts, 32, frames, h, w]; the rows start from the same noise."""
    noise = torch.randn(1, 32, frames, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options.setdefault("latents", noise.repeat(len(prompts), 1, 1, 1, 1))
    with told_of_steps(pipe, callback_on_step_end):
        return pipe(
            list(prompts),
            negative_prompt=["a drawing"] * len(prompts),
            height=size[0] * 16,
            width=size[1] * 16,
            num_frames=4 * frames - 3,
            num_inference_steps=steps,
            output_type="latent",
            **options,
        ).frames


class _HunyuanVideo15(Model):
    """All frames stand in one sequence, before the text; each token is of one latent."""

    def dense(self, pipe, rule, layers, fault):
        return dense_hunyuan_video(pipe, rule, layers=layers, fault=fault, dense=DenseHunyuanVideo15)

    def template(self, pipe):
        return f"<|im_start|>{pipe.system_message}<|im_end|>\n<|im_start|>", "", pipe.prompt_template_encode_start_idx

    def texts(self, longest):
        return TEXT + QUOTED + PICTURE


HUNYUAN_VIDEO15 = _HunyuanVideo15(tiny_hunyuan_video15_pipeline, draw_hunyuan_video15, family="hunyuan_video15")


_IMAGE = {name: size for name, size in _SIZE.items() if name not in ("image_embed_dim", "in_channels", "out_channels")}
_IMAGE |= {"in_channels": 8, "out_channels": 8, "num_layers": 1, "num_single_layers": 2, "rope_axes_dim": (8, 8)}
_AUTOENCODER = {"in_channels": 3, "out_channels": 3, "latent_channels": 8, "block_out_channels": (32, 32, 32, 32)}
_AUTOENCODER |= {"layers_per_block": 1, "spatial_compression_ratio": 8, "sample_size": 64, "scaling_factor": 0.75}


def tiny_hunyuan_image_pipeline(pipe=None, dtype=torch.float64, guider=None, decodes=False, **config):
    """A HunyuanImage 2.1 pipeline whose texts are short.

    Args:
        decodes: whether it has an autoencoder, of 8 pixels a latent; else it counts 32 of them.
        config: of its transformer.
    """
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    glyphs = T5Config(vocab_size=400, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    tiny = diffusers.HunyuanImagePipeline(
        text_encoder=Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(vocab_size=len(tokenizer), **text)).to(dtype).eval(),
        tokenizer=tokenizer,
        transformer=sharpened(diffusers.HunyuanImageTransformer2DModel(**_IMAGE, **config)).to(dtype).eval(),
        vae=diffusers.AutoencoderKLHunyuanImage(**_AUTOENCODER).to(dtype).eval() if decodes else None,
        scheduler=ExactEuler(),
        text_encoder_2=T5EncoderModel(glyphs).to(dtype).eval(),
        tokenizer_2=ByT5Tokenizer(),
        guider=guider or ClassifierFreeGuidance(guidance_scale=3.0),
    )
    tiny.prompt_template_encode = "<|im_start|>a photo<|im_end|>\n<|im_start|>{}<|im_end|>"
    before = tiny.prompt_template_encode.partition("{}")[0]
    tiny.prompt_template_encode_start_idx = len(tokenizer(before)["input_ids"])
    tiny.tokenizer_max_length, tiny.tokenizer_2_max_length = TEXT, QUOTED
    tiny.set_progress_bar_config(disable=True)
    return tiny


def draw_hunyuan_image(pipe, prompts, *, steps=4, size=(8, 8), seed=0, **options):
    """Latents [prompts, 8, h, w]; the rows start from the same noise."""
    noise = torch.randn(1, 8, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options.setdefault("latents", noise.repeat(len(prompts), 1, 1, 1))
    return pipe(
        list(prompts),
        negative_prompt=["a drawing"] * len(prompts),
        height=size[0] * 32,
        width=size[1] * 32,
        num_inference_steps=steps,
        output_type="latent",
        **options,
    ).images


class DenseHunyuanImage(DenseHunyuanVideo15):
    """Layers are told of the image's keys too."""

    def of_texts(self, mask, tokens):
        return mask[:, 0, 0, tokens:].bool()


class _HunyuanImage(_HunyuanVideo15):
    def dense(self, pipe, rule, layers, fault):
        return dense_hunyuan_video(pipe, rule, layers=layers, fault=fault, dense=DenseHunyuanImage)

    def template(self, pipe):
        before, _, after = pipe.prompt_template_encode.partition("{}")
        return before, after, pipe.prompt_template_encode_start_idx

    def texts(self, longest):
        return TEXT + QUOTED


HUNYUAN_IMAGE = _HunyuanImage(tiny_hunyuan_image_pipeline, draw_hunyuan_image, family="hunyuan_video")
