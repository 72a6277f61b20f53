"""Settings as what a person would type: a command, or lines of Python."""

from __future__ import annotations

import json
import shlex
from typing import Any

from ..edits.registry import METHODS
from ..models.sources import find_model
from ..runs.settings import DEFAULTS, Settings

__all__ = ["as_command", "as_python"]

_LIST = {"levels": ",", "layers": ",", "self_replace": ",", "size": "x"}
#: Of the machine, not of the picture.
_MACHINE = ("device", "dtype", "threads", "backend")


def as_command(settings: Settings, photo: str = "photo.png") -> str:
    """`fpe edit …` with what differs from its defaults; a real image is called ``photo``."""
    words = ["fpe edit"]
    for name, value in _chosen(settings):
        if name == "targets":
            words += [f"--target {shlex.quote(target)}" for target in value]
        elif name == "options":
            words += [f"--option {shlex.quote(f'{key}={json.dumps(each)}')}" for key, each in value.items()]
        elif name == "control":
            words.append("--no-control")
        elif name == "image":
            words.append(f"--image {shlex.quote(photo)}")
        else:
            text = _LIST[name].join(map(_number, value)) if name in _LIST else _number(value)
            words.append(f"--{name.replace('_', '-')} {shlex.quote(text)}")
    return " \\\n    ".join(words)


def as_python(settings: Settings, photo: str = "photo.png") -> str:
    """The same run by :class:`~fpe_pipeline.FreePromptPipeline`."""
    served = find_model(settings.model).served
    told = served.told(settings.guidance, settings.negative)
    call = {"num_inference_steps": settings.steps, **told}
    solver = settings.image is not None and not served.is_flow
    optimised = settings.null_text() if settings.image is not None else None
    names = ["FreePromptPipeline", *(["NullText"] if optimised else []), *(["ddim_scheduler"] if solver else [])]
    names.append("make_edit")
    lines = [*([] if settings.image else ["import torch", ""]), f"from fpe_pipeline import {', '.join(names)}", ""]
    lines.append(f"pipe = FreePromptPipeline.from_pretrained({settings.model!r})")
    lines.append(f"source = {settings.source!r}")
    lines.append(f"targets = {list(settings.targets)!r}")
    chosen: dict[str, Any] = {n: getattr(settings, n) for n in ("levels", "layers", "max_tokens")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    entry = METHODS.get(settings.method)
    if entry is not None and entry.window is not None:  # other methods have a window of their own
        chosen[entry.window] = settings.self_replace
    given = "".join(f", {name}={value!r}" for name, value in {**chosen, **settings.options}.items())
    lines.append(
        f"edit = make_edit({settings.method!r}, [source, *targets], pipe.tokenizer, pipe{given})",
    )
    if settings.image is not None:
        size = f", width={settings.size[0]}, height={settings.size[1]}" if settings.size else ""
        lines += ["pipe.scheduler = ddim_scheduler(pipe.scheduler)"] if solver else []
        method = repr(settings.inversion)
        if optimised is not None:  # for this guidance, and for no other
            method = (
                f"NullText({optimised.guidance_scale!r}, inner_steps={optimised.inner_steps}, "
                f"early_stop={optimised.early_stop!r})"
            )
        guided = "" if settings.inversion_guidance == 1 else f", guidance_scale={settings.inversion_guidance!r}"
        steps = f"num_inference_steps={settings.steps}{guided}"
        lines.append(f"inversion = pipe.invert({photo!r}, source, {steps}, method={method}{size})")
        call = {"inversion": "inversion", **told}
    else:
        if settings.size:
            call |= {"width": settings.size[0], "height": settings.size[1]}
        lines.append(f"noise = torch.Generator().manual_seed({settings.seed})")
        call |= {"generator": "noise"}
    named = ("inversion", "noise")
    spelled = ", ".join(f"{n}={v if v in named else repr(v)}" for n, v in call.items() if v is not None)
    lines.append(f"out = pipe(source, targets, edit=edit, {spelled})")
    lines.append('out.save("out")')
    return "\n".join(lines) + "\n"


def _chosen(settings: Settings) -> list[tuple[str, Any]]:
    """What differs from the defaults of the model and the method; how a photo is inverted, only where there is one."""
    usual = Settings.of_model(source="", targets=(), model=settings.model, method=settings.method).model_dump()
    usual |= {"model": DEFAULTS.model, "method": DEFAULTS.method}
    left_out = _MACHINE if settings.image is not None else (*_MACHINE, "inversion")
    return [
        (name, value)
        for name, value in settings.model_dump().items()
        if name not in left_out and (value != usual[name] or name == "source")
    ]


def _number(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
