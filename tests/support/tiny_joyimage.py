"""Tiny JoyImage pipelines, from texts and from a picture, and their layers written out densely."""

import sys
from contextlib import contextmanager

import diffusers
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.embeddings import apply_rotary_emb
from transformers import BatchEncoding, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tests.support.dense_joint import DenseJoint, linear, replaced_processors
from tests.support.edited_transformers import Model
from tests.support.tiny_language import qwen_tokenizer
from tests.support.tiny_transformers import ExactEuler, sharpened
from tests.support.wide_torch import widened

__all__ = ["JOYIMAGE", "PADS", "draw_joyimage", "tiny_joyimage_pipeline"]

PADS = 5  # tokens that a picture becomes
_SIZE = {"in_channels": 4, "hidden_size": 16, "num_attention_heads": 2, "text_dim": 16, "mlp_width_ratio": 1.0}
_SIZE |= {"num_layers": 3, "rope_dim_list": [2, 2, 4]}


class _Processor:
    """Makes some tokens of each picture, and texts as long as the longest of a call."""

    image_processor = None

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, images=None, padding=True, return_tensors="pt"):
        marked = [one.replace("<|image_pad|>", "<|image_pad|>" * PADS) for one in text]
        return BatchEncoding(self.tokenizer(marked, padding=padding, return_tensors=return_tensors))


class _AnySize:
    """What brings pictures to sizes that models are trained with."""

    def get_default_height_width(self, image, height, width):
        return height, width

    def resize_center_crop(self, image, size):
        return [one.resize(size[::-1]) for one in image] if isinstance(image, list) else image.resize(size[::-1])


def tiny_joyimage_pipeline(pipe=None, dtype=torch.float64, padding="right", **config):
    """A JoyImage pipeline, whose templates are as long as its tokenizer makes them."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"]})
    tokenizer.padding_side = padding
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 512}
    text |= {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2], "mrope_interleaved": True}}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16}
    known = {"text_config": text, "vision_config": vision | {"deepstack_visual_indexes": []}}
    encoder = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**known))
    model = diffusers.JoyImageEditTransformer3DModel(**_SIZE | config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn_qkv" in name:
                parameter.mul_(2.5)
            elif "modulate_table" in name:  # gates of what layers say
                parameter.normal_(std=0.3)
    size = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    size |= {"latents_mean": [0.1] * 4, "latents_std": [0.5] * 4}
    tiny = diffusers.JoyImageEditPipeline(
        scheduler=ExactEuler(),
        vae=AutoencoderKLWan(**size, temperal_downsample=[False, True, True]).to(dtype).eval(),
        text_encoder=encoder.to(dtype).eval(),
        tokenizer=tokenizer,
        transformer=sharpened(model, ("img_attn_q_norm", "img_attn_k_norm")).to(dtype).eval(),
        processor=_Processor(tokenizer),
    )
    tiny.prompt_template_encode = {
        "image": "<|im_start|>a photo:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n",
        "multiple_images": "<|im_start|>a photo:<|im_end|>\n{}<|im_start|>\n",
    }
    count = len(tokenizer("<|im_start|>a photo:<|im_end|>\n")["input_ids"])
    tiny.prompt_template_encode_start_idx = dict.fromkeys(("image", "multiple_images"), count)
    tiny.vae_image_processor = _AnySize()
    tiny.set_progress_bar_config(disable=True)
    return tiny


def draw_joyimage(pipe, prompts, *, steps=4, size=(8, 8), guidance=3.0, seed=0, latents=None, **options):
    """Latents [prompts, 4, h, w], which start from the same noise."""
    noise = torch.randn(1, 1, 4, 1, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options.setdefault("negative_prompt", ["a drawing"] * len(prompts))
    exact = pipe.transformer.dtype is torch.float64
    with widened(*([sys.modules[type(pipe.transformer).__module__]] if exact else [])):
        return pipe(
            prompt=list(prompts),
            guidance_scale=guidance,
            latents=noise.repeat(len(prompts), 1, 1, 1, 1, 1) if latents is None else latents,
            height=size[0] * 8,
            width=size[1] * 8,
            num_inference_steps=steps,
            output_type="latent",
            **options,
        ).images


class _DenseJoyImage(DenseJoint):
    """The layers of JoyImage: image, a picture that is shown, and text; three projections in one."""

    order = ("image", "reference", "text")

    def __init__(self, rule, images):
        super().__init__(rule)
        self.images = images

    def __call__(self, attn, hidden_states, encoder_hidden_states, image_rotary_emb=None):
        parts = {}
        streams = {"img": (hidden_states, "image"), "txt": (encoder_hidden_states, "text")}
        for (stream, (tokens, segment)), places in zip(streams.items(), image_rotary_emb, strict=True):
            split = linear(getattr(attn, f"{stream}_attn_qkv"), tokens).chunk(3, dim=-1)
            for letter, part in zip("qkv", split, strict=True):
                part = part.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
                if letter == "q" and segment == "image":
                    parts["raw"] = part[:, :, : self.images()]
                if letter != "v":
                    part = getattr(attn, f"{stream}_attn_{letter}_norm")(part)
                    part = part if places is None else apply_rotary_emb(part, places)
                parts[f"{letter}_{segment}"] = part
        tokens, shown = self.images(), hidden_states.shape[1] - self.images()
        for letter in "qkv" if shown else "":
            both = parts[f"{letter}_image"]
            parts[f"{letter}_image"], parts[f"{letter}_reference"] = both[:, :, :tokens], both[:, :, tokens:]
        rows = len(hidden_states)
        out = torch.stack([self.row(row, rows, parts) for row in range(rows)])
        seen = tokens + shown
        return linear(attn.img_attn_proj, out[:, :seen]), linear(attn.txt_attn_proj, out[:, seen:])


@contextmanager
def _dense(pipe, rule, *, layers="", fault=None):
    state = {"step": 0, "calls": 0, "images": 0}

    def read(module, args, kwargs):
        state["step"] = pipe.scheduler.step_index or 0
        state["calls"] += 1
        height, width = kwargs["hidden_states"].shape[-2:]
        state["images"] = height // 2 * (width // 2)

    def processor(name):
        follows = name.startswith(layers)
        made = _DenseJoyImage(rule if follows else lambda row, rows: None, lambda: state["images"])
        made.fault = fault if follows else None
        return made

    handle = pipe.transformer.register_forward_pre_hook(read, with_kwargs=True)
    try:
        with replaced_processors(pipe.transformer, processor):
            yield state
    finally:
        handle.remove()


class _JoyImage(Model):
    def dense(self, pipe, rule, layers, fault):
        return _dense(pipe, rule, layers=layers, fault=fault)

    def template(self, pipe):
        return *pipe.prompt_template_encode["image"].split("{}"), pipe.prompt_template_encode_start_idx["image"]


JOYIMAGE = _JoyImage(tiny_joyimage_pipeline, draw_joyimage, family="joyimage")
