"""Where attention happens in a model, and how a UNet's layers are read from its modules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

__all__ = ["Place", "Site", "attention_sites", "describe_sites", "dual_and_single", "feature_shape"]

Place = Literal["down", "mid", "up", "dual", "single"]
Kind = Literal["self", "cross", "joint", "image"]


@dataclass(frozen=True)
class Site:
    """One attention layer of a model.

    Args:
        path: the layer's module path, such as ``down_blocks.0.attentions.0.transformer_blocks.0.attn1``.
        place: of a UNet down, mid or up; of a transformer "dual" where image and text have weights of their own, and
            "single" where they share them.
        kind: self- or cross-attention of a UNet; of a transformer "joint", one softmax over image and text tokens, or
            "image", self-attention of the image's tokens beside that.
        index: position among the layers of its kind, in execution order (down, mid, up).
        heads: attention heads.
        level: how many times the layer's input is downsampled relative to the latent; 0 throughout a transformer.
        downsampling: for each of these times, whether an odd size rounds "up" or "down".
        grid: (height, width) of the layer's image tokens; None until the latent's size is known (:meth:`at`).
        latent: (height, width) of that latent.
        patch: pixels of the latent across a token, before any downsampling.
        frames: of a video, each a grid of tokens, one frame after the other; 1 of an image.
    """

    path: str
    place: Place
    kind: Kind
    index: int
    heads: int
    level: int
    downsampling: tuple[Literal["up", "down"], ...]
    grid: tuple[int, int] | None = None
    latent: tuple[int, int] | None = None
    patch: int = 1
    frames: int = 1

    @property
    def tokens(self) -> int | None:
        """Query tokens of the image, or of all frames of a video; None until the latent's size is known."""
        return None if self.grid is None else self.frames * self.grid[0] * self.grid[1]

    @property
    def is_joint(self) -> bool:
        """Whether it is a transformer's, in which image and text tokens stand in one sequence or beside one that is."""
        return self.kind in ("joint", "image")

    def at(self, height: int, width: int, frames: int = 1) -> Site:
        """This site for a latent of ``height`` × ``width``, or of so many frames of that size."""
        latent = (height, width)
        height, width = height // self.patch, width // self.patch
        for rounding in self.downsampling:
            height, width = ((size + (rounding == "up")) // 2 for size in (height, width))
        return replace(self, grid=(height, width), latent=latent, frames=frames)

    def __str__(self) -> str:
        size = "" if self.grid is None else f", {self.grid[0]} × {self.grid[1]}"
        size += f", {self.frames} frames" if self.frames > 1 else ""
        return f"{self.kind} {self.index}: {self.path} (level {self.level}, {self.heads} heads{size})"


def attention_sites(unet: Any) -> tuple[Site, ...]:
    """The attention layers of a UNet in execution order.

    Args:
        unet: of diffusers.

    Returns:
        One site a layer, of no size: ``site.at(height, width)`` of the latents gives it one.

    Raises:
        TypeError: the model is not a UNet with ``attn_processors``, ``down_blocks`` and ``up_blocks``.
    """
    missing = [name for name in ("attn_processors", "down_blocks", "up_blocks") if not hasattr(unet, name)]
    if missing:
        raise TypeError(
            f"expected a diffusers UNet (with attn_processors, down_blocks and up_blocks), got {type(unet).__name__} "
            f"without {', '.join(missing)}"
        )
    paths = [name.removesuffix(".processor") for name in unet.attn_processors]
    counts: dict[str, int] = {"self": 0, "cross": 0}
    sites = []
    for prefix, place, block, downsampling in _blocks(unet):
        for path in paths:
            # Only a block's `attentions` hold spatial layers: motion modules attend over frames, and GLIGEN's
            # fuser over pixels and boxes together.
            if not path.startswith(f"{prefix}.attentions.") or ".fuser." in path:
                continue
            attention: Any = block.get_submodule(path.removeprefix(f"{prefix}."))
            kind: Kind = "cross" if attention.is_cross_attention else "self"
            sites.append(Site(path, place, kind, counts[kind], attention.heads, len(downsampling), downsampling))
            counts[kind] += 1
    return tuple(sites)


def dual_and_single(
    module: Any,
    patch: int,
    dual: str = "transformer_blocks",
    single: str = "single_transformer_blocks",
    layer: str = "attn",
) -> tuple[Site, ...]:
    """The layers of a transformer of dual blocks and, behind them, of single ones, if it has any.

    Args:
        module: the transformer.
        patch: of the sites.
        dual, single: the names of its lists of blocks.
        layer: the path of a block's layer of joint attention in it.
    """
    kinds: tuple[tuple[Place, str], ...] = (("dual", dual), ("single", single))
    found = [
        (place, f"{name}.{index}.{layer}", block.get_submodule(layer).heads)
        for place, name in kinds
        for index, block in enumerate(getattr(module, name, ()))
    ]
    return tuple(
        Site(path, place, "joint", index, heads, 0, (), patch=patch) for index, (place, path, heads) in enumerate(found)
    )


def describe_sites(sites: tuple[Site, ...]) -> str:
    """A list for error messages, a line a site."""
    return "\n".join(f"  {site}" for site in sites) or "  (none)"


def feature_shape(unet: Any, path: str, height: int, width: int) -> tuple[int, int, int]:
    """(channels, height, width) of the output of a module in one of the UNet's blocks, for a latent of this size.

    Raises:
        ValueError: a module that changes the size itself, lies in no block, or does not say its channels.
    """
    channels = getattr(unet.get_submodule(path), "out_channels", None)
    for prefix, _, _, downsampling in _blocks(unet):
        if channels is not None and path.startswith((f"{prefix}.resnets.", f"{prefix}.attentions.")):
            for rounding in downsampling:
                height, width = ((size + (rounding == "up")) // 2 for size in (height, width))
            return channels, height, width
    raise ValueError(
        f"the size of {path!r}'s output is not known beforehand: name a residual block, or a convolution in one, such "
        "as 'up_blocks.1.resnets.1.conv2'"
    )


def _blocks(unet: Any) -> Iterator[tuple[str, Place, nn.Module, tuple[Literal["up", "down"], ...]]]:
    """(path, place, module, downsamplings so far) in execution order, which is not the order of registration."""
    passed: tuple[Literal["up", "down"], ...] = ()
    for index, block in enumerate(unet.down_blocks):
        yield f"down_blocks.{index}", "down", block, passed
        for downsampler in getattr(block, "downsamplers", None) or ():
            passed += (_rounding(downsampler),)
    if getattr(unet, "mid_block", None) is not None:
        yield "mid_block", "mid", unet.mid_block, passed
    for index, block in enumerate(unet.up_blocks):
        yield f"up_blocks.{index}", "up", block, passed
        if getattr(block, "upsamplers", None):
            passed = passed[:-1]


def _rounding(downsampler: nn.Module) -> Literal["up", "down"]:
    # A 3 × 3 convolution with padding 1 on both sides gives ⌈n/2⌉. Everything else gives ⌊n/2⌋: pooling, and the
    # one-sided padding of `downsample_padding=0`.
    padded = getattr(downsampler, "use_conv", False) and getattr(downsampler, "padding", 0) == 1
    return "up" if padded else "down"
