"""FLUX.3 in small, as its modular pipelines call it, with encoders or without."""

from contextlib import contextmanager, nullcontext

import torch
from diffusers import (
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    Flux3Transformer2DModel,
    modular_pipelines,
)
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers import transformer_flux3
from diffusers.modular_pipelines.flux3 import before_denoise
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tests.support.dense_joint import DenseFlux, linear, replaced_processors
from tests.support.edited_transformers import Model
from tests.support.tiny_language import qwen_tokenizer
from tests.support.tiny_transformers import ExactEuler, sharpened, told_of_steps
from tests.support.wide_torch import widened

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


_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_WIDTH = 16  # of the encoder, of which the model reads two layers
WINDOW = 20  # tokens up to a multiple of which a text is padded


class Processor:
    """What FLUX.3 has in the place of a tokenizer: it holds one, and reads pictures too."""

    image_processor = None

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def apply_chat_template(self, *conversation, **options):
        return self.tokenizer.apply_chat_template(*conversation, **options)


def tiny_flux3_that_reads(pipe=None, dtype=torch.float64, distilled=False, window=WINDOW):
    """A modular pipeline with an encoder, whose windows are short; it has an upsampler of prompts where it is not
    popped."""
    kind = modular_pipelines.Flux3DistilledAutoBlocks if distilled else modular_pipelines.Flux3AutoBlocks
    blocks = kind()
    for name in ("prompt_upsampler", "vae_encoder", "decode"):
        blocks.sub_blocks.pop(name, None)
    blocks.sub_blocks["text_encoder"].pad_multiple = window
    made = blocks.init_pipeline()
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = _CHAT
    text = {"vocab_size": len(tokenizer), "hidden_size": _WIDTH, "intermediate_size": 16, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 512}
    text |= {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2], "mrope_interleaved": True}}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": _WIDTH}
    config = Qwen3VLConfig(text_config=text, vision_config=vision | {"deepstack_visual_indexes": []})
    parts = {} if distilled else {"guider": ClassifierFreeGuidance(guidance_scale=3.0)}
    made.update_components(
        text_encoder=Qwen3VLForConditionalGeneration(config).to(dtype).eval(),
        tokenizer=Processor(tokenizer),
        transformer=tiny_flux3(dtype, flow_map=distilled),
        scheduler=ExactEuler(),
        **parts,
    )
    made.set_progress_bar_config(disable=True)
    return made


def one_by_one(pipe, prompts):
    """Embeddings of prompts as blocks of diffusers encode each, all of the longest one's window."""
    encode = pipe.blocks.sub_blocks["text_encoder"]._get_qwen3_vl_prompt_embeds
    before, after, _ = _Flux3.template(None, pipe)
    read = pipe.tokenizer.tokenizer
    most = max(len(read(before + prompt + after)["input_ids"]) for prompt in prompts)

    def encoded(prompt, window):
        return encode(pipe.text_encoder, pipe.tokenizer, prompt, pad_multiple=window, hidden_states_layers=(1, 2))

    window = -(-most // WINDOW) * WINDOW
    embeddings = {"prompt_embeds": torch.cat([encoded(prompt, window) for prompt in prompts])}
    if hasattr(pipe, "guider"):
        embeddings["negative_prompt_embeds"] = encoded("", WINDOW)
    return embeddings


def draw_flux3_prompts(
    pipe, prompts, *, steps=4, size=(8, 8), seed=0, latents=None, callback_on_step_end=None, **options
):
    """Packed latents of prompts, which start from the same noise."""
    noise = torch.randn(1, 16, size[0] // 2, size[1] // 2, generator=torch.Generator().manual_seed(seed)).double()
    reader = None
    if hasattr(pipe._blocks, "original"):  # in a session
        options |= {"prompt": list(prompts), "text_encoder_out_layers": (1, 2)}
    else:  # embeddings, which blocks with an encoder do not take
        options |= one_by_one(pipe, prompts)
        reader = pipe._blocks.sub_blocks.pop("text_encoder")
    starts = noise.repeat(len(prompts), 1, 1, 1) if latents is None else latents
    wide = widened(transformer_flux3, before_denoise) if pipe.transformer.dtype is torch.float64 else nullcontext()
    try:
        with wide, told_of_steps(pipe, callback_on_step_end):
            return pipe(
                latents=starts,
                height=size[0] * 8,
                width=size[1] * 8,
                num_inference_steps=steps,
                output="latents",
                **options,
            )
    finally:
        if reader is not None:
            pipe._blocks.sub_blocks.insert("text_encoder", reader, 0)


class _DenseOfWords(DenseFlux):
    """The common blocks of FLUX.3: text first, one projection for both, queries and keys normed and turned."""

    def __call__(self, attn, hidden_states, attention_mask=None, image_rotary_emb=None):
        texts, parts = hidden_states.shape[1] - self.texts(), {}
        for letter in "qkv":
            part = linear(getattr(attn, f"to_{letter}"), hidden_states).unflatten(-1, (attn.heads, -1))
            raw = part.transpose(1, 2)
            if letter != "v":
                part = apply_rotary_emb(getattr(attn, f"norm_{letter}")(part), image_rotary_emb, sequence_dim=1)
            part = part.transpose(1, 2)
            parts |= {f"{letter}_text": part[:, :, :texts], f"{letter}_image": part[:, :, texts:]}
            if letter == "q":
                parts["raw"] = raw[:, :, texts:]
        out = torch.stack([self.row(row, len(hidden_states), parts) for row in range(len(hidden_states))])
        return linear(attn.to_out[0], out)


class _Flux3(Model):
    """FLUX.3 by its modular pipeline."""

    @contextmanager
    def dense(self, pipe, rule, layers, fault):
        state, common = {"step": 0, "calls": 0, "images": 0}, "single_transformer_blocks"

        def read(module, args, kwargs):
            images = kwargs["hidden_states"].shape[1]
            state.update(step=pipe.scheduler.step_index or 0, calls=state["calls"] + 1, images=images)

        def processor(name):
            if not name.startswith(common):
                return pipe.transformer.get_submodule(name.removesuffix(".processor")).processor
            made = _DenseOfWords(rule, lambda: state["images"])
            made.fault = fault
            return made

        handle = pipe.transformer.register_forward_pre_hook(read, with_kwargs=True)
        with replaced_processors(pipe.transformer, processor), widened(transformer_flux3):
            try:
                yield state
            finally:
                handle.remove()

    def template(self, pipe):
        said = [{"role": "user", "content": "{}"}]
        before, after = pipe.tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False).split("{}")
        return before, after, 0

    def tokenizer(self, pipe):
        return pipe.tokenizer.tokenizer

    def texts(self, longest):
        return -(-longest // WINDOW) * WINDOW


FLUX3 = _Flux3(tiny_flux3_that_reads, draw_flux3_prompts, family="flux3")


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
