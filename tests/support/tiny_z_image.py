"""Tiny Z-Image pipelines, and their layers written out densely."""

from contextlib import contextmanager

import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from diffusers.models.transformers import transformer_z_image
from diffusers.pipelines.z_image import pipeline_z_image, pipeline_z_image_img2img, pipeline_z_image_inpaint
from transformers import Qwen3Config, Qwen3Model

from tests.support.dense_joint import Blocks, dense_row
from tests.support.tiny_language import qwen_tokenizer
from tests.support.tiny_transformers import ExactEuler, sharpened
from tests.support.wide_torch import widened

Z_IMAGE = {
    "in_channels": 16,
    "dim": 16,
    "n_layers": 3,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 16,
    "axes_dims": [4, 2, 2],
    "axes_lens": [160, 32, 32],
}
#: Tokens of captions, before they are filled up: to 32, 64, 32 and 96.
LENGTHS, MULTIPLE = (5, 40, 32, 70), 32
#: What stands around a prompt, and how a tokenizer is told so.
CONVERSATION = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)


def tiny_z_image_pipeline(dtype=torch.float64, kind=ZImagePipeline, **parts):
    """A Z-Image pipeline, by default without encoder and decoder: it takes embeddings and gives latents."""
    torch.manual_seed(0)
    transformer = sharpened(ZImageTransformer2DModel(**Z_IMAGE))
    with torch.no_grad():
        for filling in (transformer.x_pad_token, transformer.cap_pad_token):
            filling.normal_()
    given = {"scheduler": ExactEuler(), "vae": None, "text_encoder": None, "tokenizer": None, **parts}
    tiny = kind(transformer=transformer.to(dtype).eval(), **given)
    tiny.set_progress_bar_config(disable=True)
    return tiny


def tiny_z_image_that_reads(dtype=torch.float64, **parts):
    """The same with an encoder and a tokenizer."""
    torch.manual_seed(2)
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = _CHAT
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    encoder = Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), **size, **heads)).to(dtype).eval()
    return tiny_z_image_pipeline(dtype, text_encoder=encoder, tokenizer=tokenizer, **parts)


