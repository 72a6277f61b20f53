"""Tiny Ovis-Image, LongCat-Image and Bria pipelines: random weights, scaled so that attention is far from uniform."""

import diffusers
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3Config, Qwen3Model

from tests.support.edited_transformers import Model
from tests.support.tiny_language import qwen_tokenizer
from tests.support.tiny_transformers import FLUX, ExactEuler, sharpened, tiny_t5, tiny_vae, told_of_steps

__all__ = ["BRIA", "KIN", "LONGCAT", "OVIS", "TEXTS"]

TEXTS = 60  # tokens of every text that the model receives
_BLOCKS = {name: FLUX[name] for name in ("in_channels", "num_layers", "num_single_layers", "axes_dims_rope")}
_BLOCKS |= {name: FLUX[name] for name in ("attention_head_dim", "num_attention_heads", "joint_attention_dim")}
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
_READER = {"hidden_size": 32, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}


def _made(kind, transformer, dtype, **parts):
    torch.manual_seed(0)
    tiny = kind(
        transformer=sharpened(transformer(**_BLOCKS)).to(dtype).eval(),
        scheduler=ExactEuler(),
        vae=tiny_vae().to(dtype),
        **{name: part.to(dtype).eval() if isinstance(part, torch.nn.Module) else part for name, part in parts.items()},
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def tiny_ovis_pipeline(pipe=None, dtype=torch.float64):
    """An Ovis-Image pipeline, whose instruction ends where the prompt begins."""
    torch.manual_seed(2)
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = _CHAT
    config = Qwen3Config(vocab_size=len(tokenizer), num_hidden_layers=1, head_dim=8, **_READER)
    parts = {"text_encoder": Qwen3Model(config), "tokenizer": tokenizer}
    tiny = _made(diffusers.OvisImagePipeline, diffusers.OvisImageTransformer2DModel, dtype, **parts)
    tiny.system_prompt = "a photo: "
    before = OVIS.template(tiny)[0]
    tiny.user_prompt_begin_id = len(tokenizer(before.rstrip(" "))["input_ids"])
    return tiny


def tiny_longcat_pipeline(pipe=None, dtype=torch.float64):
    """A LongCat-Image pipeline whose texts are short."""
    torch.manual_seed(2)
    tokenizer = qwen_tokenizer()
    text = {"vocab_size": len(tokenizer), "num_hidden_layers": 1, "max_position_embeddings": 512, **_READER}
    text["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 32}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    parts = {"text_encoder": encoder, "tokenizer": tokenizer, "text_processor": None}
    tiny = _made(diffusers.LongCatImagePipeline, diffusers.LongCatImageTransformer2DModel, dtype, **parts)
    tiny.tokenizer_max_length = TEXTS
    return tiny


def tiny_bria_pipeline(pipe, dtype=torch.float64):
    """A Bria pipeline; its tokenizer is that of ``pipe``."""
    parts = {"text_encoder": tiny_t5(pipe.tokenizer), "tokenizer": pipe.tokenizer}
    return _made(diffusers.BriaPipeline, diffusers.BriaTransformer2DModel, dtype, **parts)


def _drawn(pipe, prompts, *, steps=4, size=(8, 8), seed=0, guidance=3.0, latents=None, **options):
    """Packed latents of any of these for prompts, which start from the same noise."""
    tokens = size[0] // 2 * (size[1] // 2)
    noise = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return pipe(
        list(prompts),
        negative_prompt=["a drawing"] * len(prompts),
        guidance_scale=guidance,
        latents=noise.repeat(len(prompts), 1, 1).to(pipe.transformer.dtype) if latents is None else latents,
        height=size[0] * 8,
        width=size[1] * 8,
        num_inference_steps=steps,
        output_type="latent",
        **options,
    ).images


def draw_ovis(pipe, prompts, **options):
    return _drawn(pipe, prompts, max_sequence_length=TEXTS, **options)


def draw_longcat(pipe, prompts, callback_on_step_end=None, **options):
    options = {"enable_prompt_rewrite": False, "enable_cfg_renorm": False, **options}
    with told_of_steps(pipe, callback_on_step_end):
        return _drawn(pipe, prompts, **options)


def draw_bria(pipe, prompts, **options):
    return _drawn(pipe, prompts, max_sequence_length=12, **options)


class _Reading(Model):
    """Prompts stand inside a text, and every text is padded to one length."""

    def texts(self, longest):
        return TEXTS


class _Ovis(_Reading):
    def template(self, pipe):
        said = [{"role": "user", "content": f"{pipe.system_prompt}{{}}"}]
        written = pipe.tokenizer.apply_chat_template(said, tokenize=False, enable_thinking=False)
        return *written.split("{}"), pipe.user_prompt_begin_id


class _LongCat(_Reading):
    def template(self, pipe):
        before = pipe.prompt_template_encode_prefix
        return before, "", len(pipe.tokenizer(before)["input_ids"])


OVIS = _Ovis(tiny_ovis_pipeline, draw_ovis, family="ovis")
LONGCAT = _LongCat(tiny_longcat_pipeline, draw_longcat, family="longcat")
BRIA = Model(tiny_bria_pipeline, draw_bria, is_doubled=True)
KIN = {"Ovis-Image": OVIS, "LongCat-Image": LONGCAT, "Bria": BRIA}
