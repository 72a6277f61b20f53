"""The options of `fpe`: their names, their kinds and their help."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from ..models.loading import DTYPES
from ..runs.settings import INVERSIONS, Settings

__all__ = ["EDIT_DESCRIPTION", "EDIT_EPILOG", "add_common", "add_edit"]

DEFAULTS = Settings(source="", targets=())

EDIT_DESCRIPTION = """\
Make an image of a source prompt and edit it into one or more targets by changing the text only. All images start
from the same noise; while they are denoised, the targets take the self-attention maps of the source, which keeps its
layout. With --image, the source is your picture instead: it is inverted to noise first."""

EDIT_EPILOG = """\
examples:
  fpe edit --source "a photo of a red car on the beach" --target "a photo of a blue car on the beach"
  fpe edit --source "a photo of a cat" --target "a photo of a dog" --target "a photo of a fox" \\
           --model ./stable-diffusion-v1-5 --size 512x512 --guidance 7.5 --seed 3 -o out/pets
  fpe edit --image beach.jpg --source "a photo of a red car" --target "a photo of a blue car" --inversion direct
  fpe edit --from out/pets/run.json -o out/again          # the same images; how far, if not to the bit
  fpe edit --from out/pets/run.json --self-replace 0.4 -o out/looser

The folder receives comparison.png (source, target without control, target with the edit), the images one by one, and
run.json, which holds every setting, version and timing of the run. A picture keeps its aspect ratio at the model's own
number of pixels, or is scaled to cover --size and cut in the middle; photo.png is what the model was given, source.png
what came back."""


def add_edit(edit: argparse.ArgumentParser) -> None:
    """The options of `fpe edit`."""
    _add_prompts(edit)
    _add_real_images(edit)
    _add_method(edit)
    _add_sampling(edit)
    edit.add_argument(
        "-o", "--output", type=Path, default=Path("out"), metavar="DIR", help="folder for the results (default: out)"
    )
    add_common(edit)


def _add_prompts(edit: argparse.ArgumentParser) -> None:
    what = edit.add_argument_group("prompts")
    what.add_argument("--source", metavar="TEXT", help="prompt of the source image")
    what.add_argument(
        "--target",
        dest="targets",
        action="append",
        metavar="TEXT",
        help="prompt to edit it into; repeat for more edits",
    )
    what.add_argument("--negative", metavar="TEXT", help="what all images should not show (default: nothing)")
    what.add_argument(
        "--from",
        dest="record",
        type=Path,
        metavar="RUN.JSON",
        help="repeat an earlier run; options given beside it replace its settings",
    )


def _add_real_images(edit: argparse.ArgumentParser) -> None:
    real = edit.add_argument_group("real images")
    real.add_argument(
        "--image", metavar="PATH", help="picture to edit; --source says what it shows, and may be left out"
    )
    real.add_argument(
        "--inversion",
        choices=INVERSIONS,
        help="how the source is held to the picture: put back onto it in every step (ddim, direct: to the end), or "
        f"followed by an optimised or by its own prompt's unconditional half (default: {DEFAULTS.inversion})",
    )
    real.add_argument(
        "--inversion-guidance",
        type=float,
        metavar="SCALE",
        help=f"guidance while the picture is inverted (default: {DEFAULTS.inversion_guidance:g})",
    )
    real.add_argument(
        "--inner-steps",
        type=int,
        metavar="N",
        help=f"of --inversion null-text: at most N iterations a denoising step (default: {DEFAULTS.inner_steps})",
    )
    real.add_argument(
        "--early-stop",
        type=float,
        metavar="ERROR",
        help="of --inversion null-text: mean squared error below which the first step ends; later ones are allowed a "
        f"little more each (default: {DEFAULTS.early_stop:g})",
    )


def _add_method(edit: argparse.ArgumentParser) -> None:
    how = edit.add_argument_group("edit")
    how.add_argument(
        "--method",
        metavar="NAME",
        help="fpe (default) or another that `fpe info` lists; or an edit's class as package.module:Class, which is "
        "imported from this directory or PYTHONPATH",
    )
    how.add_argument(
        "--option",
        dest="options",
        action="append",
        type=_option,
        metavar="NAME=VALUE",
        help="an option of the method, as `fpe info --method NAME` shows them, such as start_step=4; repeat for more",
    )
    how.add_argument(
        "--self-replace",
        type=_window,
        metavar="END | START,END",
        help="steps whose self-attention maps come from the source, as fractions of all steps from 0 to 1: "
        "0.8 is the first 80 %%; lower values follow the target prompt more (default: 0.8)",
    )
    how.add_argument(
        "--levels",
        type=_integers,
        metavar="N,N",
        help="replace at these UNet levels; level n is downsampled n times from the latent (default: 1 and deeper; "
        "with models of at most 32 x 32 tokens, as the embedded one, all)",
    )
    how.add_argument(
        "--max-tokens", type=int, metavar="N", help="replace where height x width of the layer is at most N"
    )
    how.add_argument(
        "--layers",
        type=_layers,
        metavar="PATH,PATH",
        help="replace in these self-attention layers: module paths such as up_blocks.1, or numbers in execution order",
    )
    how.add_argument(
        "--no-control", dest="control", action="store_false", help="do not make the targets without the edit"
    )


def _add_sampling(edit: argparse.ArgumentParser) -> None:
    sampling = edit.add_argument_group("sampling")
    sampling.add_argument(
        "--model",
        metavar="PATH",
        help="diffusers folder, .safetensors or .ckpt file, hub name, or embedded-80, the embedded model of before "
        "(default: the embedded model)",
    )
    sampling.add_argument("--seed", type=int, metavar="N", help=f"of the shared noise (default: {DEFAULTS.seed})")
    sampling.add_argument("--steps", type=int, metavar="N", help=f"denoising steps (default: {DEFAULTS.steps})")
    sampling.add_argument(
        "--guidance",
        type=float,
        metavar="SCALE",
        help=f"classifier-free guidance; 1 or less switches it off (default: {DEFAULTS.guidance})",
    )
    sampling.add_argument("--size", type=_size, metavar="WxH", help="width x height in pixels (default: the model's)")


def add_common(parser: argparse.ArgumentParser) -> None:
    """The options that every command which makes pictures has."""
    machine = parser.add_argument_group("machine")
    suppress = argparse.SUPPRESS
    machine.add_argument(
        "--device", default=suppress, help="cpu, cuda, cuda:1, mps (default: cuda where there is one, else cpu)"
    )
    machine.add_argument(
        "--dtype",
        default=suppress,
        choices=(*DTYPES, "auto"),
        help="of weights and images while they are denoised (default: float16 on cuda, else float32)",
    )
    machine.add_argument(
        "--backend", default=suppress, metavar="NAME", help="attention backend, see `fpe info` (default: auto)"
    )
    machine.add_argument("--quiet", action="store_true", default=False, help="no progress bars")
    machine.add_argument(
        "--traceback", action="store_true", default=False, help="show the Python traceback of an error"
    )


def _window(text: str) -> tuple[float, float]:
    try:
        values = [float(part) for part in text.split(",")]
        if len(values) not in (1, 2) or any(math.isnan(value) for value in values):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected one fraction such as 0.8 or two such as 0.1,0.8, received '{text}'"
        ) from None
    return (0.0, values[0]) if len(values) == 1 else (values[0], values[1])


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT in pixels such as 512x768, received '{text}'")
    return int(parts[0]), int(parts[1])


def _integers(text: str) -> tuple[int, ...]:
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected whole numbers from 0 on such as 1,2, received '{text}'")
    return tuple(int(part) for part in text.split(","))


def _layers(text: str) -> tuple[str | int, ...]:
    parts = [part.strip() for part in text.split(",")]
    return tuple(int(part) if part.isdecimal() else part for part in parts if part)


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE such as start_step=4, received '{text}'")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value  # a bare word is text
