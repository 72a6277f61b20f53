"""The steps that `tools.py` measures: what each tool does to a pipeline, ours and the original's way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import tools_diffusers
from .tools_dense import (
    Controlled,
    Kept,
    Replaced,
    Shared,
    image_tokens_of_the_source,
    map_of_the_source,
    memory_of_the_source,
)
from .unets import build

__all__ = ["LONG", "TOOLS", "Step", "case_name"]

PROMPTS = ("a photo of a red car on the beach", "a photo of a blue car on the beach")
TEXTS = 64  # tokens of the text of FLUX.1
#: Side of latents from which a call takes many seconds: no unconditional half, so that the originals' maps fit.
LONG = 128
_BYTES = torch.float32.itemsize


@dataclass(frozen=True)
class Step:
    """A step to measure.

    Args:
        step: makes it.
        ours, dense: what is entered around it.
        dense_bytes: of the maps of one layer that the original's way holds at once.
        plain: the step without the tool, where that is another one.
        shared: steps of the same name are the same, so that without a tool they need not be measured again.
    """

    step: Callable[[], torch.Tensor]
    ours: Callable[[], AbstractContextManager[Any]]
    dense: Callable[[], AbstractContextManager[Any]]
    dense_bytes: int = 0
    plain: Callable[[], torch.Tensor] | None = None
    shared: str = ""


def case_name(tool: str, side: int) -> str:
    """A row's case: the tool, the latents, and that there is no guidance where there is none."""
    return f"{tool}/{side}x{side}" + (", unguided" if side >= LONG else "")


def _pipeline(device: str) -> Any:
    """Stable Diffusion of random weights around the UNet."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    from fpe_pipeline.testing.models import words_tokenizer

    tokenizer, unet = words_tokenizer(), _unet(device)
    width = unet.config.cross_attention_dim
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(8,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
        ),
        text_encoder=CLIPTextModel(config).eval(),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _drawn(pipe: Any, side: int) -> Callable[[], torch.Tensor]:
    """A call of one step of a source and a target, from one noise; guided below :data:`LONG`."""
    noise = torch.randn(1, 4, side, side, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)

    def step() -> torch.Tensor:
        scale = 7.5 if side < LONG else 1.0
        options = {"num_inference_steps": 1, "guidance_scale": scale, "output_type": "latent"}
        size = {"height": 8 * side, "width": 8 * side}
        out: torch.Tensor = pipe(list(PROMPTS), latents=noise.to(pipe.device), **options, **size).images
        return out

    return step


def _maps(rows: int, side: int, copies: int = 2) -> int:
    """Bytes of so many maps of the largest layer at once: the scores and their softmax."""
    return copies * rows * side**4 * _BYTES


def _rows(side: int) -> int:
    """Of the batch of a source and a target."""
    return 4 if side < LONG else 2


def _computed(
    pipe: Any, compute: Any, kinds: tuple[str, ...] = ("self", "cross"), guided: bool | None = None
) -> AbstractContextManager[Any]:
    from fpe_pipeline.compat.controlled import ControlledLayers

    return ControlledLayers(pipe, compute, kinds=kinds, guided=guided)


def _unet(device: str) -> Any:
    """The smallest UNet that has layers at the latent's resolution, with weights at which attention matters."""
    unet = build("tiny", device, torch.float32)
    for name, parameter in unet.named_parameters():  # as they are drawn, every map would be nearly uniform
        if name.endswith(("to_q.weight", "to_k.weight")):
            parameter.mul_(4.0)
    return unet


def _controlled(make: Callable[[Any], tuple[Any, Any]], side: int, device: str) -> Step:
    """A tool whose controller sees maps: ``make`` gives a controller, and what registers one on a pipeline."""
    pipe = _pipeline(device)

    def ours() -> AbstractContextManager[Any]:
        controller, register = make(pipe)
        registered: AbstractContextManager[Any] = register(pipe, controller)
        return registered

    def dense() -> AbstractContextManager[Any]:
        from fpe_pipeline.compat.controlled import ControlledLayers

        controller, _ = make(pipe)
        controller.prepare(pipe.tokenizer)
        words = getattr(controller, "prev_controller", None) or controller
        if not hasattr(words, "mapper"):
            layers = ControlledLayers(pipe, Controlled(controller))
            controller.num_att_layers = layers.layers
            return layers
        factors = getattr(controller, "equalizer", None)
        return _computed(pipe, Controlled(Replaced(words.mapper, factors, words.self_tokens)))

    return Step(_drawn(pipe, side), ours, dense, _maps(_rows(side), side, 4), shared="drawn")


