"""Modular pipelines of the parts of ordinary ones, and the last latents that a model gets from either."""

import types

import torch
from diffusers import ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler, modular_pipelines
from diffusers.modular_pipelines.wan import encoders

from tests.support.tiny_cross import tiny_ltx_pipeline
from tests.support.tiny_flux2 import embedded, tiny_flux2_that_encodes, tiny_klein_pipeline
from tests.support.tiny_ideogram4 import tiny_ideogram4_pipeline
from tests.support.tiny_language import tiny_qwen_that_reads
from tests.support.tiny_pipelines import tiny_sdxl_pipeline
from tests.support.tiny_transformers import tiny_flux_pipeline, tiny_qwen_pipeline, tiny_sd3_pipeline
from tests.support.tiny_wan import tiny_wan_pipeline
from tests.support.tiny_z_image import captions, tiny_z_image_pipeline, tiny_z_image_that_reads

PROMPTS = ["a photo of a red car", "a photo of a blue car"]
SIZE = {"num_inference_steps": 4, "height": 64, "width": 64}
GUIDANCE = 4.0


def modular(blocks, pipe, *, guiders=("guider",), left_out=("decode",), guidance=GUIDANCE, **more):
    """A modular pipeline of an ordinary one's parts, without some of its blocks."""
    made = getattr(modular_pipelines, blocks)()
    for name in left_out:
        made.sub_blocks.pop(name)
    twin = made.init_pipeline()
    parts = {name: part for name, part in pipe.components.items() if name in twin.component_names and part is not None}
    guided = {name: ClassifierFreeGuidance(guidance_scale=guidance) for name in guiders}
    twin.update_components(**parts, **guided, **more)
    twin.set_progress_bar_config(disable=True)
    return twin


def _with_euler(pipe, **options):
    pipe.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(**options))
    return pipe


def sd3_twins(pipe):
    one = _with_euler(tiny_sd3_pipeline(pipe, dtype=torch.float32))
    both = SIZE | {"prompt": list(PROMPTS), "negative_prompt": "", "max_sequence_length": 16}
    return one, modular("StableDiffusion3AutoBlocks", one), both | {"guidance_scale": GUIDANCE}, both


def flux_twins(pipe):
    one = _with_euler(tiny_flux_pipeline(pipe, torch.float32))
    both = SIZE | {"prompt": list(PROMPTS), "max_sequence_length": 16}
    return one, modular("FluxAutoBlocks", one, guiders=()), both, both


def sdxl_twins(pipe):
    one = tiny_sdxl_pipeline(pipe)
    one.set_progress_bar_config(disable=True)
    both = SIZE | {"prompt": list(PROMPTS)}
    return one, modular("StableDiffusionXLAutoBlocks", one), both | {"guidance_scale": GUIDANCE}, both


def wan_twins(pipe, transformers=1):
    encoders.ftfy = types.SimpleNamespace(fix_text=str)  # a package that the blocks ask for in any case
    one = _with_euler(tiny_wan_pipeline(pipe, transformers, torch.float32))
    both = SIZE | {"prompt": list(PROMPTS), "negative_prompt": "", "num_frames": 9, "max_sequence_length": 512}
    if transformers == 1:
        twin = modular("WanBlocks", one)
    else:
        twin = modular("Wan22Blocks", one, guiders=("guider", "guider_2"), boundary_ratio=0.5)
    noise = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1, 1)
    both["latents"] = noise
    return one, twin, both | {"guidance_scale": GUIDANCE}, {k: v for k, v in both.items() if k != "max_sequence_length"}


def ltx_twins(pipe):
    one = _with_euler(
        tiny_ltx_pipeline(pipe, torch.float32), use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05
    )
    both = SIZE | {"prompt": list(PROMPTS), "negative_prompt": "", "num_frames": 17, "max_sequence_length": 16}
    return one, modular("LTXAutoBlocks", one), both | {"guidance_scale": GUIDANCE}, both


def qwen_twins(pipe):
    one = _with_euler(tiny_qwen_pipeline(torch.float32))
    texts = torch.randn(2, 2, 7, 16, generator=torch.Generator().manual_seed(3))
    both = SIZE | {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]}
    both |= {name: torch.ones(2, 7, dtype=torch.long) for name in ("prompt_embeds_mask", "negative_prompt_embeds_mask")}
    twin = modular("QwenImageAutoBlocks", one, left_out=("text_encoder", "decode"))
    return one, twin, both | {"true_cfg_scale": GUIDANCE}, both


