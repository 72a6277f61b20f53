"""Which layers an edit applies to: by level, by token count or by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any, get_args

from ..models.sites import Kind, Site, describe_sites

__all__ = ["LayerSelection", "refuse_transformer", "truth_value", "unit_number", "whole_numbers"]


@dataclass(frozen=True)
class LayerSelection:
    """The layers of one kind that satisfy at most one of three conditions; with none, all of the kind.

    Args:
        kind: self- or cross-attention, or a transformer's joint attention.
        levels: how often a layer's input is downsampled from the latent: an int or several. On SD 1.5 at
            512 px, levels 0, 1, 2, 3 are 64², 32², 16² and 8² tokens.
        max_tokens: at most so many query tokens; 0 for no layer. This depends on the image's size, levels do not.
        layers: module paths, or beginnings of paths that end at a dot ("up_blocks.1"), or indices among the
            layers of the kind in execution order. Every entry must match.
    """

    kind: Kind
    levels: tuple[int, ...] | None = None
    max_tokens: int | None = None
    layers: tuple[str | int, ...] | None = None

    @classmethod
    def parse(cls, kind: Kind, *, levels: Any = None, max_tokens: Any = None, layers: Any = None) -> LayerSelection:
        """A selection from what users write: a single value, or any iterable of them.

        Raises:
            ValueError: no such kind, more than one condition, an empty one, or values that cannot be levels, counts or
                layers.
        """
        if not isinstance(kind, str) or kind not in get_args(Kind):
            raise ValueError(f"expected a kind of attention, {', '.join(get_args(Kind))}, got {kind!r}")
        given = {"levels": levels, "max_tokens": max_tokens, "layers": layers}
        named = [name for name, value in given.items() if value is not None]
        if len(named) > 1:
            raise ValueError(f"name one of levels, max_tokens and layers, not {' and '.join(named)}: they may disagree")
        return cls(
            kind,
            levels=None if levels is None else whole_numbers("levels", levels, minimum=0),
            max_tokens=None if max_tokens is None else whole_numbers("max_tokens", [max_tokens])[0],
            layers=None if layers is None else _layer_names(layers),
        )

    def match(self, sites: tuple[Site, ...], *, by_default: bool = False) -> tuple[Site, ...]:
        """The selected sites, in execution order. ``max_tokens`` keeps sites whose size is not known yet.

        Args:
            sites: to choose from.
            by_default: whether nobody asked for these conditions, so that an error does not speak of them.

        Raises:
            ValueError: nothing matches, or an entry of ``layers`` does not. The message lists what there is.
        """
        candidates = tuple(site for site in sites if self._may_name(site))
        if not candidates:
            refuse_transformer(self.kind, sites)
        chosen = tuple(site for site in candidates if self._matches(site))
        unmatched = [name for name in self.layers or () if not any(_is_named(site, name) for site in candidates)]
        if unmatched or not (chosen or self.max_tokens == 0):
            wanted = f"layers {unmatched}" if unmatched else str(self)
            model = "transformer" if self.kind == "joint" else "UNet"
            if by_default:
                raise ValueError(
                    f"the layers that are edited where none are named are not among this UNet's {len(candidates)} "
                    f"{self.kind}-attention layers: choose some with levels=, max_tokens= or layers=\n"
                    f"{describe_sites(candidates)}"
                )
            raise ValueError(
                f"{wanted} match none of the {model}'s {len(candidates)} {self.kind}-attention layers:\n"
                f"{describe_sites(candidates)}"
            )
        return chosen

    def selects(self, site: Site) -> bool:
        """Whether a site is among the selected ones."""
        return self._may_name(site) and self._matches(site)

    def _may_name(self, site: Site) -> bool:
        # Beside joint attention some transformers have layers of image tokens alone, which are edited where their path
        # is named: an index would stand for two layers.
        beside = self.kind == "joint" and site.kind == "image" and self.layers is not None
        return site.kind == self.kind or (beside and any(_is_path_of(site, name) for name in self.layers or ()))

    def _matches(self, site: Site) -> bool:
        if self.levels is not None:
            return site.level in self.levels
        if self.max_tokens is not None:
            return self.max_tokens > 0 and (site.tokens is None or site.tokens <= self.max_tokens)
        if self.layers is not None:
            return any(_is_named(site, name) for name in self.layers)
        return True

    def __str__(self) -> str:
        for name in ("levels", "max_tokens", "layers"):
            if getattr(self, name) is not None:
                return f"{name}={getattr(self, name)}"
        return f"{self.kind}-attention layers"


def refuse_transformer(kind: Kind, sites: tuple[Site, ...]) -> None:
    """Raise ValueError where the sites are a transformer's, and an edit speaks of a kind of layers that it has not."""
    if any(site.is_joint for site in sites):
        raise ValueError(
            f"this edit speaks of {kind}-attention layers, and the transformer has none: its {len(sites)} layers "
            "attend to image and text tokens together, which FreePromptEdit, MasaCtrlEdit, PromptToPromptEdit, "
            "ConsistEdit, StableFlowEdit, FreeFluxEdit and ReFlexEdit edit"
        )


def _is_named(site: Site, name: str | int) -> bool:
    if isinstance(name, int):
        return site.index == name and site.kind != "image"
    return _is_path_of(site, name)


def _is_path_of(site: Site, name: str | int) -> bool:
    return isinstance(name, str) and (site.path == name or site.path.startswith(f"{name}."))


def whole_numbers(name: str, values: Any, minimum: int = 0) -> tuple[int, ...]:
    """One or several integers, as a sorted tuple; ValueError for anything else."""
    values = tuple(values) if isinstance(values, Iterable) and not isinstance(values, str) else (values,)
    for value in values:
        if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) < minimum:
            raise ValueError(f"expected {name} to be integers >= {minimum}, got {value!r}")
    if not values:
        raise ValueError(f"expected at least one value for {name}, got none; to edit nothing, use no session")
    return tuple(sorted({int(value) for value in values}))


def unit_number(value: Any, name: str) -> float:
    """A number from 0 to 1; ValueError for anything else."""
    if hasattr(value, "item"):
        value = value.item()
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else float("nan")
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"expected {name} to be a number in [0, 1], got {value!r}")
    return number


def truth_value(value: Any, name: str) -> bool:
    """True or False, also NumPy's or PyTorch's; ValueError for anything else, such as a text, which would count as
    True."""
    stored = value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
    if not isinstance(stored, bool):
        raise ValueError(f"expected {name} to be True or False, got {value!r}")
    return stored


def _layer_names(layers: Any) -> tuple[str | int, ...]:
    layers = (layers,) if isinstance(layers, (str, int)) else tuple(layers)
    if not layers:
        raise ValueError("expected at least one entry in layers; to edit nothing, use no session")
    names: list[str | int] = []
    for layer in layers:
        if isinstance(layer, Site):
            names.append(layer.path)
        elif isinstance(layer, str):
            names.append(layer.removesuffix(".processor").removesuffix("."))
        else:
            names.extend(whole_numbers("layers", [layer], minimum=0))
    return tuple(names)
