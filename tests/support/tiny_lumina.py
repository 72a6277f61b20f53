"""Tiny Lumina 2 pipelines, and their layers written out densely."""

from contextlib import contextmanager

import torch
from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

from tests.support.dense_joint import Blocks, dense_row
from tests.support.tiny_transformers import ExactEuler, sharpened

LUMINA = {
    "sample_size": 8,
    "in_channels": 16,
    "hidden_size": 24,
    "num_layers": 3,
    "num_refiner_layers": 1,
    "num_attention_heads": 4,
    "num_kv_heads": 2,
    "multiple_of": 8,
    "axes_dim_rope": (2, 2, 2),
    "axes_lens": (64, 32, 32),
    "cap_feat_dim": 16,
}
LENGTHS = (5, 9, 3, 7)


def tiny_lumina_pipeline(dtype=torch.float64, **config):
    """A Lumina 2 pipeline without encoder and decoder: it takes embeddings and gives latents."""
    torch.manual_seed(0)
    transformer = sharpened(Lumina2Transformer2DModel(**{**LUMINA, **config})).to(dtype).eval()
    tiny = Lumina2Pipeline(transformer, ExactEuler(), None, None, None)
    tiny.set_progress_bar_config(disable=True)
    return tiny


def draw_lumina(pipe, prompts=2, *, steps=4, size=(8, 8), lengths=LENGTHS, guidance_scale=3.0, **options):
    """Latents for so many captions, each of another length, which start from the same noise."""
    generator, dtype = torch.Generator().manual_seed(0), pipe.transformer.dtype
    noise = torch.randn(1, 16, *size, generator=generator, dtype=torch.float64)
    texts = torch.randn(2, len(lengths), max(lengths), 16, generator=generator, dtype=torch.float64)[:, :prompts]
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:prompts, None]).long()
    return pipe(
        latents=noise.repeat(prompts, 1, 1, 1).to(dtype),
        height=size[0] * 8,
        width=size[1] * 8,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        prompt_embeds=texts[0].to(dtype),
        prompt_attention_mask=mask,
        negative_prompt_embeds=texts[1].to(dtype),
        negative_prompt_attention_mask=mask.flip(0),
        output_type="latent",
        **options,
    ).images


class DenseLumina:
    """A layer whose rows exchange tokens before they are turned: each stands where the row's own would.

    Args:
        rule: as of `dense_joint.DenseJoint`.
        lengths: of the captions of the call under way.
        turns: whether exchanged tokens stand where the row's own would, or stay turned as they were.
        fault: as of `dense_joint.DenseJoint`.
    """

    def __init__(self, rule, lengths, turns=True, fault=None, keep=None):
        self.rule, self.lengths, self.turns, self.fault, self.keep = rule, lengths, turns, fault, keep

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        lengths, rows = self.lengths(), hidden_states.shape[0]
        tokens = hidden_states.shape[1] - max(lengths)
        heads, raw = {}, None
        for letter, layer, norm in (
            ("q", attn.to_q, attn.norm_q),
            ("k", attn.to_k, attn.norm_k),
            ("v", attn.to_v, None),
        ):
            part = layer(hidden_states).unflatten(-1, (-1, attn.to_q.out_features // attn.heads))
            raw = part if letter == "q" else raw
            part = part if norm is None else norm(part)
            heads[letter] = part.repeat_interleave(attn.heads // part.shape[2], dim=2)  # [B, L, H, D]
        out = torch.zeros_like(heads["q"].flatten(2))
        for row in range(rows):
            stop, terms = lengths[row] + tokens, self.rule(row, rows)
            # A map that is replayed as a whole is the source's where the source's image stands.
            moves = self.turns and not isinstance(terms, Blocks)
            parts = {
                "raw": _Pieces(part[lengths[i] : lengths[i] + tokens].transpose(0, 1) for i, part in enumerate(raw))
            }
            for letter, part in heads.items():
                for segment in ("text", "image"):
                    pieces = []
                    for other in range(rows):
                        start = 0 if segment == "text" else lengths[other]
                        piece = part[other, start : lengths[other] + (0 if segment == "text" else tokens)]
                        if letter != "v":
                            seat, begin = (row, lengths[row]) if moves and segment == "image" else (other, start)
                            angles = image_rotary_emb[seat, begin : begin + len(piece), None]
                            pairs = torch.view_as_complex(piece.unflatten(-1, (-1, 2)).contiguous())
                            piece = torch.view_as_real(pairs * angles).flatten(-2).to(piece)
                        pieces.append(piece.transpose(0, 1))
                    parts[f"{letter}_{segment}"] = _Pieces(pieces)
            keep = None if self.keep is None else lambda block, row=row: self.keep(row, rows, block)
            out[row, :stop] = dense_row(terms, row, parts, ("text", "image"), keep, fault=self.fault)
        return attn.to_out[0](out)


class _Pieces(list):
    """Rows of tokens, of other lengths: [H, tokens, D] each."""


@contextmanager
def dense_lumina(pipe, rule, *, turns=True, fault=None, keep=None):
    """A pipeline whose joint layers are dense and follow ``rule(row, rows)``, which may look at the state."""
    state = {"step": 0, "calls": 0, "lengths": ()}

    def read(module, args, kwargs):
        index = pipe.scheduler.step_index
        state.update(step=0 if index is None else index, calls=state["calls"] + 1)
        state["lengths"] = kwargs["encoder_attention_mask"].sum(1).tolist()

    layers = [block.attn for block in pipe.transformer.layers]
    before = [layer.processor for layer in layers]
    handle = pipe.transformer.register_forward_pre_hook(read, with_kwargs=True)
    for layer in layers:
        layer.set_processor(DenseLumina(rule, lambda: state["lengths"], turns, fault, keep))
    try:
        yield state
    finally:
        handle.remove()
        for layer, processor in zip(layers, before, strict=True):
            layer.set_processor(processor)
