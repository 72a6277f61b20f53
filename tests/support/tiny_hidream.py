"""Tiny HiDream-I1 pipelines, and their layers written out densely."""

from contextlib import contextmanager

import torch
from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel
from transformers import CLIPTextModelWithProjection, LlamaConfig, LlamaForCausalLM

from tests.support.dense_joint import DenseJoint, linear, replaced_processors
from tests.support.edited_transformers import Model
from tests.support.tiny_language import qwen_tokenizer
from tests.support.tiny_transformers import ExactEuler, sharpened, tiny_clip, tiny_t5

__all__ = ["HIDREAM", "TEXTS", "dense_hidream", "draw_hidream", "tiny_hidream_pipeline"]

TEXTS = 24  # tokens of every text, of T5's and of Llama's
_SIZE = {
    "patch_size": 2,
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "caption_channels": [32, 16],
    "text_emb_dim": 16,
    "num_routed_experts": 2,
    "num_activated_experts": 1,
    "axes_dims_rope": (4, 6, 6),
    "max_resolution": (8, 12),
    "llama_layers": [0, 1, 2],
}
_LOUDER = ("to_q", "to_k", "to_v", "to_q_t", "to_k_t", "to_v_t", "to_out", "to_out_t", "caption_projection")


def tiny_hidream_pipeline(pipe, dtype=torch.float64, **config):
    """A HiDream-I1 pipeline; its tokenizers are that of ``pipe``, and of Llama another."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size, attn_implementation="eager"))
    model = sharpened(HiDreamImageTransformer2DModel(**{**_SIZE, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f".{part}." in f".{name}" for part in _LOUDER):
                parameter.mul_(3)
    first, second = (tiny_clip(pipe.tokenizer, CLIPTextModelWithProjection).to(dtype) for _ in range(2))
    tokenizer.eos_token = tokenizer.pad_token
    tiny = HiDreamImagePipeline(
        scheduler=ExactEuler(),
        vae=None,
        text_encoder=first,
        tokenizer=pipe.tokenizer,
        text_encoder_2=second,
        tokenizer_2=pipe.tokenizer,
        text_encoder_3=tiny_t5(pipe.tokenizer).to(dtype),
        tokenizer_3=pipe.tokenizer,
        text_encoder_4=llama.to(dtype).eval(),
        tokenizer_4=tokenizer,
        transformer=model.to(dtype).eval(),
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def draw_hidream(pipe, prompts, *, steps=4, size=(8, 8), guidance=3.0, seed=0, **options):
    """Latents [prompts, 4, h, w]; the rows start from the same noise."""
    # The pipeline makes every size one of so many pixels, and rounds down.
    pipe.default_sample_size = (size[0] * size[1]) ** 0.5 + 1e-6
    noise = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    options.setdefault("latents", noise.to(pipe.transformer.dtype).repeat(len(prompts), 1, 1, 1))
    return pipe(
        list(prompts),
        negative_prompt=["a drawing"] * len(prompts),
        height=size[0] * 8,
        width=size[1] * 8,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=TEXTS,
        output_type="latent",
        **options,
    ).images


class _DenseHiDream(DenseJoint):
    """The layers of HiDream-I1: image first, and what fills it up, whose keys are zeros, before the text."""

    order = ("image", "pad", "text")
    #: A mistake that is planted: what fills the image up has keys of its own.
    blind = False

    def __init__(self, rule, state):
        super().__init__(rule)
        self.state = state

    def __call__(
        self,
        attn,
        hidden_states,
        hidden_states_masks=None,
        encoder_hidden_states=None,
        image_rotary_emb=None,
    ):
        tokens, text = self.state["tokens"], encoder_hidden_states
        seats, heads = hidden_states.shape[1] - (3 * TEXTS if text is None else 0), (attn.heads, -1)
        parts = {}
        for letter, norm in zip("qkv", ("q_rms_norm", "k_rms_norm", None), strict=True):
            whole = self.projected(attn, letter, norm, "", hidden_states)
            if letter == "k" and hidden_states_masks is not None and not self.blind:
                whole = whole * hidden_states_masks[..., None]
            if text is not None:
                whole = torch.cat([whole, self.projected(attn, letter, norm, "_t", text)], dim=1)
            whole = whole.unflatten(-1, heads)
            if letter == "q":
                parts["raw"] = linear(attn.to_q, hidden_states).unflatten(-1, heads)[:, :tokens].transpose(1, 2)
            if letter != "v":
                pairs = whole.unflatten(-1, (-1, 2))
                whole = torch.einsum("blpij,blhpj->blhpi", image_rotary_emb[:, :, 0], pairs).flatten(-2)
            whole = whole.transpose(1, 2)
            parts[f"{letter}_image"], parts[f"{letter}_text"] = whole[:, :, :tokens], whole[:, :, seats:]
            if seats > tokens:
                parts[f"{letter}_pad"] = whole[:, :, tokens:seats]
        out = torch.stack([self.row(row, len(hidden_states), parts) for row in range(len(hidden_states))])
        if text is None:
            return linear(attn.to_out, out)
        return linear(attn.to_out, out[:, :seats]), linear(attn.to_out_t, out[:, seats:])

    def projected(self, attn, letter, norm, end, tokens):
        part = linear(getattr(attn, f"to_{letter}{end}"), tokens)
        return part if norm is None else getattr(attn, f"{norm}{end}")(part)


@contextmanager
def dense_hidream(pipe, rule, *, layers="", fault=None):
    """A pipeline whose layers with such paths follow ``rule(row, rows)``."""
    state = {"step": 0, "calls": 0, "tokens": 0}

    def read(module, args, kwargs):
        height, width = kwargs["hidden_states"].shape[-2:]
        state.update(step=pipe.scheduler.step_index or 0, calls=state["calls"] + 1, tokens=height * width // 4)

    def processor(name):
        follows = name.startswith(layers)
        made = _DenseHiDream(rule if follows else lambda row, rows: None, state)
        made.fault = fault if follows else None
        return made

    handle = pipe.transformer.register_forward_pre_hook(read, with_kwargs=True)
    try:
        with replaced_processors(pipe.transformer, processor):
            yield state
    finally:
        handle.remove()


class _HiDream(Model):
    def dense(self, pipe, rule, layers, fault):
        return dense_hidream(pipe, rule, layers=layers, fault=fault)

    def texts(self, longest):
        return TEXTS


HIDREAM = _HiDream(tiny_hidream_pipeline, draw_hidream, is_doubled=True, family="hidream")
