"""FLUX.3 in small, as its modular pipelines call it: it takes embeddings and gives packed latents."""

from contextlib import contextmanager

import torch
from diffusers import (
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    Flux3Transformer2DModel,
    modular_pipelines,
)
from diffusers.models.embeddings import apply_rotary_emb

from tests.support.dense_joint import replaced_processors
from tests.support.tiny_transformers import sharpened

TEXT, SHOWN = 6, (2, 2)


def tiny_flux3(dtype=torch.float32, **config):
    """A FLUX.3 transformer of two blocks of each kind."""
    torch.manual_seed(0)
    size = {"in_channels": 16, "cond_in_channels": 16, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 8}
    size |= {"num_attention_heads": 2, "joint_attention_dim": 32, "timestep_channels": 16}
    size |= {"axes_dims_rope": (2, 2, 2, 2), **config}
    return sharpened(Flux3Transformer2DModel(**size)).to(dtype).eval()


def tiny_flux3_pipeline(guidance=4.0, distilled=False, dtype=torch.float32):
    """A modular pipeline without encoders and decoder; the distilled one has no guider."""
    blocks = (modular_pipelines.Flux3DistilledAutoBlocks if distilled else modular_pipelines.Flux3AutoBlocks)()
    for name in ("prompt_upsampler", "text_encoder", "vae_encoder", "decode"):
        blocks.sub_blocks.pop(name, None)
    pipe = blocks.init_pipeline()
    parts = {} if distilled else {"guider": ClassifierFreeGuidance(guidance_scale=guidance)}
    pipe.update_components(
        transformer=tiny_flux3(dtype, flow_map=distilled), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_flux3(pipe, rows=2, *, steps=4, size=(8, 12), shown=False, generator=None, **options):
    """Packed latents for so many texts, which start from the same noise."""
    given = torch.Generator().manual_seed(1)
    texts = torch.randn(2, rows, TEXT, 32, generator=given).to(pipe.transformer.dtype)
    options |= {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]}
    if not hasattr(pipe, "guider"):
        options.pop("negative_prompt_embeds")
    if shown:
        options["image_cond_latents"] = [torch.randn(rows, 16, *SHOWN, generator=given)]
    noise = torch.randn(1, 16, size[0] // 2, size[1] // 2, generator=torch.Generator().manual_seed(0))
    return pipe(
        latents=noise.repeat(rows, 1, 1, 1),
        height=size[0] * 8,
        width=size[1] * 8,
        num_inference_steps=steps,
        output="latents",
        **options,
    )


class DenseFlux3:
    """The layers of FLUX.3 with every map written out.

    Args:
        rule: takes a row, whether its layer sees text, and queries, keys and values of all rows with image tokens where
            ``image`` says; returns what the row becomes [H, tokens, D], or None for its own product.
        state: of the run.
        images: tokens of the image.
    """

    _attention_backend = _parallel_config = None

    def __init__(self, rule, state, images):
        self.rule, self.state, self.images = rule, state, images

    def __call__(self, attn, hidden_states, attention_mask=None, image_rotary_emb=None):
        parts = [getattr(attn, f"to_{name}")(hidden_states).unflatten(-1, (attn.heads, -1)) for name in "qkv"]
        query, key = (
            apply_rotary_emb(norm(part), image_rotary_emb, sequence_dim=1)
            for norm, part in ((attn.norm_q, parts[0]), (attn.norm_k, parts[1]))
        )
        query, key, value = (part.transpose(1, 2) for part in (query, key, parts[2]))
        joint = hidden_states.shape[1] > self.images
        image = slice(TEXT, TEXT + self.images) if joint else slice(None)
        out = []
        for row in range(len(query)):
            own = query[row].clone(), key[row].clone(), value[row].clone()
            q, k, v = self.rule(row, joint, image, own, (query, key, value), self.state) or own
            out.append((q @ k.mT * attn.head_dim**-0.5).softmax(-1) @ v)
        return attn.to_out[0](torch.stack(out).transpose(1, 2).flatten(2))


@contextmanager
def dense_flux3(pipe, rule, size=(8, 12)):
    """A block in which all layers that see the image are written out."""
    state, images = {"step": 0, "calls": 0}, size[0] // 2 * (size[1] // 2)

    def read(module, args, kwargs):
        step = pipe.scheduler.step_index or 0
        state["calls"] = 1 if step != state["step"] else state["calls"] + 1
        state["step"] = step

    def processor(name):
        if name.startswith(("txt_", "mode_blocks.image_cond")):
            return pipe.transformer.get_submodule(name.removesuffix(".processor")).processor
        return DenseFlux3(rule, state, images)

    handle = pipe.transformer.register_forward_pre_hook(read, with_kwargs=True)
    try:
        with replaced_processors(pipe.transformer, processor):
            yield
    finally:
        handle.remove()