def starting(count, size, dtype=torch.float64, images=1, seed=0):
    """Latents of so many prompts, of which image i starts from the same noise."""
    noise = torch.randn(images, 16, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise.repeat(count, 1, 1, 1).to(dtype)


def captions(lengths, seed, dtype=torch.float64):
    """Embeddings of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, 16, generator=generator, dtype=torch.float64).to(dtype) for length in lengths]


def draw_z_image(
    pipe, prompts=2, *, steps=4, size=(8, 8), lengths=LENGTHS, negative="a drawing", guidance=3.0, **options
):
    """Latents for so many captions, of these lengths, or for prompts, which start from the same noise."""
    dtype, count = pipe.transformer.dtype, prompts if isinstance(prompts, int) else len(prompts)
    images = options.get("num_images_per_prompt", 1)
    if isinstance(prompts, int):
        texts = {"prompt_embeds": captions(lengths[:count], 0, dtype)}
        if guidance:
            texts["negative_prompt_embeds"] = captions(lengths[:count][::-1], 1, dtype)
    else:
        texts = {"prompt": list(prompts), "negative_prompt": [negative] * count, "max_sequence_length": 128}
    kept = torch.promote_types(dtype, torch.float32)  # as the pipeline keeps its latents
    return pipe(
        **{"latents": starting(count, size, kept, images), **texts, **options},
        height=size[0] * 8,
        width=size[1] * 8,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
    ).images


_NARROWING = (pipeline_z_image, pipeline_z_image_img2img, pipeline_z_image_inpaint, transformer_z_image)


def wide_z_image():
    """Where diffusers narrows to float32 on the way, what is in float64 stays so."""
    return widened(*_NARROWING)


class DenseZImage:
    """A layer whose rows exchange tokens before they are turned: each stands where the row's own would.

    Args:
        rule: as of `dense_joint.DenseJoint`; what fills the image up is the segment "pad".
        state: of the call under way: lengths of captions, as given and filled up, tokens of the image and how many fill
            them up.
        turns: whether exchanged tokens stand where the row's own would, or stay turned as they were.
        fault: as of `dense_joint.DenseJoint`; or what padding that is attended to is left out, "no pad" of the image's
            and "no text pad" of the caption's.
    """

    def __init__(self, rule, state, turns=True, fault=None, keep=None):
        self.rule, self.state, self.turns, self.fault, self.keep = rule, state, turns, fault, keep

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, freqs_cis=None):
        raw, key, value = (
            layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        heads = {"q": attn.norm_q(raw), "k": attn.norm_k(key), "v": value}  # [B, L, H, D]
        (tokens, filling), rows = self.state["images"], len(hidden_states)
        first = tokens + filling
        where = {"image": [(0, tokens)] * rows, "pad": [(tokens, first)] * rows}
        where["text"] = [(first, first + length) for length in self.state["lengths"]]
        out = torch.zeros_like(hidden_states)
        for row in range(rows):
            terms = self.rule(row, rows)
            # A map that is replayed as a whole is the source's where the source's image stands.
            moves = self.turns and not isinstance(terms, Blocks)
            parts = {"raw": [of[:tokens].transpose(0, 1) for of in raw]}
            for letter, part in heads.items():
                for segment, ranges in where.items():
                    ranges = self.attended(segment, ranges) if letter in "kv" else ranges
                    seat = row if moves and segment == "image" else None
                    parts[f"{letter}_{segment}"] = _Pieces(part, ranges, None if letter == "v" else freqs_cis, seat)
            keep = None if self.keep is None else lambda block, row=row: self.keep(row, rows, block)
            given = dense_row(terms, row, parts, ("image", "pad", "text"), keep, fault=self.fault)
            out[row, : len(given)] = given
        return attn.to_out[0](out)

    def attended(self, segment, ranges):
        """Where the keys stand that somebody attends to."""
        if self.fault == "no pad" and segment == "pad":
            return [(start, start) for start, _ in ranges]
        if self.fault == "no text pad" and segment == "text":
            return [(start, start + length) for (start, _), length in zip(ranges, self.state["given"], strict=True)]
        return ranges


class _Pieces:
    """A segment's tokens [H, tokens, D] of each row, turned by its places, or by those of the row ``seat``."""

    def __init__(self, part, ranges, freqs_cis, seat):
        self.part, self.ranges, self.freqs_cis, self.seat = part, ranges, freqs_cis, seat

    def __len__(self):
        return len(self.part)

    def __getitem__(self, row):
        start, stop = self.ranges[row]
        piece = self.part[row, start:stop]
        if self.freqs_cis is not None:
            places = self.freqs_cis[row if self.seat is None else self.seat, start:stop, None]
            pairs = torch.view_as_complex(piece.unflatten(-1, (-1, 2)).contiguous())
            piece = torch.view_as_real(pairs * places).flatten(-2).to(piece)
        return piece.transpose(0, 1)


@contextmanager
def dense_z_image(pipe, rule, *, turns=True, fault=None, keep=None):
    """A pipeline whose joint layers are dense and follow ``rule(row, rows)``, which may look at the state."""
    state = {"step": 0, "calls": 0, "rows": 0}

    def read(module, args, kwargs):
        index = pipe.scheduler.step_index
        state.update(step=(pipe.scheduler.begin_index or 0) if index is None else index, calls=state["calls"] + 1)
        tokens = args[0][0].shape[-2] // 2 * (args[0][0].shape[-1] // 2)
        state["images"] = tokens, -tokens % MULTIPLE
        state["rows"] = len(args[0])
        state["given"] = [len(caption) for caption in args[2]]
        state["lengths"] = [length + -length % MULTIPLE for length in state["given"]]

    layers = [block.attention for block in pipe.transformer.layers]
    before = [layer.processor for layer in layers]
    handle = pipe.transformer.register_forward_pre_hook(read, with_kwargs=True)
    for layer in layers:
        layer.set_processor(DenseZImage(rule, state, turns, fault, keep))
    try:
        yield state
    finally:
        handle.remove()
        for layer, processor in zip(layers, before, strict=True):
            layer.set_processor(processor)
