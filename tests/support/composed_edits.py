"""Every edit of the literature twice: as linear algebra of maps, and as the equation on dense matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fpe_kernels import AttentionMap, LinearMap, beside, blend, concatenate, join, stack
from fpe_kernels.backends.reference import attention_map
from fpe_kernels.testing import assert_within_budget, make

HEADS, PIXELS, WORDS, DIM = 2, 12, 7, 8


@dataclass
class Tensors:
    """What the edits of one source and two targets are made of; a self map has PIXELS keys, a cross map WORDS."""

    q_src: Tensor
    q_tgt: Tensor
    k_src: Tensor
    k_tgt: Tensor
    v_src: Tensor
    v_tgt: Tensor
    k_words_src: Tensor
    k_words_tgt: Tensor
    v_words_src: Tensor
    v_words_tgt: Tensor
    alpha: Tensor  # [WORDS]: how much of each word's map comes from the source
    mapper: Tensor  # [WORDS, WORDS] of the targets, one each: [2, 1, WORDS, WORDS]
    equalizer: Tensor  # [WORDS]
    mask: Tensor  # [PIXELS]: the region, soft at its edge
    pixels: Tensor  # [2, HEADS, PIXELS, 3]: the operand of transposes

    @classmethod
    def make(cls, dtype: torch.dtype, device: str = "cpu") -> Tensors:
        rng = torch.Generator().manual_seed(0)
        mapper = torch.rand(2, 1, WORDS, WORDS, generator=rng) * (torch.rand(WORDS, WORDS, generator=rng) < 0.3)
        mask = torch.tensor([1.0] * 5 + [0.25, 0.75] + [0.0] * 5)
        given = {
            "alpha": torch.tensor([1.0, 1.0, 0.0, 0.5, 0.25, 1.0, 0.0]),
            "mapper": mapper,
            "equalizer": torch.tensor([1.0, 1.0, 4.0, -2.0, 1.0, 0.0, 1.0]),
            "mask": mask,
            "pixels": make((2, HEADS, PIXELS, 3), 99),
        }
        for seed, field in enumerate(fields(cls)):
            batch = 1 if field.name.endswith("src") else 2
            tokens = WORDS if "words" in field.name else PIXELS
            given.setdefault(field.name, make((batch, HEADS, tokens, DIM), seed))
        return cls(**{name: tensor.to(device, dtype) for name, tensor in given.items()})

    def to(self, dtype: torch.dtype) -> Tensors:
        return Tensors(**{name: tensor.to(dtype) for name, tensor in vars(self).items()})

    def magnitude(self) -> Tensors:
        """The same with absolute values on the value side: what the terms of a result add up to."""
        sides = ("v_src", "v_tgt", "v_words_src", "v_words_tgt", "equalizer", "pixels")
        return Tensors(**{name: t.double().abs() if name in sides else t.double() for name, t in vars(self).items()})


def softmax(query: Tensor, key: Tensor) -> Tensor:
    return attention_map(query, key, None, query.shape[-1] ** -0.5)[0]


def joint_softmax(query: Tensor, *keys: Tensor) -> Tensor:
    """One softmax over several keys, each of one or two batch rows."""
    batch = max(tensor.shape[0] for tensor in (query, *keys))
    return softmax(query, torch.cat([key.expand(batch, -1, -1, -1) for key in keys], dim=2))


def rows(weight: Tensor) -> Tensor:
    return weight.unsqueeze(-1)


Make = Callable[[Tensor, Tensor], LinearMap]


class Edits:
    """Each edit twice: ``lazy`` as algebra of maps that ``A(q, k)`` makes, ``dense`` as the equation on matrices."""

    class FreePromptEditing:
        def lazy(self, t: Tensors, A: Make) -> Tensor:
            return A(t.q_src, t.k_src).take([0, 0]) @ t.v_tgt

        def dense(self, t: Tensors) -> Tensor:
            return softmax(t.q_src, t.k_src) @ t.v_tgt

    class SourceAndTargetsInOneBatch:
        def lazy(self, t: Tensors, A: Make) -> Tensor:
            return A(t.q_src, t.k_src).take([0, 0, 0]) @ torch.cat([t.v_src, t.v_tgt])

        def dense(self, t: Tensors) -> Tensor:
            return softmax(t.q_src, t.k_src) @ torch.cat([t.v_src, t.v_tgt])

    class SoftFreePromptEditing:
        def lazy(self, t: Tensors, A: Make) -> Tensor:
            return blend(0.3, A(t.q_src, t.k_src).take([0, 0]), A(t.q_tgt, t.k_tgt)) @ t.v_tgt

        def dense(self, t: Tensors) -> Tensor:
            return (0.3 * softmax(t.q_src, t.k_src) + 0.7 * softmax(t.q_tgt, t.k_tgt)) @ t.v_tgt

    class OwnSoftnessOfEachTarget:
        def lazy(self, t: Tensors, A: Make) -> Tensor:
            return blend([0.25, 1.0], A(t.q_src, t.k_src).take([0, 0]), A(t.q_tgt, t.k_tgt)) @ t.v_tgt

        def dense(self, t: Tensors) -> Tensor:
            weight = torch.tensor([0.25, 1.0]).to(t.q_src).view(2, 1, 1, 1)
            return (weight * softmax(t.q_src, t.k_src) + (1 - weight) * softmax(t.q_tgt, t.k_tgt)) @ t.v_tgt

    class RegionalFreePromptEditing:
        def lazy(self, t: Tensors, A: Make) -> Tensor:
            return blend(t.mask, A(t.q_src, t.k_src).take([0, 0]), A(t.q_tgt, t.k_tgt)) @ t.v_tgt

        def dense(self, t: Tensors) -> Tensor:
            mixed = rows(t.mask) * softmax(t.q_src, t.k_src) + rows(1 - t.mask) * softmax(t.q_tgt, t.k_tgt)
            return mixed @ t.v_tgt

    class MasaCtrl:
        def lazy(self, t: Tensors, A: Make) -> Tensor:
            return A(t.q_tgt, t.k_src.expand(2, -1, -1, -1)) @ t.v_src.expand(2, -1, -1, -1)

        def dense(self, t: Tensors) -> Tensor:
            return softmax(t.q_tgt, t.k_src) @ t.v_src

    class StyleAligned:
        def lazy(self, t: Tensors, A: Make) -> Tensor:
            reference = t.k_src.expand(2, -1, -1, -1), t.v_src.expand(2, -1, -1, -1)
            keys, values = torch.cat([reference[0], t.k_tgt], dim=2), torch.cat([reference[1], t.v_tgt], dim=2)
            return A(t.q_tgt, keys) @ values

        def dense(self, t: Tensors) -> Tensor:
            scale = DIM**-0.5
            scores = scale * torch.cat(
                [t.q_tgt @ t.k_src.transpose(-1, -2), t.q_tgt @ t.k_tgt.transpose(-1, -2)], dim=-1
            )
            maps = scores.softmax(-1)
            return maps[..., :PIXELS] @ t.v_src + maps[..., PIXELS:] @ t.v_tgt

    class PromptToPromptReplace:
        def lazy(self, t: Tensors, A: Make) -> Tensor:
            return A(t.q_src, t.k_words_src).take([0, 0]).mix(t.mapper) @ t.v_words_tgt

        def dense(self, t: Tensors) -> Tensor:
            source = softmax(t.q_src, t.k_words_src)[0]
            return torch.einsum("hpw,bwn->bhpn", source, t.mapper[:, 0]) @ t.v_words_tgt

    class PromptToPromptRefine:
        def lazy(self, t: Tensors, A: Make) -> Tensor:
            source, target = A(t.q_src, t.k_words_src).take([0, 0]), A(t.q_tgt, t.k_words_tgt)
            edited = source.mix(t.mapper).scale_columns(t.alpha) + target.scale_columns(1 - t.alpha)
            return edited @ t.v_words_tgt

        def dense(self, t: Tensors) -> Tensor:
            source, target = softmax(t.q_src, t.k_words_src), softmax(t.q_tgt, t.k_words_tgt)
            return ((source @ t.mapper) * t.alpha + target * (1 - t.alpha)) @ t.v_words_tgt

    class PromptToPromptReweight:
        def lazy(self, t: Tensors, A: Make) -> Tensor:
            return A(t.q_src, t.k_words_src).take([0, 0]).scale_columns(t.equalizer) @ t.v_words_tgt

        def dense(self, t: Tensors) -> Tensor:
            return (softmax(t.q_src, t.k_words_src) * t.equalizer) @ t.v_words_tgt

    class PromptToPromptReweightAfterRefine:
        def lazy(self, t: Tensors, A: Make) -> Tensor:
            source, target = A(t.q_src, t.k_words_src).take([0, 0]), A(t.q_tgt, t.k_words_tgt)
            refined = source.mix(t.mapper).scale_columns(t.alpha) + target.scale_columns(1 - t.alpha)
            return refined.scale_columns(t.equalizer) @ t.v_words_tgt

        def dense(self, t: Tensors) -> Tensor:
            source, target = softmax(t.q_src, t.k_words_src), softmax(t.q_tgt, t.k_words_tgt)
            refined = (source @ t.mapper) * t.alpha + target * (1 - t.alpha)
            return (refined * t.equalizer) @ t.v_words_tgt

    class PromptToPromptWholeBatch:
        def lazy(self, t: Tensors, A: Make) -> Tensor:
            source, target = A(t.q_src, t.k_words_src), A(t.q_tgt, t.k_words_tgt)
            edited = source.take([0, 0]).mix(t.mapper).scale_columns(t.alpha) + target.scale_columns(1 - t.alpha)
            return concatenate([source, edited]) @ torch.cat([t.v_words_src, t.v_words_tgt])

        def dense(self, t: Tensors) -> Tensor:
            source, target = softmax(t.q_src, t.k_words_src), softmax(t.q_tgt, t.k_words_tgt)
            edited = (source @ t.mapper) * t.alpha + target * (1 - t.alpha)
            return torch.cat([source @ t.v_words_src, edited @ t.v_words_tgt])

    class WordHeatMaps:
        def lazy(self, t: Tensors, A: Make) -> Tensor:
            return A(t.q_tgt, t.k_words_tgt).scale_columns(t.equalizer).columns([2, 3]).mean(1)

        def dense(self, t: Tensors) -> Tensor:
            return (softmax(t.q_tgt, t.k_words_tgt) * t.equalizer)[..., [2, 3]].mean(1)

    class ColumnSumsOfABlend:
        def lazy(self, t: Tensors, A: Make) -> Tensor:
            return blend(t.mask, A(t.q_src, t.k_src).take([0, 0]), A(t.q_tgt, t.k_tgt)).column_sums().mean(1)

        def dense(self, t: Tensors) -> Tensor:
            mixed = rows(t.mask) * softmax(t.q_src, t.k_src) + rows(1 - t.mask) * softmax(t.q_tgt, t.k_tgt)
            return mixed.sum(-2).mean(1)

    class TransposeOfARefinement:
        def lazy(self, t: Tensors, A: Make) -> Tensor:
            source, target = A(t.q_src, t.k_words_src).take([0, 0]), A(t.q_tgt, t.k_words_tgt)
            edited = source.mix(t.mapper).scale_columns(t.alpha) + target.scale_columns(1 - t.alpha)
            return blend(t.mask, edited, target).T @ t.pixels

        def dense(self, t: Tensors) -> Tensor:
            source, target = softmax(t.q_src, t.k_words_src), softmax(t.q_tgt, t.k_words_tgt)
            edited = (source @ t.mapper) * t.alpha + target * (1 - t.alpha)
            mixed = rows(t.mask) * edited + rows(1 - t.mask) * target
            return mixed.transpose(-1, -2) @ t.pixels

    class DifferenceOfMaps:
        def lazy(self, t: Tensors, A: Make) -> Tensor:
            return (2.0 * A(t.q_src, t.k_src).take([0, 0]) - A(t.q_tgt, t.k_tgt)) @ t.v_tgt

        def dense(self, t: Tensors) -> Tensor:
            return (2.0 * softmax(t.q_src, t.k_src) - softmax(t.q_tgt, t.k_tgt)) @ t.v_tgt

    # Joint attention: text tokens, then image tokens, in one softmax. The text's keys stand for its queries too.

    class SharedImageKeysBesideOwnText:
        """Image rows of Shin et al. (2025): queries and image keys of the source, text keys and all values own."""

        def lazy(self, t: Tensors, A: Make) -> Tensor:
            text = A(t.q_src.expand(2, -1, -1, -1), t.k_words_tgt)
            return join([text, A(t.q_src, t.k_src).take([0, 0])]) @ torch.cat([t.v_words_tgt, t.v_tgt], dim=2)

        def dense(self, t: Tensors) -> Tensor:
            maps = joint_softmax(t.q_src, t.k_words_tgt, t.k_src)
            return maps @ torch.cat([t.v_words_tgt, t.v_tgt], dim=2)

    class SharedImageQueriesAndKeysInTheWholeMap:
        """The same with the text's rows, which keep their own queries, and see the source's image keys."""

        def lazy(self, t: Tensors, A: Make) -> Tensor:
            k_src = t.k_src.expand(2, -1, -1, -1)
            text_rows = join([A(t.k_words_tgt, t.k_words_tgt), A(t.k_words_tgt, k_src)])
            image_rows = join([A(t.q_src.expand(2, -1, -1, -1), t.k_words_tgt), A(t.q_src, t.k_src).take([0, 0])])
            return stack([text_rows, image_rows]) @ torch.cat([t.v_words_tgt, t.v_tgt], dim=2)

        def dense(self, t: Tensors) -> Tensor:
            queries = torch.cat([t.k_words_tgt, t.q_src.expand(2, -1, -1, -1)], dim=2)
            return joint_softmax(queries, t.k_words_tgt, t.k_src) @ torch.cat([t.v_words_tgt, t.v_tgt], dim=2)

    class BlocksAfterTheSoftmax:
        """Image rows of ReFlex (2025): the image block of the source's map, the text block of the target's."""

        def lazy(self, t: Tensors, A: Make) -> Tensor:
            source = join([A(t.q_src, t.k_words_src), A(t.q_src, t.k_src)]).take([0, 0])
            target = A(t.q_tgt, torch.cat([t.k_words_tgt, t.k_tgt], dim=2))
            mixed = beside([target.block(keys=(0, WORDS)), source.block(keys=(WORDS, WORDS + PIXELS))])
            return mixed @ torch.cat([t.v_words_tgt, t.v_tgt], dim=2)

        def dense(self, t: Tensors) -> Tensor:
            source = joint_softmax(t.q_src, t.k_words_src, t.k_src)[..., WORDS:]
            target = joint_softmax(t.q_tgt, t.k_words_tgt, t.k_tgt)[..., :WORDS]
            return target @ t.v_words_tgt + source @ t.v_tgt

    class SourceKeysAndValuesOfTheImage:
        """StableFlow and FreeFlux (2025): image keys and values of the source, text of the target."""

        def lazy(self, t: Tensors, A: Make) -> Tensor:
            joint = join([A(t.q_tgt, t.k_words_tgt), A(t.q_tgt, t.k_src.expand(2, -1, -1, -1))])
            return joint @ torch.cat([t.v_words_tgt, t.v_src.expand(2, -1, -1, -1)], dim=2)

        def dense(self, t: Tensors) -> Tensor:
            maps = joint_softmax(t.q_tgt, t.k_words_tgt, t.k_src)
            return maps[..., :WORDS] @ t.v_words_tgt + maps[..., WORDS:] @ t.v_src

    class RegionalBlendOfJoinedMaps:
        def lazy(self, t: Tensors, A: Make) -> Tensor:
            words = torch.cat([t.alpha, torch.ones_like(t.mask)])
            source = join([A(t.q_src, t.k_words_src), A(t.q_src, t.k_src)]).take([0, 0])
            target = join([A(t.q_tgt, t.k_words_tgt), A(t.q_tgt, t.k_tgt)])
            edited = blend(t.mask, source.scale_columns(words), target)
            return edited @ torch.cat([t.v_words_tgt, t.v_tgt], dim=2)

        def dense(self, t: Tensors) -> Tensor:
            words = torch.cat([t.alpha, torch.ones_like(t.mask)])
            source = joint_softmax(t.q_src, t.k_words_src, t.k_src) * words
            target = joint_softmax(t.q_tgt, t.k_words_tgt, t.k_tgt)
            mixed = rows(t.mask) * source + rows(1 - t.mask) * target
            return mixed @ torch.cat([t.v_words_tgt, t.v_tgt], dim=2)

    class TransposeOfAJoinedMap:
        def lazy(self, t: Tensors, A: Make) -> Tensor:
            text = A(t.q_src.expand(2, -1, -1, -1), t.k_words_tgt)
            return join([text, A(t.q_src, t.k_src).take([0, 0])]).T @ t.pixels

        def dense(self, t: Tensors) -> Tensor:
            return joint_softmax(t.q_src, t.k_words_tgt, t.k_src).transpose(-1, -2) @ t.pixels

    class WordColumnsOfAJoinedMap:
        def lazy(self, t: Tensors, A: Make) -> Tensor:
            text = A(t.q_src.expand(2, -1, -1, -1), t.k_words_tgt)
            return join([text, A(t.q_src, t.k_src).take([0, 0])]).columns([2, WORDS + 3]).mean(1)

        def dense(self, t: Tensors) -> Tensor:
            return joint_softmax(t.q_src, t.k_words_tgt, t.k_src)[..., [2, WORDS + 3]].mean(1)


EDITS = {name: edit() for name, edit in vars(Edits).items() if isinstance(edit, type)}


def maker(backend: str) -> Make:
    return lambda query, key: AttentionMap(query, key, backend=backend)


def check(found: Tensor, edit, tensors: Tensors) -> None:
    dtype = tensors.q_src.dtype
    exact, plain = edit.dense(tensors.to(torch.float64)), edit.dense(tensors)
    magnitude = float(edit.dense(tensors.magnitude()).abs().max())
    scores = max(
        float((q.double().abs() @ k.double().abs().transpose(-1, -2)).max())
        for q in (tensors.q_src, tensors.q_tgt)
        for k in (tensors.k_src, tensors.k_tgt, tensors.k_words_src, tensors.k_words_tgt)
    )
    assert found.dtype == dtype
    assert_within_budget(found, plain, exact, dtype, magnitude, scores * DIM**-0.5)


def pair() -> tuple[AttentionMap, AttentionMap]:
    """A source's self-attention map [1, …] and two targets' [2, …]."""
    t = Tensors.make(torch.float32)
    return AttentionMap(t.q_src, t.k_src), AttentionMap(t.q_tgt, t.k_tgt)