def klein_twins(pipe):
    one = _with_euler(tiny_klein_pipeline(torch.float32, guidance_embeds=False), use_dynamic_shifting=True)
    texts, negative = embedded(PROMPTS, torch.float32), embedded(["a", "b"], torch.float32)
    both = SIZE | {"prompt_embeds": texts, "negative_prompt_embeds": negative}
    twin = modular("Flux2KleinBaseAutoBlocks", one, left_out=("text_encoder", "decode"))
    return one, twin, both | {"guidance_scale": GUIDANCE}, both


def z_image_twins(pipe):
    """Its pipeline's guidance counts from 0."""
    one = _with_euler(tiny_z_image_pipeline(torch.float32))
    texts = {"prompt_embeds": captions((7, 7), 0, torch.float32)}
    texts["negative_prompt_embeds"] = captions((7, 7), 1, torch.float32)
    both = SIZE | texts
    twin = modular("ZImageAutoBlocks", one, left_out=("text_encoder", "decode"))
    return one, twin, both | {"guidance_scale": GUIDANCE - 1}, both


def _with_inner(blocks):
    yield blocks
    for inner in getattr(blocks, "sub_blocks", {}).values():
        yield from _with_inner(inner)


def reading_qwen_twins(pipe):
    one = _with_euler(tiny_qwen_that_reads(torch.float32))
    twin = modular("QwenImageAutoBlocks", one)
    for block in _with_inner(twin._blocks):
        if hasattr(block, "prompt_template_encode_start_idx"):  # as long as the tiny tokenizer makes it
            block.prompt_template_encode_start_idx = one.prompt_template_encode_start_idx
    both = SIZE | {"prompt": list(PROMPTS), "negative_prompt": ["a drawing"] * 2, "max_sequence_length": 60}
    return one, twin, both | {"true_cfg_scale": GUIDANCE}, both


def reading_klein_twins(pipe):
    one = tiny_flux2_that_encodes("Flux2KleinPipeline", torch.float32)
    one = _with_euler(one, use_dynamic_shifting=True)
    both = SIZE | {"prompt": list(PROMPTS), "max_sequence_length": 60}
    return one, modular("Flux2KleinBaseAutoBlocks", one), both | {"guidance_scale": GUIDANCE}, both


def reading_z_image_twins(pipe):
    """Its negative prompts are filled up to another length than its prompts, with which they do not share a call."""
    one = _with_euler(tiny_z_image_that_reads(torch.float32))
    both = SIZE | {"prompt": list(PROMPTS), "negative_prompt": ["a drawing, " * 6] * 2, "max_sequence_length": 128}
    return one, modular("ZImageAutoBlocks", one), both | {"guidance_scale": GUIDANCE - 1}, both


def ideogram4_twins(pipe):
    """Guided by a model of their own, at a scale for every step."""
    one = _with_euler(tiny_ideogram4_pipeline(dtype=torch.float32))
    both = SIZE | {"prompt": list(PROMPTS), "max_sequence_length": 40, "guidance_schedule": [GUIDANCE] * 4}
    return one, modular("Ideogram4AutoBlocks", one, guiders=()), both, both


#: Ordinary pipelines and modular ones of the same parts, with what calls of each take.
TWINS = {
    "sd3": sd3_twins,
    "flux": flux_twins,
    "sdxl": sdxl_twins,
    "wan": wan_twins,
    "wan2.2": lambda pipe: wan_twins(pipe, 2),
    "ltx": ltx_twins,
    "qwen": qwen_twins,
    "klein": klein_twins,
    "z_image": z_image_twins,
    "ideogram4": ideogram4_twins,
}
#: Those that read prompts, of which words are found.
OF_WORDS = {name: TWINS[name] for name in ("sd3", "flux", "sdxl", "wan", "wan2.2", "ltx", "ideogram4")} | {
    "qwen": reading_qwen_twins,
    "klein": reading_klein_twins,
    "z_image": reading_z_image_twins,
}


def last_latents(pipe, generator=None, **call):
    """What the model of a pipeline gets at the last step, of the rows that see their prompts or of as many."""
    seen = []

    def keep(module, args, kwargs):
        given = next(
            (kwargs[name] for name in ("hidden_states", "sample", "x") if name in kwargs), args[0] if args else None
        )
        seen.append(torch.stack(list(given)) if isinstance(given, list | tuple) else given.detach().clone())

    models = [getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2")]
    handles = [model.register_forward_pre_hook(keep, with_kwargs=True) for model in models if model is not None]
    try:
        is_modular = hasattr(pipe, "blocks")
        call |= {"output": "latents"} if is_modular else {}
        pipe(generator=generator or torch.Generator().manual_seed(0), output_type="latent", **call)
    finally:
        for handle in handles:
            handle.remove()
    return seen[-1][-len(PROMPTS) :]
