"""A stand-in of the protocol that ComfyUI's models, patchers and samplers follow, and the nodes as it loads them.

It follows ComfyUI's `BasicTransformerBlock`, its `Flux`, `QwenImageTransformer2DModel` and `WanModel`, `wrap_attn`,
`ModelPatcher`, `WrapperExecutor` and sampler in what they hand to nodes: projected queries, keys and values, and
`transformer_options` with blocks, chunks and noise levels.
"""

import importlib.util
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch

__all__ = [
    "FOLDER",
    "SIGMAS",
    "Clip",
    "Flux",
    "Patcher",
    "QwenImageTransformer2DModel",
    "UNet",
    "WanModel",
    "attention",
    "dense",
    "loaded",
    "prepared_noise",
]

FOLDER = Path(__file__).parents[2] / "integrations" / "comfyui"
SIGMAS = torch.tensor([14.6, 7.0, 3.0, 1.0, 0.3, 0.0])
_NAME = "custom_nodes_fpe"


def loaded():
    """The package, loaded as ComfyUI loads a folder of ``custom_nodes``: by its path."""
    if _NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(_NAME, FOLDER / "__init__.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[_NAME] = module
        spec.loader.exec_module(module)
    return sys.modules[_NAME]


def dense(query, key, value, heads, maps):
    """Row by row the map of another row, written out."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2).double() for x in (query, key, value))
    weights = torch.softmax(query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1]), dim=-1)
    return (weights[list(maps)] @ value).transpose(1, 2).flatten(2)


class Block(torch.nn.Module):
    """A layer of self-attention as ComfyUI's blocks compute it, with and without a replacement."""

    def __init__(self, channels, heads):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (torch.nn.Linear(channels, channels) for _ in range(4))

    def forward(self, x, options, block):
        extra = {name: value for name, value in options.items() if name not in ("patches", "patches_replace")}
        extra |= {"block": block, "block_index": 0, "n_heads": self.heads, "dim_head": x.shape[-1] // self.heads}
        replace = options.get("patches_replace", {}).get("attn1", {})
        query, key, value = self.to_q(x), self.to_k(x), self.to_v(x)
        place = (*block, 0) if (*block, 0) in replace else block
        if place in replace:
            return self.to_out(replace[place](query, key, value, extra))
        return self.to_out(dense(query, key, value, self.heads, range(len(x))).to(x))


class UNet(torch.nn.Module):
    """Blocks at the latents' size and at half of it."""

    def __init__(self):
        super().__init__()
        self.input_blocks = torch.nn.ModuleList()  # by which nodes know a UNet
        self.fine, self.coarse = Block(4, 1), Block(4, 2)

    def forward(self, x, options):
        options["original_shape"] = list(x.shape)
        rows, channels, height, width = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.fine(tokens, options, ("input", 1))
        image = tokens.transpose(1, 2).reshape(rows, channels, height, width)
        small = torch.nn.functional.avg_pool2d(image, 2)
        half = small.flatten(2).transpose(1, 2)
        half = half + self.coarse(half, options, ("middle", 0))
        small = half.transpose(1, 2).reshape(small.shape)
        return image + torch.nn.functional.interpolate(small, scale_factor=2.0)


def attention(query, key, value, heads, mask=None, skip_reshape=False, skip_output_reshape=False, **named):
    """ComfyUI's attention: what its options name in its place, or itself."""
    options = named.get("transformer_options") or {}
    if "_inside_attn_wrapper" not in named and "optimized_attention_override" in options:
        named |= {
            "_inside_attn_wrapper": True,
            "skip_reshape": skip_reshape,
            "skip_output_reshape": skip_output_reshape,
        }
        return options["optimized_attention_override"](
            attention, query, key, value, heads, *(() if mask is None else (mask,)), **named
        )
    if not skip_reshape:
        query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    out = torch.softmax(scores if mask is None else scores + mask, dim=-1) @ value
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def _projections(channels):
    return torch.nn.ModuleList(torch.nn.Linear(channels, channels) for _ in range(3))


def _patches(x, size):
    """[rows, channels, …, height, width] as [rows, patches, channels × size²], and how to go back."""
    rows, channels, *_, height, width = x.shape
    parts = x.reshape(rows, channels, -1, height // size, size, width // size, size)
    tokens = parts.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)

    def back(tokens):
        parts = tokens.reshape(rows, -1, height // size, width // size, channels, size, size)
        return parts.permute(0, 4, 1, 2, 5, 3, 6).reshape(x.shape)

    return tokens, back


class Flux(torch.nn.Module):
    """Text, image and a reference picture under one softmax; heads apart; single blocks are told where the image is."""

    patch_size, heads = 2, 2

    def __init__(self, channels=16):
        super().__init__()
        self.layers = torch.nn.ModuleList(_projections(channels) for _ in range(3))

    def forward(self, x, timestep, context, ref_latents=None, attention_mask=None, transformer_options=None):
        options = dict(transformer_options)
        image, back = _patches(x, self.patch_size)
        count = image.shape[1]
        if ref_latents is not None:
            image = torch.cat([image, _patches(ref_latents, self.patch_size)[0]], dim=1)
        tokens, text = torch.cat([context, image], dim=1), context.shape[1]
        for number, layer in enumerate(self.layers):
            options |= {"block_type": "double" if number < 1 else "single", "block_index": number}
            if number:
                options["img_slice"] = [text, tokens.shape[1]]
            states = (each(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in layer)
            out = attention(*states, self.heads, mask=attention_mask, skip_reshape=True, transformer_options=options)
            tokens = tokens + out
        return back(tokens[:, text : text + count])


class QwenImageTransformer2DModel(torch.nn.Module):
    """Text, then image under one softmax, heads side by side; a layer of the text alone before."""

    patch_size, heads = 2, 2

    def __init__(self, channels=16):
        super().__init__()
        self.refiner = _projections(channels)
        self.layers = torch.nn.ModuleList(_projections(channels) for _ in range(2))

    def forward(self, x, timestep, context, attention_mask=None, transformer_options=None):
        image, back = _patches(x, self.patch_size)
        text = context + attention(
            *(each(context) for each in self.refiner), self.heads, transformer_options=transformer_options
        )
        tokens = torch.cat([text, image], dim=1)
        for layer in self.layers:
            tokens = tokens + attention(
                *(each(tokens) for each in layer), self.heads, attention_mask, transformer_options=transformer_options
            )
        return back(tokens[:, context.shape[1] :])


class WanModel(torch.nn.Module):
    """Self-attention over all frames, and cross-attention."""

    patch_size, heads = (1, 2, 2), 2

    def __init__(self, channels=16):
        super().__init__()
        self.layers = torch.nn.ModuleList(_projections(channels) for _ in range(4))

    def forward(self, x, timestep, context, transformer_options=None):
        tokens, back = _patches(x, 2)
        for number, (query, key, value) in enumerate(self.layers):
            seen = context if number % 2 else tokens
            tokens = tokens + attention(
                query(tokens), key(seen), value(seen), heads=self.heads, transformer_options=transformer_options
            )
        return back(tokens)


class _Executor:
    """What is around a call of a model, one inside the other."""

    def __init__(self, original, class_obj, wrappers):
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def __call__(self, *args, **kwargs):
        if not self.wrappers:
            return self.original(*args, **kwargs)
        return self.wrappers[0](_Executor(self.original, self.class_obj, self.wrappers[1:]), *args, **kwargs)


class Patcher:
    """A model with options, as nodes get it."""

    def __init__(self, inside, options=None, wrappers=()):
        self.diffusion_model, self.wrappers = inside, list(wrappers)
        self.model_options = options or {"transformer_options": {}}

    def clone(self):
        options = {name: dict(value) for name, value in self.model_options.items()}
        return Patcher(self.diffusion_model, options, self.wrappers)

    def get_model_object(self, name):
        return getattr(self, name)

    def add_wrapper_with_key(self, kind, key, wrapper):
        assert kind == "apply_model" and key
        self.wrappers.append(wrapper)

    def set_model_attn1_replace(self, patch, block, number, transformer_index=None):
        replace = dict(self.model_options["transformer_options"].get("patches_replace", {}))
        replace["attn1"] = {**replace.get("attn1", {}), (block, number): patch}
        self.model_options["transformer_options"]["patches_replace"] = replace

    def _apply(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **given):
        if isinstance(self.diffusion_model, UNet):
            return self.diffusion_model(x, transformer_options)
        return self.diffusion_model(x, t, c_crossattn, transformer_options=transformer_options, **given)

    def sample(self, latent, seed, chunks=(1, 0), text=None, **given):
        """Euler's method over every noise level; each call of the model has the images once for each chunk."""
        x = prepared_noise(latent["samples"], seed, latent.get("batch_index")).to(latent["samples"].dtype)
        call = _Executor(self._apply, self, self.wrappers)
        for now, following in itertools.pairwise(SIGMAS):
            options = dict(self.model_options["transformer_options"])
            options |= {"cond_or_uncond": list(chunks), "sigmas": now.expand(len(x)), "sample_sigmas": SIGMAS}
            rows = torch.cat([x + 0.1 * kind for kind in chunks])
            words = None if text is None else torch.cat([text * (1 - kind) for kind in chunks])
            guess = call(rows, now, None, words, None, options, **given).chunk(len(chunks))
            x = x + 0.01 * (following - now) * sum(guess)
        return x


def prepared_noise(latent, seed, index):
    """Noise as ComfyUI draws it: rows of the same index get the same."""
    generator = torch.Generator().manual_seed(seed)
    if index is None:
        return torch.randn(latent.shape, generator=generator)
    different, places = np.unique(index, return_inverse=True)
    drawn = [torch.randn(1, *latent.shape[1:], generator=generator) for _ in range(different[-1] + 1)]
    return torch.cat([drawn[different[place]] for place in places])


class Clip:
    """Embeddings of as many tokens as a prompt has blocks of 77, told from its words."""

    def __init__(self, kind="l"):
        self.kind = kind

    def tokenize(self, text):
        return {self.kind: text}

    def encode_from_tokens_scheduled(self, tokens):
        (text,) = tokens.values()
        length = 154 if "long" in text else 77
        generator = torch.Generator().manual_seed(len(text))
        words = torch.randn(1, length, 8, generator=generator)
        return [[words, {"pooled_output": torch.randn(1, 6, generator=generator)}]]
