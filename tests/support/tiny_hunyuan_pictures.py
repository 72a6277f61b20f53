"""Tiny HunyuanVideo pipelines that begin with a picture, which their language model sees beside the prompt."""

import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoImageToVideoPipeline, HunyuanVideoTransformer3DModel
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from tests.support.tiny_hunyuan_video import HUNYUAN_VIDEO
from tests.support.tiny_language import qwen_tokenizer
from tests.support.tiny_transformers import ExactEuler, sharpened, tiny_clip

__all__ = ["SHOWN", "draw_from_picture", "picture_template", "tiny_hunyuan_autoencoder", "tiny_hunyuan_from_picture"]

TEXTS, SHOWN = 40, 4  # tokens of a text, and of a picture, of which the model receives every second one
_SAID = (
    "<|start_header_id|>system<|end_header_id|>\n\n<image>\na photo<|eot_id|>\n\n<|start_header_id|>user"
    "<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
_SPECIAL = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>", "assistant"]


def tiny_hunyuan_autoencoder():
    """HunyuanVideo's autoencoder."""
    kinds = {"down_block_types": ["HunyuanVideoDownBlock3D"] * 4, "up_block_types": ["HunyuanVideoUpBlock3D"] * 4}
    return AutoencoderKLHunyuanVideo(block_out_channels=[8] * 4, layers_per_block=1, norm_num_groups=2, **kinds).eval()


def tiny_hunyuan_from_picture(pipe, dtype=torch.float64, kind="token_replace"):
    """A HunyuanVideo pipeline that begins with a picture, given in one of diffusers' two kinds."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": _SPECIAL})
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    padding = tokenizer.pad_token_id
    llava = LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LlamaConfig(
                vocab_size=len(tokenizer), max_position_embeddings=512, pad_token_id=padding, **size
            ),
            vision_config=CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=16, **size),
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            pad_token_id=padding,
            image_seq_length=SHOWN,
        )
    )
    channels = {"in_channels": 16 if kind == "token_replace" else 33, "out_channels": 16, "image_condition_type": kind}
    tiny = HunyuanVideoImageToVideoPipeline(
        text_encoder=llava.to(dtype).eval(),
        tokenizer=tokenizer,
        transformer=sharpened(HunyuanVideoTransformer3DModel(**{**HUNYUAN_VIDEO, **channels})).to(dtype).eval(),
        vae=tiny_hunyuan_autoencoder().to(dtype),
        scheduler=ExactEuler(),
        text_encoder_2=tiny_clip(pipe.tokenizer, CLIPTextModel).to(dtype),
        tokenizer_2=pipe.tokenizer,
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
    )
    tiny.set_progress_bar_config(disable=True)
    return tiny


def picture_template(pipe):
    """What the pipeline is told of the text, and of the picture's tokens, around prompts."""
    picture, prompt = (len(pipe.tokenizer(_SAID.partition(mark)[0])["input_ids"]) for mark in ("<image>", "{}"))
    places = {"image_emb_start": picture, "image_emb_end": picture + SHOWN, "image_emb_len": SHOWN}
    return {"template": _SAID, "crop_start": prompt, **places}


def draw_from_picture(pipe, prompts, *, steps=3, guidance=3.0, generator=None, **options):
    """Latents for prompts, which begin with one picture."""
    picture = Image.radial_gradient("L").convert("RGB").resize((64, 64))
    if guidance > 1:
        options |= {"negative_prompt": "a drawing", "true_cfg_scale": guidance}
    options.setdefault("prompt_template", picture_template(pipe))
    return pipe(
        image=[picture] * len(prompts),
        prompt=list(prompts),
        height=64,
        width=64,
        num_frames=5,
        num_inference_steps=steps,
        max_sequence_length=TEXTS,
        generator=generator,
        output_type="latent",
        image_embed_interleave=2,
        **options,
    ).frames
