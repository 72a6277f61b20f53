"""`fpe evaluate`: from options to what is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from typer.core import TyperCommand

from ..models.served_families import FLOW_INVERSIONS
from ..quality.request import KINDS, Evaluation
from ..runs.progress import progress_for
from ..runs.settings import INVERSIONS
from .options import chosen, field
from .setting_options import IN_WORDS, JSON, QUIET, TRACEBACK

__all__ = ["EXAMPLES", "ManyValues", "evaluate"]

EXAMPLES = r"""Examples:

fpe evaluate --pairs 12 -o out/quality

fpe evaluate --sweep --methods --kinds colour object --pairs 3

fpe evaluate --images generated --pairs 2 -o out/methods

fpe evaluate --images held-out --inversion direct null-text \
    --methods "no edit" fpe -o out/inversions

fpe evaluate --images my-pictures"""

_of = functools.partial(field, Evaluation)
_WHAT, _DRAWN, _RESULTS = "What is scored", "How it is drawn", "Results"
#: Options that take several values after one name; `--methods`, alias `--method`, may have none.
_MANY = ("--kinds", "--methods", "--method", "--inversion")


class ManyValues(TyperCommand):
    """A command some of whose options take several values: ``--kinds colour object``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_spread(args)))


def _spread(arguments: Sequence[str]) -> Iterator[str]:
    """``--kinds a b`` as ``--kinds a --kinds b``; a name without values has one, which is empty."""
    many, values = "", 0
    for argument in [*arguments, "--"]:
        begins = argument.startswith("-")
        if begins and many and not values:
            yield from (many, "")
        if begins:
            many, values = (argument if argument in _MANY else ""), 0
            if argument in _MANY:
                continue
        elif many:
            values += 1
            yield many
        yield argument


def _values(given: list[str] | None) -> list[str] | None:
    return None if given is None else [value for value in given if value]


def evaluate(
    pairs: Annotated[int | None, _of("pairs", panel=_WHAT, metavar="N")] = None,
    kinds: Annotated[
        list[str] | None,
        _of(
            "kinds",
            panel=_WHAT,
            note=f"{', '.join(KINDS)}; default: all",
            metavar="KIND ...",
            autocompletion=lambda: KINDS,
        ),
    ] = None,
    sweep: Annotated[bool, _of("sweep", "--sweep", panel=_WHAT, metavar="")] = False,
    methods: Annotated[
        list[str] | None,
        _of(
            "methods",
            "--method",
            "--methods",
            panel=_WHAT,
            note='names that `fpe info` lists, "no edit" and "different noise", or your own edit\'s class as '
            "package.module:Class; default: all of the names",
            metavar="NAME ...",
        ),
    ] = None,
    images: Annotated[str | None, _of("images", panel=_WHAT, metavar="WHICH")] = None,
    inversion: Annotated[
        list[str] | None,
        _of(
            "inversions",
            "--inversion",
            panel=_WHAT,
            note=f"{', '.join(INVERSIONS)}; default: ddim, with its latents as reference; of a transformer "
            f"{', '.join(FLOW_INVERSIONS)}; default: {FLOW_INVERSIONS[0]}",
            metavar="NAME ...",
            autocompletion=lambda: INVERSIONS,
        ),
    ] = None,
    steps: Annotated[int | None, _of("steps", panel=_DRAWN, metavar="N", note=IN_WORDS["steps"])] = None,
    guidance: Annotated[
        float | None,
        _of("guidance", panel=_DRAWN, metavar="SCALE", note=IN_WORDS["guidance"]),
    ] = None,
    self_replace: Annotated[
        float | None, _of("self_replace", panel=_DRAWN, metavar="END", note=IN_WORDS["self_replace"])
    ] = None,
    seed: Annotated[int | None, _of("seed", panel=_DRAWN, metavar="N")] = None,
    chunk: Annotated[int | None, _of("chunk", panel=_DRAWN, metavar="N")] = None,
    model: Annotated[Path | None, _of("model", panel=_DRAWN, metavar="PATH")] = None,
    text_tokens: Annotated[int | None, _of("text_tokens", panel=_DRAWN, metavar="N")] = None,
    device: Annotated[str | None, _of("device", panel=_DRAWN, metavar="NAME")] = None,
    output: Annotated[
        Path | None, _of("output", "-o", "--output", panel=_RESULTS, note="default: out/evaluation", metavar="DIR")
    ] = None,
    as_json: Annotated[bool, JSON] = False,
    quiet: Annotated[bool, QUIET] = False,
    traceback: Annotated[bool, TRACEBACK] = False,
) -> Callable[[], int]:
    """Score edits where the right answer is known, and every method on generated or real images.

    Held-out sources of the embedded model are drawn and edited, and its judge, which knows the right answer, compares
    the two. With --images every method makes the same edits, one by one and timed. A run into the folder of an earlier
    one with the same settings continues it.
    """
    request = Evaluation.of_model(
        **chosen(
            pairs=pairs, kinds=_values(kinds), sweep=sweep, methods=_values(methods), images=images,
            inversions=_values(inversion),
            steps=steps, guidance=guidance, self_replace=self_replace, seed=seed, chunk=chunk, model=model,
            text_tokens=text_tokens, device=device, output=output,
        )
    )  # fmt: skip
    return functools.partial(_run, request, quiet, as_json)


def _run(request: Evaluation, quiet: bool, as_json: bool) -> int:
    from ..quality import command

    with progress_for(quiet=quiet) as progress:
        return command.run(request, progress, as_json=as_json)
