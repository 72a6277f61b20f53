"""Ideogram 4: blocks with one sequence of text and image tokens, text first and padded in front.

Guidance is by another model, the pipeline's ``unconditional_transformer``, which is called after the first in every
step and sees the image's tokens alone. Text is at places of its own and the image's tokens at places that no text
moves, so that a source's queries and keys stand where a target's do. An edit's layers are counted in each of the two
models from 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ...text_parts import Template, TextPart
from ..sites import Site
from ..steps import Step, step_of_scheduler
from .adapter import ModelCall, identity
from .once import once_a_tensor
from .transformer import TransformerAdapter

__all__ = ["Ideogram4Adapter"]

_NAMES = ("transformer", "unconditional_transformer")
_PACKED = 2
#: What diffusers' model calls a token of the image, and one of the text.
_IMAGE, _TEXT = 2, 3
#: The place of an image's first token, behind those of every text.
_ORIGIN = 65536


def _conversation(pipe: Any, arguments: Mapping[str, Any]) -> Template:
    """What a chat template writes around a prompt, which is a part of what is said; nothing without a tokenizer."""
    if pipe.tokenizer is None:
        return Template("")
    said = [{"role": "user", "content": [{"type": "text", "text": "{}"}]}]
    written = pipe.tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    before, _, after = written.partition("{}")
    return Template(before, after)


class Ideogram4Adapter(TransformerAdapter):
    """diffusers' ``Ideogram4Transformer2DModel``, and the second one of a pipeline, which guides."""

    family = "ideogram4"
    guides_apart = True
    shows_half = True
    tells_all_it_encodes = False
    text_parts = (TextPart("tokenizer", ("text_encoder",), _conversation, reads="language_model.embed_tokens"),)

    @property
    def models(self) -> Mapping[str, Any]:
        found = {name: getattr(self.pipe, name, None) for name in _NAMES}
        apart = None not in found.values() and identity(found[_NAMES[0]]) is not identity(found[_NAMES[1]])
        return found if apart else super().models

    def layer(self, path: str) -> Any:
        name, _, rest = path.partition(".")
        models = self.models
        return identity(models[name]).get_submodule(rest) if name in models else super().layer(path)

    def find_sites(self) -> tuple[Site, ...]:
        patch = int(getattr(self.pipe, "patch_size", _PACKED))
        sites = []
        for name, model in self.models.items():
            blocks: Any = identity(model).layers
            for index, block in enumerate(blocks):
                path = f"{name}.layers.{index}.attention".removeprefix(".")
                sites.append(Site(path, "single", "joint", index, block.attention.num_heads, 0, (), patch=patch))
        return tuple(sites)

    def step(self, call: ModelCall) -> Step:
        return super().step(call) if self.pipe is None else step_of_scheduler(self.pipe.scheduler)

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ModelCall:
        given = self.named(args, kwargs)
        sequence = given["hidden_states"]
        layout = _layout(given["indicator"])
        height, width = _grid(given["position_ids"])
        tokens = sequence.shape[1] - layout.texts
        if height * width != tokens:
            raise ValueError(
                f"the model got {tokens} image tokens, whose places are a grid of {height} x {width}: an edit knows "
                "images that are whole grids, the same in every row"
            )
        patch = self.sites[0].patch
        return ModelCall(
            sequence[:, layout.texts :],
            given["timestep"],
            (height * patch, width * patch),
            half="conditional" if layout.texts else "unconditional",
            text_lengths=layout.lengths if layout.texts else None,
            arguments=(args, kwargs),
        )


class _Layout(NamedTuple):
    """Where the image begins in every row, and how many of the tokens before it are the row's text, the last ones."""

    texts: int
    lengths: tuple[int, ...]


@once_a_tensor
def _layout(indicator: torch.Tensor) -> _Layout:
    """What tokens [B, T + N] are: padding, then text, then the image.

    Raises:
        ValueError: they stand in another order, or rows have images of several sizes.
    """
    is_image, is_text = indicator == _IMAGE, indicator == _TEXT
    images, lengths = is_image.sum(1), is_text.sum(1)
    texts = indicator.shape[1] - int(images[0])
    places = torch.arange(indicator.shape[1], device=indicator.device)
    as_expected = (is_image == (places >= texts)) & (
        is_text == ((places < texts) & (places >= texts - lengths[:, None]))
    )
    if not bool(as_expected.all()):
        raise ValueError(
            "expected rows of padding, text and then an image of one size, as diffusers' pipeline packs them (its "
            "indicator is 0, 3 and 2 there), got another order"
        )
    return _Layout(texts, tuple(map(int, lengths.tolist())))


@once_a_tensor
def _grid(places: torch.Tensor) -> tuple[int, int]:
    """Rows and columns of the image's tokens, of places [B, T + N, 3]: (time, row, column)."""
    height, width = (places[..., 1:].flatten(0, 1).amax(0) - _ORIGIN + 1).tolist()
    return height, width
