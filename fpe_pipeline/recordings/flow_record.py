"""Recording a source on a transformer, whatever edits need of its image and text tokens."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..edits import Edit
from ..edits.base import check_prompts
from ..errors import check_generator, check_guidance, check_positive, check_text_length
from ..inversion.flow import check_flow_inversion, with_size_of
from ..inversion.follow import Followed, check_inversion_options
from ..inversion.trajectory import Inversion
from ..models.adapters.families import adapter_of
from ..models.flow_solvers import require_flow
from ..models.sites import Site
from ..models.steps import run_steps
from ..prompts.encoding import encoding_tokenizer
from ..sampling.arguments import check_option_names
from ..sampling.flow_models import FlowModel
from ..sampling.flow_sampling import FlowSampling, chosen_flow_edit, flow_start
from ..sampling.noise_schedule import NoiseSchedule
from ..sampling.step_end import Call
from ..session.entry import check_words
from ..session.finite import check_latents
from ..texts import check_text, print_text
from .capture import Capture
from .contents import recorded_steps, source_needs
from .fingerprint import fingerprint
from .flow_capture import JointCapture, recorded_bytes
from .keys import Part
from .plan import KeptLatents, Plan, new_store
from .precision import Precision
from .record_request import check_placement
from .recording import Recording
from .store import MapStore

__all__ = ["flow_sites", "record_flow"]

_OPTIONS = frozenset(
    {"generator", "height", "width", "num_inference_steps", "guidance_scale", "negative_prompt", "max_sequence_length"}
)
_OWN = frozenset({"prompt", "edit", "placement", "precision", "budget_bytes", "inversion", "latents", "backend"})


@torch.no_grad()
def record_flow(
    pipe: FlowSampling,
    prompt: str | None = None,
    *,
    self_replace_steps: Any = None,
    layers: Any = None,
    edit: Edit | Sequence[Edit] | None = None,
    placement: str | Path = "device",
    precision: Precision = "exact",
    budget_bytes: int | None = None,
    inversion: Inversion | None = None,
    latents: torch.Tensor | None = None,
    backend: str = "auto",
    **options: Any,
) -> Recording:
    """Generate the source once and keep what edits need of it, for any number of them.

    Tokens are kept by segment, after their norms and rotary embedding: of image queries and keys alone, for the default
    edit, and of the steps that it replaces.

    Args:
        prompt: the source's; default with `inversion`: its prompt.
        self_replace_steps, layers: of the `FreePromptEdit` to record for; edits may replace fewer steps.
        edit: another edit to record for, or several, each of which the recording then serves, and with it every edit
            that needs no more.
        placement: "device", "cpu" (pinned beside a GPU), or a new folder; one that is called as a device is goes as a
            `Path`.
        precision: "exact" or "half"; `Recording.error` is what it costs.
        budget_bytes: refuse to record more. The estimate goes to standard error unless progress bars are off.
        inversion: a real image as the source; it decides latents, size and steps.
        latents: the noise to start from, of one row.
        backend: attention backend.
        **options: `generator`, `height`, `width`, `num_inference_steps`, `guidance_scale`, `negative_prompt`,
            `true_cfg_scale` (of FLUX.1 and Qwen-Image, beside a negative prompt) and `max_sequence_length`, as in a
            call.

    Returns:
        `Recording`; one in a folder is read again by `Recording.load`.

    Raises:
        TypeError: an unknown option.
        ValueError: a scheduler that draws noise in each step, a budget that is too small, layers that match nothing, an
            edit that is written for another source; before any denoising. Values that do not fit a reduced precision.
        InputError: a folder that is not empty or cannot be written.
    """
    model = pipe.flow()
    check_option_names(options, _OWN, _options(pipe, model))
    check_generator(options.get("generator"))
    check_text_length(options.get("max_sequence_length"))
    if precision not in ("exact", "half"):
        raise ValueError(f"precision must be exact or half for layers of joint attention, got {precision!r}")
    require_flow(model.pipe.scheduler, "a recording")
    if inversion is not None:
        negative, steps = None, options.get("num_inference_steps")
        check_inversion_options(inversion, {"latents": latents}, negative, steps, is_flow=True)
        check_flow_inversion(inversion, model)
        prompt = inversion.prompt if prompt is None else prompt
        options = with_size_of(inversion, options)
        latents = model.taken(inversion.noise, (options["height"], options["width"]))
    source = _source(pipe, model, prompt, inversion, options)
    given = edit if isinstance(edit, Sequence) else (edit,)
    if not given:
        raise ValueError("expected an edit to record for, or several, got none: leave edit out for its default")
    edits = [chosen_flow_edit(pipe, one, self_replace_steps, layers) for one in given]
    for one in edits:
        check_prompts(one, [source.prompt], encoding_tokenizer(pipe))
        check_words(adapter_of(pipe), one)
    check_placement(placement)
    check_latents(latents)
    plan = _plan(model, source, edits, _noise(model, latents, options), precision)
    plan.check_budget(budget_bytes, "record fewer steps (self_replace_steps) or layers (layers), pass precision='half'")
    if not pipe.progress_is_hidden:
        print_text(f"recording: {plan.told}, placed on {placement}", sys.stderr)
    return _run(pipe, model, source, plan, new_store(placement, plan.noise.device), precision, backend)


def _options(pipe: FlowSampling, model: FlowModel) -> frozenset[str]:
    """Arguments of a call that a recording takes."""
    left_out = frozenset() if model.takes_guidance else {"guidance_scale"}
    return ((_OPTIONS | {"true_cfg_scale"}) - left_out) & pipe.parent_options()


@dataclass(frozen=True)
class _Source:
    """The run that is recorded."""

    prompt: str
    negative_prompt: str | None
    guidance_scale: float
    steps: int
    text_length: int
    is_guided: bool
    inversion: Inversion | None
    true_cfg_scale: float | None = None

    @property
    def away(self) -> str:
        """What unconditional rows see."""
        return self.negative_prompt or ""


def flow_sites(model: FlowModel, size: tuple[int, int]) -> tuple[Site, ...]:
    """The layers of a pipeline's transformer for an image of (height, width) pixels."""
    return tuple(site.at(*model.latent_size(size)) for site in adapter_of(model.pipe).sites)