def _prompt_to_prompt(pipe: Any) -> tuple[Any, Any]:
    from fpe_pipeline.compat.prompt_to_prompt import AttentionReplace, ptp_utils

    return AttentionReplace(list(PROMPTS), 1, 1.0, 1.0), ptp_utils.register_attention_control


def _pnp_inversion(pipe: Any) -> tuple[Any, Any]:
    from fpe_pipeline.compat.pnp_inversion import make_controller
    from fpe_pipeline.compat.prompt_to_prompt import ptp_utils

    factors = {"words": ("blue",), "values": (2.0,)}
    made = make_controller(pipe, list(PROMPTS), True, {"default_": 1.0}, 1.0, None, factors, num_ddim_steps=1)
    return made, ptp_utils.register_attention_control


def _free_prompt(side: int) -> Callable[[Any], tuple[Any, Any]]:
    def make(pipe: Any) -> tuple[Any, Any]:
        from fpe_pipeline.compat.free_prompt_editing import SelfAttentionControlEdit, register_attention_control_new

        return SelfAttentionControlEdit(PROMPTS, 1, side, 1.0), register_attention_control_new

    return make


def _masactrl(side: int, device: str) -> Step:
    from fpe_pipeline.compat.masactrl import MutualSelfAttentionControl, regiter_attention_editor_diffusers

    pipe = _pipeline(device)

    def ours() -> AbstractContextManager[Any]:
        return regiter_attention_editor_diffusers(pipe, MutualSelfAttentionControl(start_step=0, start_layer=0))

    dense = partial(_computed, pipe, memory_of_the_source)
    return Step(_drawn(pipe, side), ours, dense, _maps(_rows(side), side), shared="drawn")


def _pnp_diffusers(side: int, device: str) -> Step:
    from fpe_pipeline.compat.pnp_diffusers import register_attention_control_efficient, register_time

    pipe = _pipeline(device)
    width = pipe.unet.config.cross_attention_dim
    branches = 3 if side < LONG else 2
    latents = torch.randn(branches, 4, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    texts = torch.randn(branches, 77, width, generator=torch.Generator().manual_seed(1)).to(device)

    def ours() -> AbstractContextManager[Any]:
        registered = register_attention_control_efficient(pipe, [1], branches=branches)
        register_time(pipe, 1)
        return registered

    def dense() -> AbstractContextManager[Any]:
        from fpe_pipeline.compat.controlled import LayerCall
        from fpe_pipeline.edits.plug_and_play import PlugAndPlayEdit

        from .tools_dense import product, written_out

        layers = _computed(pipe, lambda call: compute(call), guided=False)
        chosen = {site.path for site in PlugAndPlayEdit().default_sites(layers.sites)}  # type: ignore[attr-defined]

        def compute(call: LayerCall) -> torch.Tensor:
            if call.site.path in chosen:
                return map_of_the_source(call)
            return product(written_out(call.query, call.key, call.scale), call.value)

        return layers

    @torch.no_grad()
    def step() -> torch.Tensor:
        out: torch.Tensor = pipe.unet(latents, 1, texts).sample
        return out

    return Step(step, ours, dense, _maps(branches, side))


def _style_aligned(side: int, device: str) -> Step:
    from fpe_pipeline.compat.style_aligned import Handler, StyleAlignedArgs

    pipe = _pipeline(device)
    arguments = StyleAlignedArgs(share_group_norm=False, share_layer_norm=False)
    ours, dense = (lambda: Handler(pipe).register(arguments)), (lambda: _computed(pipe, Shared()))
    return Step(_drawn(pipe, side), ours, dense, shared="drawn")


def _kept(tool: str, side: int, device: str) -> Step:
    pipe = _pipeline(device)

    def ours() -> AbstractContextManager[Any]:
        from fpe_pipeline.compat.attention_map_diffusers import watched_pipeline
        from fpe_pipeline.compat.daam import trace

        watched: AbstractContextManager[Any] = trace(pipe) if tool == "daam" else watched_pipeline(pipe)
        return watched

    def dense() -> AbstractContextManager[Any]:
        half = (lambda maps: maps[-2:]) if tool == "daam" else (lambda maps: maps)
        return _computed(pipe, Kept(half), ("cross",))

    return Step(_drawn(pipe, side), ours, dense, shared="drawn")


def _flux(parts: str, side: int, device: str) -> Step:
    """Stable Flow, FreeFlux or ConsistEdit in the one single block of a FLUX.1 of random weights."""
    from diffusers import FluxTransformer2DModel

    from fpe_pipeline import ConsistEdit, StableFlowEdit, editing

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
        guidance_embeds=False,
    )
    model = model.to(device).eval().requires_grad_(False)
    random = torch.Generator().manual_seed(1)
    places = torch.arange(side, dtype=torch.float32)
    grid = torch.cartesian_prod(torch.zeros(1), places, places).to(device)
    given = {
        "hidden_states": torch.randn(2, side * side, 16, generator=random).to(device),
        "encoder_hidden_states": torch.randn(2, TEXTS, 32, generator=random).to(device),
        "pooled_projections": torch.randn(2, 32, generator=random).to(device),
        "timestep": torch.ones(2, device=device),
        "img_ids": grid,
        "txt_ids": torch.zeros(TEXTS, 3, device=device),
    }
    is_structure = parts == "qk"
    edit = ConsistEdit(layers=[0, 1]) if is_structure else StableFlowEdit(layers=[0, 1])

    @contextmanager
    def ours() -> Iterator[None]:
        with editing(model, edit, classifier_free_guidance=False) as session:
            session.step(0, 1)
            yield

    @torch.no_grad()
    def step() -> torch.Tensor:
        out: torch.Tensor = model(**given).sample
        return out

    return Step(step, ours, lambda: image_tokens_of_the_source(TEXTS, parts), shared="flux")


