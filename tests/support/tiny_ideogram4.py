"""Tiny Ideogram 4 pipelines, and their layers written out densely."""

from contextlib import ExitStack, contextmanager, nullcontext

import diffusers
import torch
from diffusers.models.transformers import transformer_ideogram4
from diffusers.pipelines.ideogram4 import pipeline_ideogram4
from transformers import Qwen3VLConfig, Qwen3VLModel

from tests.support.dense_joint import DenseFlux, linear, replaced_processors
from tests.support.edited_transformers import Model
from tests.support.tiny_language import qwen_tokenizer
from tests.support.tiny_transformers import ExactEuler, sharpened
from tests.support.wide_torch import widened

__all__ = ["IDEOGRAM4", "TEXTS", "draw_ideogram4", "tiny_ideogram4_pipeline"]

TEXTS = 40  # tokens that every text is filled up to
_WIDTH, _TAPPED = 16, 13  # of the encoder, and how many of its layers the model reads
_SIZE = {
    "in_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "adaln_dim": 16,
    "llm_features_dim": _WIDTH * _TAPPED,
    "mrope_section": (2, 1, 1),
}
_SAYS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _model(seed, dtype):
    torch.manual_seed(seed)
    model = sharpened(diffusers.Ideogram4Transformer2DModel(**_SIZE))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaln_modulation" in name:  # gates of what layers say
                parameter.mul_(4)
    return model.to(dtype).eval()


def tiny_ideogram4_pipeline(pipe=None, dtype=torch.float64):
    """An Ideogram 4 pipeline, whose encoder has as many layers as diffusers reads from."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = _SAYS
    text = {"vocab_size": len(tokenizer), "hidden_size": _WIDTH, "intermediate_size": 16, "num_hidden_layers": 36}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 512}
    text |= {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2], "mrope_interleaved": True}}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": _WIDTH}
    encoder = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision | {"deepstack_visual_indexes": []}))
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
    )
    tiny = diffusers.Ideogram4Pipeline(
        scheduler=ExactEuler(),
        vae=vae.to(dtype).eval(),
        text_encoder=encoder.to(dtype).eval(),
        tokenizer=tokenizer,
        transformer=_model(1, dtype),
        unconditional_transformer=_model(2, dtype),
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def draw_ideogram4(pipe, prompts, *, steps=4, size=(8, 8), guidance=3.0, seed=0, latents=None, **options):
    """Packed latents of ``pipe`` for prompts, which start from the same noise."""
    tokens, wide = size[0] // 2 * (size[1] // 2), pipe.transformer.dtype is torch.float64
    noise = torch.randn(1, tokens, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with widened(pipeline_ideogram4, transformer_ideogram4) if wide else nullcontext():
        return pipe(
            list(prompts),
            guidance_scale=guidance,
            guidance_schedule=None,
            latents=noise.repeat(len(prompts), 1, 1) if latents is None else latents,
            height=size[0] * 8,
            width=size[1] * 8,
            num_inference_steps=steps,
            max_sequence_length=TEXTS,
            output_type="latent",
            **options,
        ).images


class _DenseIdeogram4(DenseFlux):
    """The layers of Ideogram 4: text first and padded in front, of which what counts is put first."""

    def __call__(self, attn, hidden_states, attention_mask=None, image_rotary_emb=None):
        texts = TEXTS if hidden_states.shape[1] > self.texts() else 0
        counts, parts = attention_mask[:, 0, -1, :texts], {}  # of what the image's last token looks at
        order = [torch.cat([row.nonzero()[:, 0], (~row).nonzero()[:, 0]]) for row in counts]
        for letter in "qkv":
            part = linear(getattr(attn, f"to_{letter}"), hidden_states).unflatten(-1, (attn.num_heads, -1))
            raw = part.transpose(1, 2)
            if letter != "v":
                part = getattr(attn, f"norm_{letter}")(part)
                first, second = part.chunk(2, dim=-1)
                cosines, sines = (table.unsqueeze(2) for table in image_rotary_emb)
                part = part * cosines + torch.cat([-second, first], dim=-1) * sines
            part = part.transpose(1, 2)
            if texts:
                text = [row[:, :texts][:, places] for row, places in zip(part, order, strict=True)]
                parts[f"{letter}_text"] = torch.stack(text)
            parts[f"{letter}_image"] = part[:, :, texts:]
            if letter == "q":
                parts["raw"] = raw[:, :, texts:]
        self.mask = torch.stack([row.sort(descending=True).values for row in counts]) if texts else None
        out = [self.row(row, len(hidden_states), parts) for row in range(len(hidden_states))]
        back = [torch.cat([row[:texts][places.argsort()], row[texts:]]) for row, places in zip(out, order, strict=True)]
        return linear(attn.to_out[0], torch.stack(back))


@contextmanager
def _dense(pipe, rule, *, layers="", fault=None):
    """Both models, of which the one that guides is called second."""
    state = {"step": 0, "calls": 0, "tokens": 0}

    def read(module, args, kwargs):
        tokens = kwargs["hidden_states"].shape[1]
        state.update(step=pipe.scheduler.step_index or 0, calls=state["calls"] + 1)
        state["tokens"] = tokens if module is pipe.unconditional_transformer else tokens - TEXTS

    def processor(name):
        follows = name.startswith(layers)
        made = _DenseIdeogram4(rule if follows else lambda row, rows: None, lambda: state["tokens"])
        made.fault = fault if follows else None
        return made

    with ExitStack() as stack:
        for model in (pipe.transformer, pipe.unconditional_transformer):
            stack.callback(model.register_forward_pre_hook(read, with_kwargs=True).remove)
            stack.enter_context(replaced_processors(model, processor))
        yield state


class _Ideogram4(Model):
    def dense(self, pipe, rule, layers, fault):
        return _dense(pipe, rule, layers=layers, fault=fault)

    def template(self, pipe):
        said = [{"role": "user", "content": [{"type": "text", "text": "{}"}]}]
        before, after = pipe.tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False).split("{}")
        return before, after, 0

    def texts(self, longest):
        return TEXTS


IDEOGRAM4 = _Ideogram4(tiny_ideogram4_pipeline, draw_ideogram4, family="ideogram4")
