"""Controllers on written-out maps: every layer's matrix is made, handed over as a tensor and multiplied."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from fpe_pipeline.models.sites import attention_sites


class DenseProcessor:
    """softmax(q kᵀ) as a tensor [rows · heads, N, M], through a controller, times v."""

    def __init__(self, controller, place, is_cross):
        self.controller, self.place, self.is_cross = controller, place, is_cross

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            attn.head_to_batch_dim(projection(given))
            for projection, given in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
        )
        matrix = torch.softmax(query @ key.transpose(-1, -2) * attn.scale, dim=-1)
        out = attn.batch_to_head_dim(self.controller(matrix, self.is_cross, self.place) @ value)
        return attn.to_out[1](attn.to_out[0](out))


@contextmanager
def dense_controlled(pipe, controller):
    """A pipeline whose layers hand their matrices to a controller."""
    before = dict(pipe.unet.attn_processors)
    sites = attention_sites(pipe.unet)
    controller.num_att_layers = len(sites)
    made = {f"{site.path}.processor": DenseProcessor(controller, site.place, site.kind == "cross") for site in sites}
    pipe.unet.set_attn_processor(before | made)
    try:
        yield
    finally:
        pipe.unet.set_attn_processor(before)


class Counting:
    """Counts layers and steps, and gives the conditional rows of each matrix, prompt by prompt, to ``edit``."""

    def __init__(self, prompts, guided=True):
        self.prompts, self.guided = len(prompts), guided
        self.step = self.layer = 0
        self.kept = {}

    def __call__(self, matrix, is_cross, place):
        first = len(matrix) // 2 if self.guided else 0
        part = matrix[first:].reshape(self.prompts, -1, *matrix.shape[1:]).clone()
        edited = self.edit(part, is_cross)
        matrix = torch.cat([matrix[:first], edited.flatten(0, 1)])
        self.kept.setdefault((self.step, place, is_cross), []).append(edited)
        self.layer += 1
        if self.layer == self.num_att_layers:
            self.layer, self.step = 0, self.step + 1
        return matrix

    def edit(self, maps, is_cross):
        return maps

    def step_callback(self, latents):
        return latents


class DenseEdit(Counting):
    """Prompt-to-Prompt, from its equation.

    Args:
        alpha: [steps + 1, targets, M]: whether a token is the source's.
        mixing: [targets, M, M], of the source's columns; own: [targets, M], the share of the targets' own columns.
        window: of the steps in which self-attention is the source's, in layers of at most ``most`` tokens.
        blend: threshold, and [prompts, M]: the tokens of the words.
    """

    def __init__(self, prompts, alpha, mixing, own, window, most, *, guided=True, blend=None):
        super().__init__(prompts, guided)
        self.alpha, self.mixing, self.own = alpha, mixing, own
        self.window, self.most, self.blend = window, most, blend

    def edit(self, maps, is_cross):
        source, targets = maps[:1], maps[1:]
        if is_cross:
            alpha = self.alpha[self.step][:, None, None]
            whole = source @ self.mixing[:, None] + targets * self.own[:, None, None]
            return torch.cat([source, alpha * whole + (1 - alpha) * targets])
        inside = self.window[0] <= self.step < self.window[1]
        return source.expand_as(maps) if inside and maps.shape[-1] <= self.most else maps

    def step_callback(self, latents):
        if self.blend is None:
            return latents
        threshold, words = self.blend
        height, width = (side // 4 for side in latents.shape[-2:])
        heat = torch.cat(
            [
                (matrix.unflatten(2, (height, width)) * words[:, None, None, None]).sum(-1)
                for (_, place, is_cross), matrices in self.kept.items()
                for matrix in matrices
                if is_cross and place != "mid" and matrix.shape[2] == height * width
            ],
            dim=1,
        ).mean(1, keepdim=True)
        heat = torch.nn.functional.max_pool2d(heat, 3, stride=1, padding=1)
        heat = torch.nn.functional.interpolate(heat, size=latents.shape[-2:])
        mask = heat / heat.amax((2, 3), keepdim=True) > threshold
        return torch.where(mask | mask[:1], latents, latents[:1])