_Call = Callable[[Any, Any, Any], torch.Tensor]


def _accelerated(prepare: Callable[[Any], _Call], plain: _Call, rows: int, copies: int) -> Any:
    """A case of diffusers' own: ``prepare`` sets processors and gives the step, ``plain`` is the step without maps."""

    def make(side: int, device: str) -> Step:
        from fpe_pipeline.compat import accelerate

        unet, fused = _unet(device), _unet(device)
        call = prepare(unet)
        latents = torch.randn(rows, 4, side, side, generator=torch.Generator().manual_seed(0)).to(device)
        texts = torch.randn(rows, 77, 32, generator=torch.Generator().manual_seed(1)).to(device)
        return Step(
            lambda: call(unet, latents, texts),
            lambda: accelerate(unet),
            nullcontext,
            _maps(rows, side, copies),
            plain=lambda: plain(fused, latents, texts),
        )

    return make


#: By name, what makes a tool's step at a side of the latents on a device.
TOOLS: dict[str, Callable[[int, str], Step]] = {
    "prompt-to-prompt": partial(_controlled, _prompt_to_prompt),
    "free-prompt-editing": lambda side, device: _controlled(_free_prompt(side), side, device),
    "pnp-inversion": partial(_controlled, _pnp_inversion),
    "masactrl": _masactrl,
    "pnp-diffusers": _pnp_diffusers,
    "style-aligned": _style_aligned,
    "daam": partial(_kept, "daam"),
    "attention-map-diffusers": partial(_kept, "attention-map-diffusers"),
    "stable-flow": partial(_flux, "kv"),
    "free-flux": partial(_flux, "kv"),
    "consist-edit": partial(_flux, "qk"),
    "attend-and-excite": _accelerated(tools_diffusers.excite, tools_diffusers.gradient, 1, 8),
    "pix2pix-zero": _accelerated(tools_diffusers.zero, tools_diffusers.gradient, 2, 8),
    "ledits++": _accelerated(tools_diffusers.ledits, tools_diffusers.forward, 2, 2),
    "sag": _accelerated(tools_diffusers.sag, tools_diffusers.forward, 2, 0),
}
