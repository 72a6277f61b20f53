"""Every edit of the literature as linear algebra of maps, against the same algebra on dense matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

from fpe_kernels import AttentionMap, LinearMap, blend, concatenate
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


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("backend_name", ["reference", "torch"])
def test_edits_are_their_dense_equations_in_float64(name: str, backend_name: str) -> None:
    tensors = Tensors.make(torch.float64)
    found = EDITS[name].lazy(tensors, maker(backend_name))
    check(found, EDITS[name], tensors)
    torch.testing.assert_close(found, EDITS[name].dense(tensors), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", EDITS)
def test_edits_in_half_precision(name: str) -> None:
    tensors = Tensors.make(torch.float16)
    check(EDITS[name].lazy(tensors, maker("torch")), EDITS[name], tensors)


@pytest.mark.parametrize("name", EDITS)
def test_edits_through_the_kernels(name: str, triton_device: str) -> None:
    tensors = Tensors.make(torch.float32, triton_device)
    check(EDITS[name].lazy(tensors, maker("triton")), EDITS[name], tensors)


@pytest.fixture
def triton_device() -> str:
    pytest.importorskip("triton")
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("backend_name", ["reference", "torch"])
def test_gradients_of_edits(name: str, backend_name: str) -> None:
    leaves = Tensors.make(torch.float64)
    for tensor in vars(leaves).values():
        tensor.requires_grad_()
    seed = torch.cos(torch.arange(EDITS[name].dense(leaves).numel(), dtype=torch.float64))

    def gradients(result: Tensor) -> tuple:
        return torch.autograd.grad(result.flatten(), list(vars(leaves).values()), seed, allow_unused=True)

    found = gradients(EDITS[name].lazy(leaves, maker(backend_name)))
    for field, grad, exact in zip(vars(leaves), found, gradients(EDITS[name].dense(leaves)), strict=True):
        assert (grad is None) == (exact is None), field
        if grad is not None:
            # Some entries, as of a key against softmax, are differences of terms far larger than they are.
            magnitude = max(1.0, 10 * float(exact.abs().max()))
            assert_within_budget(grad, exact, exact, torch.float64, magnitude, scores=100.0, name=field)


# -- what is computed, and how often ----------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """Name and map_index of every product and adjoint of the torch backend."""
    from fpe_kernels.backends import chunked

    seen: list[tuple[str, tuple[int, ...]]] = []

    def count(name: str, place: int) -> None:
        original = getattr(chunked, name)

        def counted(*args, **kwargs):
            seen.append((name, args[place]))
            return original(*args, **kwargs)

        monkeypatch.setattr(chunked, name, counted)

    count("apply", 4)
    count("adjoint", 5)
    return seen


def pair() -> tuple[AttentionMap, AttentionMap]:
    t = Tensors.make(torch.float32)
    return AttentionMap(t.q_src, t.k_src), AttentionMap(t.q_tgt, t.k_tgt)


def test_one_pass_over_a_source_whatever_is_made_of_it(calls) -> None:
    Edits.PromptToPromptWholeBatch().lazy(Tensors.make(torch.float32), AttentionMap)
    assert calls == [("apply", (0, 0, 0)), ("apply", (0, 1))]


def test_a_gather_computes_a_map_once(calls) -> None:
    _, target = pair()
    value = torch.randn(3, HEADS, PIXELS, DIM)
    out = target.take([1, 0, 1]) @ value
    assert calls == [("apply", (1, 0, 1))]
    torch.testing.assert_close(out, target.dense()[[1, 0, 1]] @ value)


def test_terms_of_one_map_are_one_call_in_the_transpose_too(calls) -> None:
    source, _ = pair()
    weight = torch.randn(1, HEADS, PIXELS, 2)
    assert source.logsumexp.isfinite().all()
    calls.clear()
    (source.scale_rows(torch.rand(PIXELS)) + source.mix(torch.rand(PIXELS, PIXELS))).T @ weight
    assert calls == [("adjoint", (0, 0))]


def test_a_weight_of_zero_computes_nothing(calls) -> None:
    source, target = pair()
    value = torch.randn(2, HEADS, PIXELS, DIM)
    torch.testing.assert_close(blend(0.0, source.take([0, 0]), target) @ value, target @ value)
    assert {index for _, index in calls} == {(0, 1)}


def test_a_zero_map_is_zero() -> None:
    _, target = pair()
    assert (((0.0 * target) @ torch.randn(2, HEADS, PIXELS, 3)) == 0).all()


def test_the_logsumexp_is_kept_only_where_every_row_was_computed(calls) -> None:
    _, target = pair()
    target.take([1, 1]) @ torch.randn(2, HEADS, PIXELS, DIM)
    assert target.logsumexp.isfinite().all()
    assert [index for _, index in calls] == [(1, 1), (0, 1)]


# -- the algebra ------------------------------------------------------------------------------------------------------


def same(first: LinearMap, second: LinearMap) -> None:
    torch.testing.assert_close(first.dense(), second.dense())
    assert first.shape == second.shape == torch.Size(first.dense().shape)


def test_the_laws_of_the_algebra() -> None:
    source, target = pair()
    source = source.take([0, 0])
    weight, columns, matrix = torch.rand(PIXELS), torch.rand(PIXELS), torch.rand(PIXELS, 5)
    same(source + target, target + source)
    same((source + target).scale_rows(weight), weight * source + weight * target)
    same((source + target).mix(matrix), source.mix(matrix) + target.mix(matrix))
    same(source.scale_columns(columns), source.mix(torch.diag(columns)))
    same(source.scale_rows(weight).scale_columns(columns), source.scale_columns(columns).scale_rows(weight))
    same((source + target).take([1, 1, 0]), source.take([1, 1, 0]) + target.take([1, 1, 0]))
    same(source.take([1, 0]).take([1, 1]), source.take([0, 0]))
    same(source - target, -(target - source))
    same(source * 2.0, source + source)
    same(source.scale_columns(3), 3 * source)


def test_blocks_of_a_batch_may_be_cut_differently() -> None:
    source, target = pair()
    first = concatenate([source, target])
    second = concatenate([target.scale_rows(2.0), source])
    weight = torch.rand(3, 1, PIXELS)
    value = torch.randn(3, HEADS, PIXELS, 4)
    dense = first.dense() + weight.unsqueeze(-1) * second.dense()
    both = first + second.scale_rows(weight)
    torch.testing.assert_close(both @ value, dense @ value)
    torch.testing.assert_close(both.take([2, 0, 1, 2]).dense(), dense[[2, 0, 1, 2]])
    torch.testing.assert_close(both.T @ value, dense.transpose(-1, -2) @ value)
    torch.testing.assert_close(first.mix(torch.eye(PIXELS)[:, :3]).dense(), first.dense()[..., :3])


def test_views_of_a_combination_are_those_of_its_dense_map() -> None:
    source, target = pair()
    mixed = blend(torch.rand(2, HEADS, PIXELS), source.take([0, 0]), target)
    dense = mixed.dense()
    torch.testing.assert_close(mixed.rows([3, -1]), dense[:, :, [3, -1]])
    torch.testing.assert_close(mixed.columns(4), dense[..., [4]])
    torch.testing.assert_close(mixed.pooled((3, 4), (3, 4), 1)[..., 0, 0], dense.mean((-2, -1)))
    torch.testing.assert_close(mixed.column_sums(), dense.sum(-2))
    with pytest.raises(ValueError, match=r"takes 2,304 bytes, more than max_bytes=10"):
        mixed.dense(max_bytes=10)


def test_a_tuple_of_operands_is_one_pass(calls) -> None:
    source, target = pair()
    mixed = 0.5 * source.take([0, 0]) + target
    first, second = torch.randn(2, HEADS, PIXELS, 3), torch.randn(2, HEADS, PIXELS, 5)
    outs = mixed @ (first, second)
    assert len(calls) == 2
    torch.testing.assert_close(outs[0], mixed @ first)
    torch.testing.assert_close(outs[1], mixed @ second)
    backs = mixed.T @ [first, second]
    torch.testing.assert_close(backs[0], mixed.T @ first)
    torch.testing.assert_close(backs[1], mixed.T @ second)


def test_what_a_combination_says_of_itself() -> None:
    source, target = pair()
    mixed = source.take([0, 0]) + target
    assert repr(mixed) == "Combination(shape=(2, 2, 12, 12), dtype=torch.float32, device='cpu', terms=2, maps=2)"
    assert repr(mixed.T) == repr(mixed) + ".T"
    assert mixed.T.T is mixed
    assert mixed.mix(torch.ones(PIXELS, 3)).T.shape == (2, 2, 3, 12)
    assert (mixed.T.dtype, mixed.T.device) == (mixed.dtype, mixed.device)


@pytest.mark.parametrize("backend_name", ["reference", "torch"])
def test_combinations_compile_into_one_graph_with_gradients(backend_name: str) -> None:
    t = Tensors.make(torch.float64)
    leaves = [t.q_src, t.k_src, t.q_tgt, t.k_tgt, t.v_tgt, t.mask]

    def edited(q_src, k_src, q_tgt, k_tgt, v_tgt, mask) -> Tensor:
        source = AttentionMap(q_src, k_src, backend=backend_name).take([0, 0])
        target = AttentionMap(q_tgt, k_tgt, backend=backend_name)
        regional = blend(mask, source, target)
        return concatenate([source, regional.scale_columns(mask)]).matmul(torch.cat([v_tgt, v_tgt]))

    for leaf in leaves:
        leaf.requires_grad_()
    expected = edited(*leaves)
    compiled = torch.compile(edited, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-12)
    found = torch.autograd.grad(compiled.square().sum(), leaves)
    for grad, exact in zip(found, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
        torch.testing.assert_close(grad, exact, rtol=0, atol=1e-12)


# -- what is refused --------------------------------------------------------------------------------------------------

S, T = pair()
REFUSED = {
    "another batch": (lambda: S + T, ValueError, r"agree in \[B, H, N, M\]: got \[1, 2, .*A\.take\(index\)"),
    "a number added": (lambda: S + 1.0, TypeError, r"unsupported operand"),
    "another dtype": (lambda: T + AttentionMap(T.query.double(), T.key.double()), TypeError, r"the second map must"),
    "a tensor on the right": (lambda: T * torch.ones(12), TypeError, r"tensor \* A or A\.scale_rows.*A\.scale_columns"),
    "too few numbers": (lambda: T.scale_rows([0.5]), ValueError, r"one number for each of the 2 batch rows, got 1"),
    "numbers that are none": (lambda: T.scale_rows(["a", 1]), TypeError, r"weight\[0\] must be a number, got 'a'"),
    "a weight that is text": (lambda: T.scale_rows("a"), TypeError, r"weight must be a torch\.Tensor .*got str"),
    "a weight of truths": (lambda: T.scale_rows(torch.ones(12) > 0), TypeError, r"floating point, got torch\.bool"),
    "a weight of other tokens": (lambda: T.scale_rows(torch.ones(5)), ValueError, r"\[B, H, N\] = \[2, 2, 12\]"),
    "a weight of another dtype": (lambda: T.scale_rows(torch.ones(12).half()), TypeError, r"dtype of query or of its"),
    "a weight elsewhere": (lambda: T.scale_rows(torch.ones(12, device="meta")), ValueError, r"weight must be on the"),
    "column weights of others": (lambda: T.scale_columns(torch.ones(5)), ValueError, r"\[B, H, M\] = \[2, 2, 12\]"),
    "column weights as a list": (lambda: T.scale_columns([1.0] * 12), TypeError, r"must be a torch\.Tensor .*got list"),
    "a matrix that is flat": (lambda: T.mix(torch.ones(12)), TypeError, r"\[M, M'\].*got \[12\]"),
    "a matrix of others": (lambda: T.mix(torch.ones(5, 12)), ValueError, r"12 rows.*stored the other way is M\.T"),
    "a row that is not there": (lambda: T.take([2]), IndexError, r"index\[0\] is 2, but there are 2 map"),
    "no rows": (lambda: T.take([]), ValueError, r"A\.take\(\[\]\) has no batch row"),
    "no maps": (lambda: concatenate([]), ValueError, r"concatenate\(\[\]\) has no map"),
    "a tensor among maps": (lambda: concatenate([T, torch.ones(1)]), TypeError, r"takes maps .*got Tensor"),
    "a blend of products": (
        lambda: blend(0.5, T, torch.ones(1)),
        TypeError,
        r"blend takes maps .*torch's own arithmetic",
    ),
    "a blend of other rows": (lambda: blend(torch.ones(12), S, T), ValueError, r"agree in \[B, H, N, M\]"),
    "maps of other keys": (
        lambda: concatenate([T, T.mix(torch.ones(12, 5))]),
        ValueError,
        r"agree in \[H, N, M\].*A\.mix",
    ),
    "a value of the unmixed map": (
        lambda: T.mix(torch.ones(12, 5)) @ torch.ones(2, 2, 12, 1),
        ValueError,
        r"value must have 5 tokens",
    ),
    "an operand of the wrong side": (
        lambda: T.mix(torch.ones(12, 5)).T @ torch.ones(2, 2, 5, 1),
        ValueError,
        r"weight must agree with the map",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()
