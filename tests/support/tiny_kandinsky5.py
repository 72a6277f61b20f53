"""Tiny Kandinsky 5 pipelines, of pictures and of videos, and their layers written out densely."""

import sys

import diffusers
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPTextModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.support.dense_rows import DenseRows, dense_rows
from tests.support.tiny_language import qwen_tokenizer
from tests.support.tiny_transformers import ExactEuler, sharpened, tiny_clip, tiny_vae
from tests.support.wide_torch import widened

PROMPTS = [
    "a photo of a red car on a mountain",
    "a photo of a big dog on a mountain in winter",
    "a drawing of a red car",
    "a photo of a big car on a mountain",
]
SAID = "<|im_start|>a drawing, a house:<|im_end|><|im_start|>user\n{}<|im_end|>"
_SIZE = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 16,
    "in_text_dim2": 8,
    "time_dim": 16,
    "model_dim": 24,
    "ff_dim": 24,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (4, 4, 4),
}


class Processor:
    """Reads texts, and would read pictures."""

    image_processor = None

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, text, images=None, videos=None, **options):
        return self.tokenizer(text, **options)


def tiny_kandinsky5(dtype=torch.float64, **config):
    """A Kandinsky 5 transformer, in which every layer is heard at once: its gates are not 0 as in a new one."""
    torch.manual_seed(0)
    model = diffusers.Kandinsky5Transformer3DModel(**_SIZE | config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation.out_layer" in name:
                parameter.normal_(0.0, 0.3)
    sharpened(model, ("to_query", "to_key", "query_norm", "key_norm")).to(dtype).eval()
    for name, part in model.named_modules() if dtype is torch.bfloat16 else ():
        if name.rpartition(".")[2] in model._keep_in_fp32_modules:  # as where it is loaded from a file
            part.float()
    return model


def tiny_kandinsky5_pipeline(pipe, dtype=torch.float64, kind="T2I", decodes=False, sizes=None, **config):
    """A pipeline of pictures ("T2I") or of videos ("T2V"), whose pictures may have any size.

    Args:
        decodes: whether it has an autoencoder, with a shift that its pipeline does not take off.
        sizes: (width, height) of its pictures; None for any.
    """
    torch.manual_seed(1)
    if decodes:
        config = {"in_visual_dim": 16, "out_visual_dim": 16, **config}
    tokenizer = qwen_tokenizer()
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    text |= {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    tiny = getattr(diffusers, f"Kandinsky5{kind}Pipeline")(
        transformer=tiny_kandinsky5(dtype, **config),
        vae=tiny_vae().to(dtype) if decodes else None,
        text_encoder=encoder.to(dtype).eval(),
        tokenizer=Processor(tokenizer),
        text_encoder_2=tiny_clip(pipe.tokenizer, CLIPTextModel).to(dtype),
        tokenizer_2=pipe.tokenizer,
        scheduler=ExactEuler(),
    )
    tiny.prompt_template = SAID
    tiny.prompt_template_encode_start_idx = len(tokenizer(SAID.partition("{}")[0])["input_ids"]) - 1
    tiny.resolutions = _AnySize() if sizes is None else list(sizes)
    # Brings the first frames of a video from a picture to the mean of later ones, of all rows together.
    tiny.normalize_first_frame = lambda latents: latents
    tiny.set_progress_bar_config(disable=True)
    return tiny


def with_a_plain_tokenizer(tiny):
    """A pipeline with the tokenizer alone in the place of its processor, so that it can be saved and loaded."""
    tiny.register_modules(tokenizer=tiny.tokenizer.tokenizer)
    return tiny


class _AnySize:
    """What a pipeline of pictures looks a size up in."""

    def __contains__(self, size):
        return True


def draw_kandinsky5(pipe, prompts=2, *, steps=4, size=(8, 8), frames=None, guidance_scale=3.0, seed=0, **options):
    """Latents [prompts, frames, h, w, 4]; the rows start from the same noise, and from the same picture if any."""
    texts = PROMPTS[:prompts] if isinstance(prompts, int) else prompts
    rows = len(options["prompt_embeds_qwen"] if texts is None else texts)
    video = {} if frames is None else {"num_frames": 4 * frames - 3}
    if "I2V" in type(pipe).__name__:
        video["image"] = Image.new("RGB", (64, 64))
    shape, generator = (1, frames or 1, *size, 9 if pipe.transformer.visual_cond else 4), torch.Generator()
    noise = torch.randn(shape, generator=generator.manual_seed(seed), dtype=torch.float64)
    options.setdefault("latents", noise.repeat(rows, 1, 1, 1, 1).to(pipe.transformer.dtype))
    narrows = [sys.modules[type(pipe.transformer).__module__]] if pipe.transformer.dtype is torch.float64 else []
    with widened(*narrows):
        return pipe(
            prompt=texts,
            negative_prompt="a drawing",
            height=size[0] * 8,
            width=size[1] * 8,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            output_type="latent",
            return_dict=False,
            **video,
            **options,
        )[0]


class DenseKandinsky5(DenseRows):
    """The layers of Kandinsky 5: norms of each head, and turns that are rounded to bfloat16."""

    def __init__(self, rule):
        super().__init__(rule, turn=turned)

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, rotary_emb=None, sparse_params=None):
        return super().__call__(_Named(attn), hidden_states, encoder_hidden_states, None, rotary_emb)


class _Named:
    """A layer's parts by the names that other families give them."""

    def __init__(self, attn):
        self.heads, self.to_q, self.to_k, self.to_v = attn.num_heads, attn.to_query, attn.to_key, attn.to_value
        self.norm_q, self.norm_k, self.to_out = (_Norm(attn.query_norm), _Norm(attn.key_norm), [attn.out_layer])


class _Norm:
    def __init__(self, norm):
        self.norm = norm

    def __call__(self, part):
        return F.rms_norm(part, part.shape[-1:], self.norm.weight)


def turned(part, places):
    """By the model's matrices [B, N, 1, D / 2, 2, 2], and rounded."""
    pairs = part.unflatten(-1, (-1, 2))
    turns = places[:1].expand(len(part), *places.shape[1:])
    out = torch.stack([(turns[..., line, :] * pairs).sum(-1) for line in (0, 1)], dim=-1)
    return out.flatten(-2).to(torch.bfloat16).to(part.dtype)


def dense_kandinsky5(pipe, rules, steps):
    """The pipeline with dense layers that follow rules; of a guided step's two calls the first sees the prompts."""
    return dense_rows(
        [pipe.transformer],
        DenseKandinsky5,
        rules,
        steps,
        lambda: pipe.scheduler.step_index or 0,
        ("self_attention", "cross_attention"),
        within="visual_transformer_blocks.",
    )
