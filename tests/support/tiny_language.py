"""Tiny language models that encode prompts inside a text of the pipeline's own, as those of Qwen-Image and Lumina 2."""

import torch
from diffusers import AutoencoderKLQwenImage, Lumina2Pipeline, QwenImagePipeline
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from tests.support.tiny_lumina import LUMINA, tiny_lumina_pipeline
from tests.support.tiny_transformers import QWEN, ExactEuler, tiny_qwen, tiny_vae

__all__ = ["draw_prompts", "tiny_lumina_that_reads", "tiny_qwen_that_reads"]

_CORPUS = ["a photo of a red car on a mountain", "a photo of a big dog on a house in winter", "a drawing, a house"] * 4


def _trained(tokenizer, specials, size):
    tokenizer.train_from_iterator(
        _CORPUS, trainers.BpeTrainer(vocab_size=size, special_tokens=specials, show_progress=False)
    )
    return tokenizer


def qwen_tokenizer():
    """Byte-level: the blank before a word is part of its token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=specials[0],
        additional_special_tokens=specials[1:],
        model_max_length=131072,
    )


def gemma_tokenizer():
    """Blanks are marks of their own before words, so that a prompt begins otherwise where a text precedes it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=False))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Replace("▁", " ")
    letters = ["Write of system, <Prompt Start> abcdefghijklmnopqrstuvwxyz"]
    trainer = trainers.BpeTrainer(vocab_size=160, special_tokens=["<pad>", "<bos>", "<unk>"], show_progress=False)
    tokenizer.train_from_iterator(_CORPUS + letters, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>", padding_side="right"
    )


def tiny_video_vae():
    """Qwen-Image's autoencoder, of which a picture is a video of one frame."""
    return AutoencoderKLQwenImage(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def tiny_qwen_that_reads(dtype=torch.float64, **config):
    """A Qwen-Image pipeline with an encoder and a tokenizer, whose template is as long as that tokenizer makes it."""
    torch.manual_seed(2)
    tokenizer = qwen_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": QWEN["joint_attention_dim"],
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
    }
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16}
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))
    tiny = QwenImagePipeline(
        scheduler=ExactEuler(),
        vae=tiny_video_vae().to(dtype),
        text_encoder=encoder.to(dtype).eval(),
        tokenizer=tokenizer,
        transformer=tiny_qwen(dtype, **config),
    )
    before = tiny.prompt_template_encode.partition("{}")[0]
    tiny.prompt_template_encode_start_idx = len(tokenizer(before)["input_ids"])
    tiny.set_progress_bar_config(disable=True)
    return tiny


def tiny_lumina_that_reads(dtype=torch.float64, **config):
    """A Lumina 2 pipeline with an encoder, a tokenizer and an autoencoder."""
    torch.manual_seed(2)
    tokenizer = gemma_tokenizer()
    encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(tokenizer),
            hidden_size=LUMINA["cap_feat_dim"],
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=512,
        )
    )
    other = tiny_lumina_pipeline(dtype, axes_lens=(400, 32, 32), **config)
    parts = other.transformer, other.scheduler, tiny_vae().to(dtype), encoder.to(dtype).eval(), tokenizer
    tiny = Lumina2Pipeline(*parts)
    tiny.system_prompt = "Write of a photo"
    tiny.set_progress_bar_config(disable=True)
    return tiny


def draw_prompts(
    pipe, prompts, *, steps=4, size=(8, 8), seed=0, guidance=3.0, negative="a drawing", latents=None, **options
):
    """Latents of either pipeline for prompts, which start from the same noise."""
    dtype, packed = pipe.transformer.dtype, isinstance(pipe, QwenImagePipeline)
    shape = (1, size[0] * size[1] // 4, 64) if packed else (1, 16, *size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    told = {"true_cfg_scale": guidance} if packed else {"guidance_scale": guidance}
    return pipe(
        prompt=list(prompts),
        negative_prompt=[negative] * len(prompts),
        latents=noise.repeat(len(prompts), *[1] * (noise.ndim - 1)).to(dtype) if latents is None else latents,
        height=size[0] * 8,
        width=size[1] * 8,
        num_inference_steps=steps,
        output_type="latent",
        **told,
        **options,
    ).images