def _source(pipe: Any, model: FlowModel, prompt: Any, inversion: Inversion | None, options: dict[str, Any]) -> _Source:
    negative = options.get("negative_prompt")
    for name, text in (("source", prompt), ("negative", negative)):
        if not isinstance(text, str) and (name, text) != ("negative", None):
            raise TypeError(f"expected one {name} prompt, got {type(text).__name__}")
        check_text(f"the {name} prompt", text or "")
    guidance = 1.0
    if model.takes_guidance:
        guidance = options["guidance_scale"] if "guidance_scale" in options else pipe.default_of("guidance_scale")
    steps = options.get("num_inference_steps", pipe.parent_default("num_inference_steps"))
    check_guidance(guidance)
    check_positive(num_inference_steps=steps)
    text_length = options.get("max_sequence_length") or model.text_length or model.own_text_tokens(prompt, 0)
    true = None
    if pipe.takes_true_guidance():  # by a second call; what FLUX.1 is told of guidance is one thing more
        true = options.get("true_cfg_scale", pipe.parent_default("true_cfg_scale"))
        check_guidance(true)
        is_guided = negative is not None and true > 1
        if not is_guided and (negative is not None or ("true_cfg_scale" in options and true > 1)):
            raise ValueError(
                f"on {pipe.parent.__name__} a negative prompt guides together with true_cfg_scale above 1, got "
                f"negative_prompt={negative!r} and true_cfg_scale={true:g}: pass both, or leave both out"
            )
        true = true if is_guided else 1.0
    else:
        is_guided = pipe.is_guided_at(guidance)
    return _Source(prompt, negative, guidance, int(steps), text_length, is_guided, inversion, true)


