"""Tiny pipelines of Cosmos Predict 2 and of Anima, and their layers written out densely."""

import sys

import diffusers
import torch
from diffusers import AutoencoderKLWan, CosmosTransformer3DModel
from PIL import Image
from transformers import Qwen3Config, Qwen3Model

from tests.support.dense_rows import DenseRows, dense_rows
from tests.support.tiny_language import qwen_tokenizer
from tests.support.tiny_transformers import ExactEuler, sharpened, tiny_t5, told_of_steps
from tests.support.wide_torch import widened

PROMPTS = [
    "a photo of a red car on a mountain",
    "a photo of a big dog on a mountain",
    "a photo of a red car on a house",
    "a photo of a big car on a mountain",
]
TEXTS = 24
_WIDTH = 32  # of texts
_SIZE = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "num_layers": 2,
    "mlp_ratio": 1.0,
    "text_embed_dim": _WIDTH,
    "adaln_lora_dim": 8,
    "max_size": (8, 32, 32),
    "extra_pos_embed_type": None,
    "concat_padding_mask": False,  # which would be scaled by torchvision
}


class _Guard:
    """What looks at prompts and pictures, and lets everything pass."""

    def to(self, device):
        return self

    def check_text_safety(self, text):
        return True


def tiny_cosmos(dtype=torch.float64, **config):
    """A Cosmos transformer."""
    torch.manual_seed(0)
    model = sharpened(CosmosTransformer3DModel(**_SIZE | config), ("to_q", "to_k", "norm_q", "norm_k"))
    return model.to(dtype).eval()


def tiny_cosmos_pipeline(pipe, dtype=torch.float64, kind="Cosmos2TextToImagePipeline", vae=None, **config):
    """A pipeline without a decoder, unless one is given."""
    torch.manual_seed(1)
    tiny = getattr(diffusers, kind)(
        text_encoder=tiny_t5(pipe.tokenizer).to(dtype),
        tokenizer=pipe.tokenizer,
        transformer=tiny_cosmos(dtype, **config),
        vae=vae,
        scheduler=ExactEuler(use_karras_sigmas=True),
        safety_checker=_Guard(),
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def tiny_cosmos_videos(pipe, dtype=torch.float64):
    """A pipeline of videos that go on from a picture."""
    torch.manual_seed(3)
    size = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    size |= {"latents_mean": [0.1] * 4, "latents_std": [0.5] * 4}
    vae = AutoencoderKLWan(**size, temperal_downsample=[False, True, True]).to(dtype).eval()
    return tiny_cosmos_pipeline(pipe, dtype, "Cosmos2VideoToWorldPipeline", vae, in_channels=5)


def tiny_cosmos25_pipeline(pipe, dtype=torch.float64):
    """A pipeline of Cosmos Predict 2.5, which encodes nothing."""
    torch.manual_seed(3)
    known = {"latents_mean": [0.1] * 4, "latents_std": [0.5] * 4}
    vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **known).to(dtype).eval()
    return tiny_cosmos_pipeline(pipe, dtype, "Cosmos2_5_PredictBasePipeline", vae, in_channels=5)


def tiny_anima(pipe, dtype=torch.float64):
    """A modular pipeline without a decoder."""
    from diffusers import AnimaTextConditioner, ClassifierFreeGuidance
    from diffusers.modular_pipelines import AnimaAutoBlocks

    blocks = AnimaAutoBlocks()
    for name in ("vae_encoder", "decode"):
        blocks.sub_blocks.pop(name, None)
    made = blocks.init_pipeline()
    torch.manual_seed(2)
    tokenizer = qwen_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 512}
    conditioner = AnimaTextConditioner(
        source_dim=16,
        target_dim=_WIDTH,
        model_dim=_WIDTH,
        num_layers=1,
        num_attention_heads=2,
        mlp_ratio=1.0,
        target_vocab_size=len(pipe.tokenizer),
        min_sequence_length=TEXTS,
    )
    made.update_components(
        text_encoder=Qwen3Model(Qwen3Config(**text)).to(dtype).eval(),
        tokenizer=tokenizer,
        t5_tokenizer=pipe.tokenizer,
        text_conditioner=conditioner.to(dtype).eval(),
        transformer=tiny_cosmos(dtype),
        scheduler=ExactEuler(),
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
    )
    made.set_progress_bar_config(disable=True)
    return made


def draw_cosmos(pipe, prompts=2, *, steps=4, size=(8, 8), frames=1, seed=0, callback_on_step_end=None, **options):
    """Latents [prompts, 4, frames, h, w] of each kind; the rows start from the same noise, and the same picture."""
    texts = PROMPTS[:prompts] if isinstance(prompts, int) else list(prompts)
    noise = torch.randn(1, 4, frames, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options.setdefault("latents", noise.repeat(len(texts), 1, 1, 1, 1))
    options |= {"height": size[0] * 8, "width": size[1] * 8, "num_inference_steps": steps}
    options |= {"prompt": texts, "max_sequence_length": TEXTS}
    narrows = [sys.modules[type(pipe.transformer).__module__], sys.modules[type(pipe).__module__]]
    if hasattr(pipe, "text_conditioner"):
        from diffusers.modular_pipelines.anima import before_denoise

        with widened(*narrows, before_denoise), told_of_steps(pipe, callback_on_step_end):
            return pipe(output="latents", **options)
    options.setdefault("guidance_scale", 3.0)
    told = {"negative_prompt": ["a drawing"] * len(texts)}
    if type(pipe).__name__ == "Cosmos2VideoToWorldPipeline":
        options.setdefault("image", [Image.new("RGB", (size[1] * 8, size[0] * 8), (200, 90, 20))] * len(texts))
        options.setdefault("generator", [torch.Generator().manual_seed(seed) for _ in texts])
    if type(pipe).__name__ != "Cosmos2TextToImagePipeline":
        options["num_frames"] = 4 * frames - 3
    if "prompt_embeds" in options:
        told["prompt"] = told["negative_prompt"] = None
    with widened(*narrows), told_of_steps(pipe, callback_on_step_end):
        return pipe(output_type="latent", return_dict=False, **options | told)[0]


class DenseCosmos(DenseRows):
    """The layers of Cosmos: norms of each head, turns of its halves, and a picture beside the text."""

    def __init__(self, rule):
        super().__init__(rule, turn=turned)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        self.tokens = hidden_states
        return super().__call__(attn, hidden_states, encoder_hidden_states, None, image_rotary_emb)

    def split(self, attn, tokens):
        return tokens[::-1] if isinstance(tokens, tuple) else (None, tokens)

    def of_picture(self, attn, query, picture):
        query, key, value = (
            layer(tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, tokens in ((attn.q_img, self.tokens), (attn.k_img, picture), (attn.v_img, picture))
        )
        query, key = attn.q_img_norm(query), attn.k_img_norm(key)
        return (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1) @ value


def turned(part, tables):
    cosines, sines = (table[None, :, None].to(part.dtype) for table in tables)
    first, second = part.chunk(2, dim=-1)
    return part * cosines + torch.cat([-second, first], dim=-1) * sines


def dense_cosmos(pipe, rules, steps):
    """The pipeline with dense layers that follow rules; of a guided step's two calls the first sees the prompts."""
    return dense_rows([pipe.transformer], DenseCosmos, rules, steps, lambda: pipe.scheduler.step_index or 0)
