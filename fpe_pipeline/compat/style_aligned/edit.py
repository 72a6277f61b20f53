"""What StyleAligned's options make of a layer, as products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from numbers import Real

from ...edits.base import Edit
from ...edits.products import Product
from ...errors import InputError
from ...models.roles import BatchRoles
from ...models.sites import Site
from ...models.steps import Step

__all__ = ["SharedAttention", "StyleAlignedArgs", "groups_of", "left_alone"]


@dataclass(frozen=True)
class StyleAlignedArgs:
    """What the images of a batch share with the first of them, the reference.

    Args:
        share_group_norm: group norms of the UNet take their statistics over an image and the reference together.
        share_layer_norm: changes nothing, as a layer norm sees one token.
        share_attention: images also attend to the reference's keys and values.
        adain_queries, adain_keys, adain_values: these take the reference's mean and deviation over tokens.
        full_attention_share: every image attends to the tokens of all; then AdaIN, scale and shift are left out.
        shared_score_scale: the reference's keys are multiplied with it, as the other images see them.
        shared_score_shift: added to the scores of the reference's tokens (natural-log units).
        only_self_level: the share of self-attention layers that is left alone, from 0 to 1, spread evenly.

    Raises:
        ValueError: numbers that are none or not finite, a level outside [0, 1], switches that are not True or False.
    """

    share_group_norm: bool = True
    share_layer_norm: bool = True
    share_attention: bool = True
    adain_queries: bool = True
    adain_keys: bool = True
    adain_values: bool = False
    full_attention_share: bool = False
    shared_score_scale: float = 1.0
    shared_score_shift: float = 0.0
    only_self_level: float = 0.0

    def __post_init__(self) -> None:
        for name in ("shared_score_scale", "shared_score_shift", "only_self_level"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not isfinite(value):
                raise InputError(f"expected {name} to be a finite number, got {value!r}")
        for name, default in ((field.name, field.default) for field in fields(self)):
            if isinstance(default, bool) and not isinstance(getattr(self, name), bool):
                raise InputError(f"expected {name} to be True or False, got {getattr(self, name)!r}")
        if not 0 <= self.only_self_level <= 1:
            raise InputError(f"expected only_self_level to be in [0, 1], got {self.only_self_level!r}")


def groups_of(rows: int, guided: bool, compat: str | None) -> tuple[tuple[int, ...], ...]:
    """The rows that share with one another: of each half, the first of which is the reference.

    Args:
        rows: of the batch.
        guided: whether it holds an unconditional half.
        compat: "original" takes two halves of every batch.

    Raises:
        ValueError: two halves of an odd number of rows.
    """
    if not (guided or compat == "original"):
        return (tuple(range(rows)),)
    if rows % 2:
        raise InputError(
            f"StyleAligned takes every batch for two halves, and this one has {rows} rows: leave "
            'compat="original" out where there is no guidance'
        )
    return tuple(range(rows // 2)), tuple(range(rows // 2, rows))


def left_alone(layers: int, level: float, compat: str | None) -> frozenset[int]:
    """The numbers of the layers that ``only_self_level`` leaves alone.

    Every k-th, for the level's share of them rounded down; above one half all but every k-th.

    Raises:
        ValueError: with "original", a level so small that it names no layer, by which the original divides.
    """
    if level in (0, 1):
        return frozenset(range(layers) if level else ())
    count = int((1 - level if level > 0.5 else level) * layers)
    if count == 0 and compat == "original":
        raise InputError(
            f"only_self_level={level} of {layers} layers is less than one, by which StyleAligned's own code divides: "
            'name more, or leave compat="original" out'
        )
    every = frozenset(range(0, layers, layers // count)) if count else frozenset()
    return frozenset(range(layers)) - every if level > 0.5 else every


@dataclass(frozen=True)
class SharedAttention(Edit):
    """Self-attention layers in which images share.

    Args:
        options: what is shared.
        compat: "original" counts the layers in the order in which a UNet lists them: down, up, mid.
    """

    options: StyleAlignedArgs = StyleAlignedArgs()
    compat: str | None = None

    @property
    def pairs_pixels(self) -> bool:
        return False

    def select(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        layers = [site for site in sites if site.kind == "self"]
        if self.compat == "original":
            layers.sort(key=lambda site: ("down", "up", "mid").index(site.place))
        alone = left_alone(len(layers), self.options.only_self_level, self.compat)
        chosen = {site for number, site in enumerate(layers) if number not in alone}
        return tuple(site for site in sites if site in chosen)

    def windows(self) -> Sequence[tuple[str, object]]:  # type: ignore[override]
        return ()  # leaving every layer alone is what some options ask for

    def products(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, Product]:
        guided = bool(roles.select(conditional=False)) and bool(roles.select(conditional=True))
        products: dict[int, Product] = {}
        for group in groups_of(roles.batch, guided, self.compat):
            for row in group if self.options.full_attention_share else group[1:]:
                products[row] = self._product(row, group)
        return products

    def _product(self, row: int, group: tuple[int, ...]) -> Product:
        options, reference = self.options, group[0]
        if options.full_attention_share:
            return Product(row, group, group)
        parts = {"query": options.adain_queries, "key": options.adain_keys, "value": options.adain_values}
        styled = tuple(part for part, asked in parts.items() if asked)
        style = reference if styled else None
        if not options.share_attention:
            return Product(row, (row,), (row,), style=style, styled=styled)
        shift, scale = options.shared_score_shift, options.shared_score_scale
        shifts = (0.0, float(shift)) if shift else ()
        scales = (1.0, float(scale)) if scale != 1 else ()
        rows = (row, reference)
        return Product(row, rows, rows, style=style, shifts=shifts, styled=styled, scales=scales)