def _noise(
    model: FlowModel, latents: torch.Tensor | None, options: dict[str, Any]
) -> tuple[torch.Tensor, tuple[int, int]]:
    """The latents of one row that were given, or noise of the size that was asked for, as the model takes them, and
    that size in pixels."""
    start = flow_start(model, Call(1, 1), latents, options.get("height"), options.get("width"))
    size = start["height"], start["width"]
    if latents is None:
        return model.held(model.drawn(size, options.get("generator"))), size
    return model.held(start["latents"].to(model.pipe._execution_device, model.noise_dtype)), size


def _plan(
    model: FlowModel,
    source: _Source,
    edits: Sequence[Edit],
    start: tuple[torch.Tensor, tuple[int, int]],
    precision: Precision,
) -> Plan:
    noise, size = start
    model.set_timesteps(source.steps, size)
    sites, run, adapter = flow_sites(model, size), run_steps(model.pipe.scheduler), adapter_of(model.pipe)
    of_rows: dict[str, Any] = {
        "guided": source.is_guided,
        "apart": adapter.guides_apart,
        "prompts_first": adapter.prompts_first,
    }
    contents = source_needs(edits, sites, run, **of_rows)
    model.check_recorded({part.name for parts in contents.values() for part in parts}, source.is_guided)
    itemsize = model.pipe.transformer.dtype.itemsize
    by_path = {site.path: site for site in sites}

    def tokens(part: Part) -> int:
        if part.name not in model.trimmed:
            return model.text_tokens(source.text_length)
        prompt = source.prompt if part.conditional else source.away
        own = model.own_text_tokens(prompt, source.text_length, conditional=part.conditional)
        return own + model.filling_tokens(size)

    nbytes = recorded_bytes(contents, by_path, model.head_dim, tokens, itemsize, precision, model.key_heads)
    nbytes += (len(run) + 1) * noise.nbytes
    words = f"in {len(recorded_steps(contents))} of {len(run)} calls of the model, {precision}"
    schedule = NoiseSchedule.of(model.pipe.scheduler)
    return Plan.of(edits, sites, contents, noise, schedule, nbytes, words, size)


def _run(
    pipe: FlowSampling,
    model: FlowModel,
    source: _Source,
    plan: Plan,
    store: MapStore,
    precision: Precision,
    backend: str,
) -> Recording:
    """Denoise the source and keep what is planned of it."""
    kept = KeptLatents([plan.noise])
    arguments: dict[str, Any] = {
        "prompt": [source.prompt],
        **dict(zip(("height", "width"), plan.size or (), strict=True)),
        "num_inference_steps": source.steps,
        "max_sequence_length": source.text_length,
        "latents": model.taken(plan.noise, plan.size or (0, 0)),
        "callback_on_step_end": kept,
        "output_type": "latent",
    }
    if model.takes_guidance:
        arguments["guidance_scale"] = source.guidance_scale
    if source.negative_prompt is not None:
        arguments["negative_prompt"] = [source.negative_prompt]
    if source.true_cfg_scale is not None:
        arguments["true_cfg_scale"] = source.true_cfg_scale
    call, weights = Call(1, 1), fingerprint(pipe)
    followed = Followed.of(pipe, call, source.inversion)
    with store.all_or_nothing():
        capture: Capture
        if any(site.is_joint for site in adapter_of(pipe).sites):
            tokens = model.text_tokens(source.text_length)
            capture = JointCapture(pipe, plan.contents, store, precision, backend, model.trimmed, tokens)
        else:
            capture = Capture(pipe, plan.contents, store, precision, backend)
        with capture, followed.source:
            pipe._sample(call, nullcontext(), (), arguments)
        return plan.recording(
            source,
            kept,
            store,
            negative_prompt=source.negative_prompt,
            true_cfg_scale=source.true_cfg_scale,
            model=weights,
            precision=precision,
            error=capture.error,
            size=plan.size,
            text_length=source.text_length,
            source_text=capture.source_text,
            text_lengths=capture.text_lengths,
            origins=capture.origins,
        )
