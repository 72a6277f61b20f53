"""Tiny FLUX.2 pipelines, which take embeddings: random weights, scaled so that attention is far from uniform."""

import diffusers
import torch
from tokenizers import processors
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.support.tiny_language import qwen_tokenizer
from tests.support.tiny_transformers import FLUX, ExactEuler, sharpened

FLUX2 = {name: size for name, size in FLUX.items() if name != "pooled_projection_dim"} | {
    "timestep_guidance_channels": 16,
    "axes_dims_rope": (2, 2, 2, 2),
}
TEXT, READ = 12, 60  # tokens of embeddings, and of texts that are read
#: What stands around a prompt, and how a tokenizer is told so.
CONVERSATION = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)
#: The same of [dev], whose system speaks first; its tokenizer begins every text.
INSTRUCTION = "[SYSTEM_PROMPT]Write of {}[/SYSTEM_PROMPT][INST]{}[/INST]"
_TURNS = ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"]
_INSTRUCTED = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}[SYSTEM_PROMPT]{{ message.content }}"
    "[/SYSTEM_PROMPT]{% else %}[INST]{{ message.content }}[/INST]{% endif %}{% endfor %}"
)


def tiny_flux2_pipeline(dtype=torch.float64, name="Flux2Pipeline", encoder=None, tokenizer=None, **config):
    """FLUX.2 [dev], or another pipeline of its transformer."""
    torch.manual_seed(0)
    guidance = {"guidance_embeds": name == "Flux2Pipeline"}
    transformer = sharpened(diffusers.Flux2Transformer2DModel(**{**FLUX2, **guidance, **config}))
    with torch.no_grad():
        for block in transformer.single_transformer_blocks:
            queries_and_keys = 2 * block.attn.inner_dim
            block.attn.to_qkv_mlp_proj.weight[:queries_and_keys].mul_(2.5)
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4,) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=2,
    )
    parts = {"vae": vae.to(dtype).eval(), "transformer": transformer.to(dtype).eval()}
    tiny = getattr(diffusers, name)(scheduler=ExactEuler(), text_encoder=encoder, tokenizer=tokenizer, **parts)
    tiny.set_progress_bar_config(disable=True)
    return tiny


def tiny_klein_pipeline(dtype=torch.float64, **config):
    """FLUX.2 [klein], which guides by a second call."""
    return tiny_flux2_pipeline(dtype, "Flux2KleinPipeline", **config)


def tiny_klein_that_reads(dtype=torch.float64, **config):
    """FLUX.2 [klein] with an encoder and a tokenizer."""
    torch.manual_seed(2)
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = _CHAT
    encoder = _encoder(tokenizer, 32, 1).to(dtype).eval()
    return tiny_klein_pipeline(dtype, encoder=encoder, tokenizer=tokenizer, **config)


def tiny_dev_that_reads(dtype=torch.float64, padding_side="left", **config):
    """FLUX.2 [dev] with an encoder and a processor."""
    torch.manual_seed(2)
    tokenizer = _instructed_tokenizer()
    tokenizer.padding_side = padding_side
    tiny = tiny_flux2_pipeline(
        dtype, encoder=_encoder(tokenizer, 32, 1).to(dtype).eval(), tokenizer=tokenizer, **config
    )
    return _processed(tiny)


def _instructed_tokenizer():
    tokenizer = qwen_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": _TURNS})
    begins = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=begins)
    tokenizer.chat_template = _INSTRUCTED
    return tokenizer


def _encoder(tokenizer, width, layers):
    size = {"hidden_size": width, "intermediate_size": width // 2, "num_hidden_layers": layers, "head_dim": width // 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), max_position_embeddings=512, **size, **heads))


def _processed(tiny):
    """A pipeline that has its tokenizer inside a processor, and something to say before a prompt."""
    tiny.tokenizer, tiny.system_message = Processor(tiny.tokenizer), "Write of {}"
    return tiny


class Processor:
    """What FLUX.2 [dev] has in the place of a tokenizer: it holds one, and reads pictures too."""

    image_processor = None

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def apply_chat_template(self, conversations, **options):
        said = [[{**turn, "content": turn["content"][0]["text"]} for turn in one] for one in conversations]
        options["return_tensors"] = "pt"
        return self.tokenizer.apply_chat_template(said, **options)


def tiny_flux2_that_encodes(name="Flux2Pipeline", dtype=torch.float64, **settings):
    """FLUX.2 [dev] or [klein] whose encoder is as deep as the pipeline's own choice of layers asks for, with an
    autoencoder that has seen something.

    Args:
        settings: of the pipeline, such as ``is_distilled``.
    """
    torch.manual_seed(2)
    is_dev = name == "Flux2Pipeline"
    tokenizer = _instructed_tokenizer() if is_dev else qwen_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template or _CHAT
    encoder = _encoder(tokenizer, 8, 30).to(dtype).eval()
    tiny = tiny_flux2_pipeline(dtype, name, encoder, tokenizer, joint_attention_dim=24)
    tiny = _processed(tiny) if is_dev else tiny
    statistics = tiny.vae.bn
    statistics.running_mean.normal_(0, 0.1)
    statistics.running_var.uniform_(0.1, 0.5)
    tiny.register_to_config(**settings)
    return tiny


def embedded(texts, dtype):
    """Embeddings [prompts, tokens, 32] of texts, the same for equal ones."""
    return torch.stack(
        [
            torch.randn(TEXT, 32, generator=torch.Generator().manual_seed(sum(map(ord, text))), dtype=torch.float64)
            for text in texts
        ]
    ).to(dtype)


def draw_flux2(pipe, prompts, *, steps=4, size=(8, 8), seed=0, negative=None, latents=None, **options):
    """Latents of ``pipe`` for prompts, which start from the same noise; packed in [dev]."""
    dtype = pipe.transformer.dtype
    noise = torch.randn(1, 16 * 4, size[0] // 2, size[1] // 2, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if negative is not None:
        options |= {"negative_prompt_embeds": embedded([negative] * len(prompts), dtype), "guidance_scale": 3.0}
    if pipe.text_encoder is None:
        options["prompt_embeds"] = embedded(prompts, dtype)
    else:
        options |= {"prompt": list(prompts), "max_sequence_length": READ, "text_encoder_out_layers": (1,)}
    return pipe(
        latents=noise.repeat(len(prompts), 1, 1, 1) if latents is None else latents,
        height=size[0] * 8,
        width=size[1] * 8,
        num_inference_steps=steps,
        output_type="latent",
        **options,
    ).images


def with_a_plain_tokenizer(tiny):
    """A pipeline of [dev] with the tokenizer alone in the place of its processor, which transformers could not load
    without torchvision."""
    tokenizer = tiny.tokenizer.tokenizer
    tokenizer.chat_template = tokenizer.chat_template.replace("message.content", "message.content[0].text")
    tiny.register_modules(tokenizer=tokenizer)
    return tiny
