"""The `fpe` command: a demo, edits of generated images, and what this installation can do.

Paths of results go to standard output, one a line; progress and errors go to standard error.
Exit codes: 0 done, 1 failed while running, 2 the request cannot be served as it stands, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import extras
from ..errors import InputError
from ..models.loading import DTYPES
from ..runs.settings import INVERSIONS, Settings
from ..texts import print_text
from .console import Version, quiet_imports, warnings_on_stderr

__all__ = ["main"]

DEFAULTS = Settings(source="", targets=())
# Commands whose module has add_arguments(parser) and run(options).
OTHER_COMMANDS = {
    "evaluate": (
        "fpe_pipeline.quality",
        "score edits where the right answer is known, and every method on generated or real images",
    )
}
# Commands that need more than torch.
NEED_PICTURES = ("demo", "edit", *OTHER_COMMANDS)

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


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that start with the name of the program, whatever the subcommand."""

    def error(self, message: str) -> Any:
        self.exit(2, f"fpe: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: arguments after the program's name; default: those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    quiet_imports()
    asks_for_help = not arguments or {"-h", "--help"} & set(arguments)
    if not asks_for_help and arguments[0] in NEED_PICTURES and (absent := extras.missing()):
        print(f"fpe: error: {extras.hint(absent)}", file=sys.stderr)
        return 2
    try:
        parser = _parser(arguments)
        if not arguments:
            parser.print_help()
            return 0
        options = parser.parse_args(arguments)
    except SystemExit as leave:  # argparse has already written its help or its error
        return leave.code if isinstance(leave.code, int) else 2
    try:
        with warnings_on_stderr(_say):
            return options.run(options) or 0
    except KeyboardInterrupt:
        print("fpe: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of standard output has gone; Python would report it once more at exit
        return 1
    except Exception as error:
        if getattr(options, "traceback", False):
            traceback.print_exc()
        print_text(f"fpe: error: {_one_line(error)}", sys.stderr)
        return 2 if isinstance(error, InputError) else 1


def _parser(arguments: Sequence[str]) -> Parser:
    parser = Parser(
        prog="fpe",
        description="Edit images by editing their prompt, with the attention maps of the source held fixed.",
        epilog="Exit codes: 0 done, 1 failed while running, 2 bad request, 130 interrupted.",
    )
    parser.add_argument("--version", action=Version, help="show the version and leave")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="make a few edits with the embedded model",
        description="Make a few edits with the embedded model: no download, no GPU, a minute on one CPU core.",
    )
    demo.add_argument(
        "-o", "--output", type=Path, default=Path("out/demo"), metavar="DIR", help="folder (default: out/demo)"
    )
    demo.add_argument("--steps", type=int, default=25, metavar="N", help="denoising steps of each edit (default: 25)")
    _add_common(demo)
    demo.set_defaults(run=_demo)

    edit = commands.add_parser(
        "edit",
        help="make an image of a prompt and edit it into others",
        description=EDIT_DESCRIPTION,
        epilog=EDIT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    _add_edit(edit)
    edit.set_defaults(run=_edit)

    info = commands.add_parser("info", help="show versions, devices and attention backends")
    info.set_defaults(run=_info)

    for name, (module, summary) in OTHER_COMMANDS.items():
        if importlib.util.find_spec(module) is None:
            continue
        command = commands.add_parser(name, help=summary, description=summary)
        if (
            name in arguments[:1] and not extras.missing()
        ):  # its imports are heavy, and only its own run and help need them
            implementation = importlib.import_module(module)
            implementation.add_arguments(command)
            command.set_defaults(run=implementation.run)
    return parser


def _add_edit(edit: argparse.ArgumentParser) -> None:
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

    how = edit.add_argument_group("edit")
    how.add_argument(
        "--method",
        metavar="NAME",
        help="fpe (default) or another; `fpe info` lists them and their options",
    )
    how.add_argument(
        "--option",
        dest="options",
        action="append",
        type=_option,
        metavar="NAME=VALUE",
        help="an argument of the method's edit, such as cross_replace_steps=0.6 or start_step=4; repeat for more",
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

    edit.add_argument(
        "-o", "--output", type=Path, default=Path("out"), metavar="DIR", help="folder for the results (default: out)"
    )
    _add_common(edit)


def _add_common(parser: argparse.ArgumentParser) -> None:
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


def _edit(options: argparse.Namespace) -> int:
    from ..atomic_folder import check_writable
    from ..runs import agreement
    from ..runs import run as runs

    given = {name: value for name, value in vars(options).items() if name in Settings.__dataclass_fields__}
    if {"inversion", "inversion_guidance"} & given.keys() and not ("image" in given or hasattr(options, "record")):
        raise InputError("--inversion and --inversion-guidance are about a picture; pass it with --image")
    if "targets" in given:
        given["targets"] = tuple(given["targets"])
    if "options" in given:
        given["options"] = dict(given["options"])
    record: dict[str, Any] | None = None
    if hasattr(options, "record"):
        settings, record = runs.read_record(options.record)
        settings = settings.changed(**given)
    else:
        if "image" in given:
            given.setdefault("source", "")
        missing = [f"--{name}" for name, key in (("source", "source"), ("target", "targets")) if key not in given]
        if missing:
            raise InputError(f"expected {' and '.join(missing)}, or --from with the run.json of an earlier run")
        settings = Settings(**given)
    if {"inner_steps", "early_stop"} & given.keys() and (settings.image is None or settings.inversion != "null-text"):
        raise InputError("--inner-steps and --early-stop are null-text inversion's; pass --inversion null-text as well")
    settings.check()
    check_writable(options.output)
    if record is not None and "model" not in given:
        settings = _with_its_model(settings, record)
    same_model = record is not None and not {"model", "dtype", "device"} & given.keys()
    run = runs.execute(
        settings,
        progress=not options.quiet,
        expected_model=record["model"]["identity_sha256"] if record is not None and same_model else None,
        expected_photo=runs.photo_of(record) if record is not None and not {"image", "size"} & given.keys() else None,
    )
    # Measured before the images are written: they may replace those that they are compared with.
    distance = None
    if record is not None and not given:
        distance = agreement.differences(run, record, options.record.parent)
    _print_paths(runs.write(run, options.output))
    if distance is not None:
        _say(distance or "the images are those of the record, bit for bit")
    return 0


def _with_its_model(settings: Settings, record: dict[str, Any]) -> Settings:
    """`runs.with_its_model`, which says so where the record's weights are earlier ones."""
    from ..runs import run as runs

    found = runs.with_its_model(settings, record)
    if found.model != settings.model:
        _say(f"the record was made with an earlier embedded model, {found.model}, which is used again")
    return found


def _demo(options: argparse.Namespace) -> int:
    from . import demo

    given = {name: value for name, value in vars(options).items() if name in Settings.__dataclass_fields__}
    _print_paths(demo.run(options.output, progress=not options.quiet, **given))
    return 0


def _info(options: argparse.Namespace) -> int:
    import torch

    from fpe_kernels import backends

    from ..edits.registry import METHODS
    from ..embedded.scenes.scenes import BACKGROUNDS, COLOURS, OBJECTS
    from ..models.loading import EMBEDDED, find_model
    from ..runs.repeatable import versions

    for name, version in versions().items():
        print(f"{name:<14}{version or 'not installed'}")
    cuda = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    print(f"{'devices':<14}{', '.join([f'cpu ({torch.get_num_threads()} threads)', *cuda])}")
    print("backends")
    for name, state in backends().items():
        print(f"  {name:<12}{state}")
    try:
        print_text(f"{'model':<14}{find_model(EMBEDDED).location}")
    except InputError as error:
        print(f"{'model':<14}{error}")
    for title, names in (("objects", OBJECTS), ("colours", COLOURS), ("backgrounds", BACKGROUNDS)):
        print(f"  {title:<12}{', '.join(names)}")
    print("methods")
    for name, method in METHODS.items():
        print(f"  {name:<15}{method.title}: {', '.join(method.options)}")
    return 0


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


def _print_paths(paths: Sequence[Path]) -> None:
    for path in paths:
        print_text(path)
    sys.stdout.flush()


def _say(text: str) -> None:
    print_text(f"fpe: {text}", sys.stderr)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
