"""Prompt-to-Prompt's controllers that change nothing, and the base of those that do: what a user's own derives from."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch

from ..lazy import LazyMap, summable

__all__ = ["AttentionControl", "AttentionStore", "EmptyControl", "SpatialReplace"]

#: By the original: maps of more query tokens are not kept.
MOST_TOKENS = 32**2
KINDS = ("cross", "self")


class EmptyControl:
    """Leaves every map as it is."""

    def step_callback(self, x_t: Any) -> Any:
        """The latents after a step, changed or not."""
        return x_t

    def between_steps(self) -> None:
        """Called after a step's last layer."""

    def __call__(self, attn: Any, is_cross: bool, place_in_unet: str) -> Any:
        """The map [rows · heads, N, M] as it is to be."""
        return attn


class AttentionControl(abc.ABC):
    """Hands the conditional half of each map to :meth:`forward`, and counts layers and steps.

    A subclass writes ``forward(attn, is_cross, place_in_unet)``, where ``attn`` is a :class:`.LazyMap` [rows of the
    half · heads, N, M] that behaves as the tensor; what it returns is put back into the map, so that whoever kept
    ``attn`` has the edited one.

    Attributes:
        cur_step: steps that have ended.
        cur_att_layer: layers of the step that have been computed.
        num_att_layers: layers of the UNet, set by ``register_attention_control``.
    """

    def __init__(self) -> None:
        self.cur_step = 0
        self.num_att_layers = -1
        self.cur_att_layer = 0
        self.rows = 0  # of the conditional half
        self.grids: dict[int, tuple[int, int]] = {}  # (height, width) of layers, by their number of query tokens
        self.tokenizer: Any = None

    #: Layers of the unconditional half that come in a call of their own: there the layers are not controlled at all.
    num_uncond_att_layers = 0

    def prepare(self, tokenizer: Any) -> None:
        """Take the tokenizer of the pipeline where none was passed; registering calls it."""
        self.tokenizer = tokenizer if self.tokenizer is None else self.tokenizer

    def step_callback(self, x_t: Any) -> Any:
        """The latents after a step, changed or not."""
        return x_t

    def between_steps(self) -> None:  # noqa: B027 - most controllers have nothing to do there
        """Called after a step's last layer."""

    @abc.abstractmethod
    def forward(self, attn: Any, is_cross: bool, place_in_unet: str) -> Any:
        """The conditional half of a map as it is to be."""

    def __call__(self, attn: Any, is_cross: bool, place_in_unet: str) -> Any:
        """The map [rows · heads, N, M] as it is to be."""
        first = attn.shape[0] // 2 if getattr(attn, "guided", True) else 0
        heads, grid = getattr(attn, "heads", 0), getattr(attn, "layer_grid", None)
        if grid is not None:
            self.grids[attn.shape[1]] = grid
        self.rows = (attn.shape[0] - first) // heads if heads else 0
        edited = self.forward(attn[first:], is_cross, place_in_unet)
        if edited is None:
            raise TypeError(f"{type(self).__name__}.forward returned nothing: return the map, edited or as it was")
        attn[first:] = edited
        self.layer_done()
        return attn

    def call_begins(self) -> None:
        """A call of the UNet begins: of one that an error broke off, no layer is counted."""
        self.cur_att_layer = 0

    def layer_ends(self) -> None:  # noqa: B027 - most controllers have nothing to do there
        """Called after a layer's map was multiplied with its values."""

    def layer_done(self) -> None:
        """Count a layer, and a step after its last one."""
        self.cur_att_layer += 1
        if self.cur_att_layer == self.num_att_layers:
            self.cur_att_layer = 0
            self.cur_step += 1
            self.between_steps()

    def reset(self) -> None:
        """Begin again with the first step."""
        self.cur_step = 0
        self.cur_att_layer = 0


class SpatialReplace(EmptyControl):
    """Puts all images onto the source's latents until a share of the steps is left.

    Args:
        stop_inject: the share of the steps, at the end, in which images go their own ways.
        num_steps: of the run.
    """

    def __init__(self, stop_inject: float, num_steps: int = 50) -> None:
        self.stop_inject = int((1 - stop_inject) * num_steps)
        self.cur_step = 0

    def reset(self) -> None:
        """Begin again with the first step."""
        self.cur_step = 0

    def step_callback(self, x_t: Any) -> Any:
        """The latents after a step."""
        if self.cur_step < self.stop_inject:
            x_t = x_t[:1].expand_as(x_t)
        self.cur_step += 1
        return x_t


