"""Maps put together: parts of the keys in one softmax, blocks, and terms that share a pass."""

from __future__ import annotations

from .svg import GREY, OURS, PALE, SOURCE, TARGET, Drawing


def join() -> str:
    picture = Drawing(760, 250, "join: parts of the keys, normalised together")
    picture.words(20, 18, "join([text, image]): one softmax over the keys of both", size=14)
    for y, name in ((62, "row 0"), (118, "row 1"), (174, "row 2")):
        picture.words(20, y + 20, name)
        picture.box(70, y, 110, 40, "text, its own", TARGET)
        picture.line((360, 138), (240, y + 20), strong=True)
        picture.box(184, y, 56, 40, "image", SOURCE)
        picture.words(530, y + 20, "w₁ ⊙ O₁ + w₂ ⊙ O₂", size=12)
    picture.box(360, 118, 140, 40, "image map: 1 pass", SOURCE)
    picture.words(
        20, 230, "wᵢ = exp(Lᵢ − L),  L = log Σ exp(Lᵢ): merged in the launch of the part that is each row's own"
    )
    return picture.text()


def blocks() -> str:
    picture = Drawing(760, 280, "stack and beside: a map from blocks of two")
    picture.words(20, 18, "stack([target.queries(T), beside([target.block(I, T), source.block(I, I)])])", size=14)
    for x, name, fill in ((20, "target", TARGET), (260, "source", SOURCE)):
        picture.words(x + 90, 50, name, anchor="middle")
        picture.box(x, 66, 60, 40, "T, T", fill)
        picture.box(x + 62, 66, 120, 40, "T, I", fill)
        picture.box(x, 108, 60, 120, "I, T", fill)
        picture.box(x + 62, 108, 120, 120, "I, I", fill)
    picture.words(466, 148, "→", size=20)
    picture.words(600, 50, "edited", anchor="middle")
    picture.box(510, 66, 60, 40, "T, T", TARGET)
    picture.box(572, 66, 120, 40, "T, I", TARGET)
    picture.box(510, 108, 60, 120, "I, T", TARGET)
    picture.box(572, 108, 120, 120, "I, I", SOURCE)
    picture.words(
        20, 256, "T: text tokens, I: image tokens. Rows are queries, columns keys; no block is normalised again."
    )
    return picture.text()


def products() -> str:
    picture = Drawing(760, 214, "a product of a sum of maps")
    picture.words(20, 18, "(A.mix(M) + 0.3 * A + B) @ v: what a product computes", size=14)
    for y, changed in ((62, "M @ v"), (106, "v"), (150, "v")):
        picture.box(20, y, 60, 30, "v", PALE)
        picture.line((80, y + 15), (120, y + 15))
        picture.box(120, y, 90, 30, changed, PALE)
        strong = y < 150
        picture.line((210, y + 15), (290, 99 if strong else y + 15), strong=strong)
        picture.line((510, 99 if strong else y + 15), (590, y + 15), strong=strong)
    picture.box(290, 74, 220, 50, "A: scores, softmax, 2 products", SOURCE)
    picture.box(290, 150, 220, 30, "B: scores, softmax, 1 product", TARGET)
    for y, words in ((62, "1 ⊙"), (106, "0.3 ⊙"), (150, "1 ⊙")):
        picture.box(590, y, 60, 30, words, PALE)
        picture.line((650, y + 15), (700, 121))
    picture.box(700, 106, 30, 30, "+", PALE)
    picture.words(
        20, 200, "Terms that name one map are one pass over its scores, as columns beside one another.", colour=OURS
    )
    return picture.text()


def forward() -> str:
    picture = Drawing(760, 300, "the forward kernel: one pass over the scores, many columns")
    picture.words(20, 18, "One program: a tile of queries, all values of the rows that share the map", size=14)
    picture.box(20, 60, 80, 60, "Q tile", SOURCE)
    picture.words(140, 44, "key tiles, one after the other", size=11)
    for number in range(5):
        picture.box(140 + 58 * number, 60, 54, 60, f"K {number}", SOURCE if number == 2 else PALE)
    picture.line((283, 120), (283, 150), strong=True)
    picture.box(170, 150, 226, 36, "S = scale · Q Kᵀ;  P = exp(S − m)", PALE)
    picture.line((283, 186), (283, 216), strong=True)
    picture.words(460, 44, "values of the same keys, packed", size=11)
    for number, (name, fill) in enumerate((("source", SOURCE), ("target 1", TARGET), ("target 2", TARGET))):
        picture.box(460 + 90 * number, 60, 86, 60, name, fill)
        picture.box(140 + 110 * number, 216, 106, 36, f"O {name}", fill)
    picture.line((590, 120), (466, 216), strong=True)
    picture.words(490, 234, "accumulators in registers, float32", size=11, colour=GREY)
    picture.words(
        20, 280, "Scores and exponentials once for all columns; no row of the map is ever written.", colour=OURS
    )
    return picture.text()


def hopper() -> str:
    picture = Drawing(760, 250, "the kernel for Hopper: who does what when")
    picture.words(20, 18, "A program on Hopper: a warp fetches, warpgroups multiply and exponentiate in turns", size=14)
    lanes = (
        (60, "fetching warp", ("K0 V0", "K1 V1", "K2 V2", "K3 V3")),
        (110, "matrix units, group 1", ("S0", "S1  P0·V0", "S2  P1·V1", "S3  P2·V2")),
        (160, "exponentials, group 1", ("", "P0 = exp S0", "P1 = exp S1", "P2 = exp S2")),
    )
    for y, name, parts in lanes:
        picture.words(20, y + 16, name)
        for number, words in enumerate(parts):
            if words:
                x = 190 + 136 * number + (60 if y == 160 else 30 if y == 110 else 0) - (68 if y == 160 else 0)
                picture.box(x, y, 124, 32, words, SOURCE if y == 60 else TARGET if y == 110 else PALE)
    picture.words(
        20,
        226,
        "S(j) is issued, then P(j−1) V(j−1) behind it; the exponentials of S(j) are taken meanwhile.",
        colour=OURS,
    )
    return picture.text()
