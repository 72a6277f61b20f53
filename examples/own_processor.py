"""An attention processor of one's own for diffusers: every row of the batch has the first row's self-attention map."""

import argparse
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from fpe_kernels import shared_attention
from fpe_pipeline.embedded import embedded_path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", type=Path, default=Path("out/examples"), help="where pictures are written")
parser.add_argument("steps", nargs="?", type=int, default=10, help="denoising steps (default 10)")
given = parser.parse_args()
folder, steps = given.folder / "own_processor", given.steps
folder.mkdir(parents=True, exist_ok=True)


class FirstMap:
    """Self-attention whose rows share a map in each half of a guided batch: the map of the half's first row."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **options):
        rows = hidden_states.shape[0]
        first = [0] * (rows // 2) + [1] * (rows // 2)  # which map each row has

        def heads(states):  # [B, N, C] -> [B, H, N, D]
            return states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        sources = hidden_states[:: rows // 2]  # the first rows alone are projected to queries and keys
        query, key = heads(attn.to_q(sources)), heads(attn.to_k(sources))
        value = heads(attn.to_v(hidden_states))
        out = shared_attention(query, key, value, map_index=first, scale=attn.scale)
        return attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))


pipe = StableDiffusionPipeline.from_pretrained(embedded_path())
ordinary = pipe.unet.attn_processors
chosen = {name: FirstMap() if "attn1" in name and "up_blocks" in name else ordinary[name] for name in ordinary}
pipe.unet.set_attn_processor(chosen)
prompts = ["a photo of a red car on the beach", "a photo of a blue car on the beach"]
images = pipe(prompts, num_inference_steps=steps, generator=[torch.Generator().manual_seed(0) for _ in prompts]).images
for name, image in zip(("source", "target"), images, strict=True):
    image.save(folder / f"{name}.png")
pipe.unet.set_attn_processor(ordinary)