class AttentionStore(AttentionControl):
    """Keeps the conditional half of the maps of up to 32² query tokens, summed over the steps.

    A map is kept in the fewest bytes that give it exactly: queries and keys of its own rows, or its numbers, as those
    of cross-attention, which has few columns. A sum over steps is the queries and keys of each step until its numbers
    are fewer bytes, and numbers from then on, so that it stops growing: :meth:`held` says which.

    Args:
        max_tokens: most query tokens of a layer that is kept.
        keeps: "cross", "self" or both: the kinds of layers that are kept.

    Attributes:
        step_store: by "<place>_<self | cross>", the maps of the step under way.
        attention_store: the same, summed over the steps that have ended; sums of half precision in float32.
    """

    def __init__(self, max_tokens: int = MOST_TOKENS, keeps: Sequence[str] = KINDS) -> None:
        super().__init__()
        self.max_tokens, self.keeps = max_tokens, _checked(keeps)
        self.step_store = self.get_empty_store()
        self.attention_store: dict[str, list[LazyMap]] = {}
        self._latest: Any = None
        self._dtype = torch.float32  # of the model

    @staticmethod
    def get_empty_store() -> dict[str, list[LazyMap]]:
        """No map of any kind of layer."""
        return {f"{place}_{kind}": [] for kind in KINDS for place in ("down", "mid", "up")}

    def forward(self, attn: Any, is_cross: bool, place_in_unet: str) -> Any:
        """The map, which is kept."""
        kind = "cross" if is_cross else "self"
        if attn.shape[1] <= self.max_tokens and kind in self.keeps:
            self.step_store[f"{place_in_unet}_{kind}"].append(attn)
            self._latest = attn
        return attn

    def layer_ends(self) -> None:
        """Hold of the layer's map what is kept of it, now that it was multiplied."""
        latest, self._latest = self._latest, None
        if isinstance(latest, LazyMap):
            latest.keep()

    def call_begins(self) -> None:
        super().call_begins()
        self._latest, self.step_store = None, self.get_empty_store()

    def between_steps(self) -> None:
        """Add the step's maps to the sums."""
        self._dtype = next((attn.dtype for maps in self.step_store.values() for attn in maps), self._dtype)
        if not self.attention_store:
            self.attention_store = {
                key: [_kept(summable(attn.clone())) for attn in maps]
                if key.endswith(self.keeps)
                else _NotKept(key, self)
                for key, maps in self.step_store.items()
            }
        else:
            for key, maps in self.step_store.items():
                for total, attn in zip(self.attention_store[key] if maps else (), maps, strict=True):
                    total += attn
                    _kept(total)
        self.step_store = self.get_empty_store()

    def get_average_attention(self) -> dict[str, list[LazyMap]]:
        """By "<place>_<self | cross>", the mean over the steps that have ended of each layer's map, prompt by prompt
        and head by head: [prompts · heads, N, M].

        Raises:
            RuntimeError: no step has ended.
        """
        if not self.attention_store:
            raise RuntimeError(
                "no map is kept: no step has ended since the controller was made or reset, or it was never registered"
            )
        return {
            key: maps if isinstance(maps, _NotKept) else [(total / self.cur_step).to(self._dtype) for total in maps]
            for key, maps in self.attention_store.items()
        }

    def held(self) -> str:
        """A line for each layer: what its sum is held as, and its bytes; and one for each kind that is not kept."""
        lines = []
        for key, maps in self.attention_store.items():
            if isinstance(maps, _NotKept):
                lines.append(f"{key}: not kept")
                continue
            for number, total in enumerate(maps):
                matrix = total.numel() * total.element_size()
                kind = "numbers" if total.holds_numbers else "queries and keys"
                lines.append(f"{key} {number}: {list(total.shape)} as {kind}, {total.nbytes:,} of {matrix:,} bytes")
        return "\n".join(lines)

    def reset(self) -> None:
        """Begin again with the first step, without any map."""
        super().reset()
        self._latest, self.step_store = None, self.get_empty_store()
        self.attention_store = {}


class _NotKept(list[Any]):
    """In the place of maps that are not kept: who asks for one is told how to keep it."""

    def __init__(self, key: str, controller: AttentionStore) -> None:
        super().__init__()
        kept = ", ".join(controller.keeps) or "no"
        self._reason = (
            f'{key}: {type(controller).__name__} keeps {kept} maps: make it with keeps=("cross", "self") to ask for '
            "all of them after a run"
        )

    def __getitem__(self, index: Any) -> NoReturn:
        raise LookupError(self._reason)

    def __iter__(self) -> Iterator[Any]:
        raise LookupError(self._reason)


def _checked(keeps: Sequence[str]) -> tuple[str, ...]:
    given = (keeps,) if isinstance(keeps, str) else tuple(keeps)
    if not set(given) <= set(KINDS):
        raise ValueError(f'keeps names kinds of layers, "cross" and "self", got {keeps!r}')
    return given


def _kept(attn: Any) -> Any:
    """A map of a step that has ended, which nobody holds for its layer's sake; tensors stay as they are."""
    return attn.keep() if isinstance(attn, LazyMap) else attn
