"""Joint attention written out densely, from the papers' rules: tokens are exchanged, then there is one softmax."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen
from torch.nn import functional as F


class DenseJoint:
    """A processor that exchanges tokens between rows and computes every map: ``rule(row)`` says which tokens.

    Args:
        rule: for a row (``rows`` in all), None for its own tokens; or a list of (weight, sources), terms that are added
            up. A term's sources are a mapping from "q_image", "q_text", "k_image" … "v_text" to the row whose tokens
            stand there; what it leaves out is the row's own. In the place of a row (first, second, share [tokens]) are
            the tokens of two, mixed.
    """

    order = ("image", "text")
    #: A mistake that is planted: "swapped", the tokens of the other order are exchanged, or "before places", the
    #: queries of another row are exchanged before their norm and rotary embedding.
    fault = None
    #: Of text tokens that are no padding, as `dense_row` takes it.
    mask = None

    def __init__(self, rule, keep=None):
        self.rule, self.keep = rule, keep

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs):
        image, text = hidden_states, encoder_hidden_states
        parts = {
            "q_image": heads(attn, attn.to_q, image, attn.norm_q),
            "raw": heads(attn, attn.to_q, image),
            "k_image": heads(attn, attn.to_k, image, attn.norm_k),
            "v_image": heads(attn, attn.to_v, image),
        }
        if text is not None:
            parts |= {
                "q_text": heads(attn, attn.add_q_proj, text, attn.norm_added_q),
                "k_text": heads(attn, attn.add_k_proj, text, attn.norm_added_k),
                "v_text": heads(attn, attn.add_v_proj, text),
            }
        rows = hidden_states.shape[0]
        out = torch.stack([self.row(row, rows, parts) for row in range(rows)])
        tokens = image.shape[1]
        out_image = linear(attn.to_out[0], out[:, :tokens])
        if text is None:
            return out_image
        out_text = out[:, tokens:]
        return out_image, out_text if attn.context_pre_only else linear(attn.to_add_out, out_text)

    def row(self, row, rows, parts):
        keep = None if self.keep is None else lambda block: self.keep(row, rows, block)
        return dense_row(self.rule(row, rows), row, parts, self.order, keep, self.mask, self.fault)


class DenseFlux(DenseJoint):
    """The same in blocks of FLUX: text first, and queries and keys turned by their places after their norms."""

    order = ("text", "image")
    parts_at = -1

    def __init__(self, rule, texts, keep=None):
        super().__init__(rule, keep)
        self.texts = texts

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        single = encoder_hidden_states is None
        texts = self.texts() if single else encoder_hidden_states.shape[1]
        text, image = (
            (hidden_states[:, :texts], hidden_states[:, texts:]) if single else (encoder_hidden_states, hidden_states)
        )
        named = ("to_q", "to_k", "to_v", "norm_q", "norm_k")
        added = named if single else ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")
        parts = {}
        for segment, tokens, names in (("text", text, added), ("image", image, named)):
            for letter, name, norm in zip("qkv", names[:3], (*names[3:], None), strict=True):
                parts[f"{letter}_{segment}"] = heads(attn, getattr(attn, name), tokens, norm and getattr(attn, norm))
        out = self.attended(parts, heads(attn, attn.to_q, image), image_rotary_emb)
        if single:
            return out
        return linear(attn.to_out[0], out[:, texts:]), linear(attn.to_add_out, out[:, :texts])

    def attended(self, parts, raw, rotary):
        """The output [rows, tokens, H·D] of queries and keys that are normed and not turned yet."""
        texts, rows = parts["q_text"].shape[2], len(raw)
        for letter in "qk":
            both = torch.cat([parts[f"{letter}_text"], parts[f"{letter}_image"]], dim=2)
            both = apply_rotary_emb(both, rotary, use_real_unbind_dim=self.parts_at)
            parts[f"{letter}_text"], parts[f"{letter}_image"] = both[:, :, :texts], both[:, :, texts:]
        parts = {**self.split(parts), "raw": raw}
        return torch.stack([self.row(row, rows, parts) for row in range(rows)])

    def split(self, parts):
        return parts


class DenseChroma(DenseFlux):
    """The same in blocks of Chroma, which are told of their texts' padding by a mask of queries times keys."""

    #: A mistake that is planted: the blocks, "dual" or "single", that do not look at their masks.
    blind = ()

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        self.mask = None
        if attention_mask is not None and ("dual" if attn.added_kv_proj_dim else "single") not in self.blind:
            own = attention_mask[:, 0].diagonal(dim1=1, dim2=2)  # of a token with itself
            self.mask = own[:, : self.texts()].expand(len(hidden_states), -1)
        return super().__call__(attn, hidden_states, encoder_hidden_states, None, image_rotary_emb)


class DenseFlux2Single(DenseFlux):
    """The same in single blocks of FLUX.2, whose feed-forward part is projected beside queries, keys and values."""

    def __call__(self, attn, hidden_states, attention_mask=None, image_rotary_emb=None):
        texts, width = self.texts(), attn.inner_dim
        weights = [attn.to_qkv_mlp_proj.weight[part * width : (part + 1) * width] for part in range(3)]
        split = [F.linear(hidden_states, w).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for w in weights]
        normed = attn.norm_q(split[0]), attn.norm_k(split[1]), split[2]
        parts = {f"{letter}_text": part[:, :, :texts] for letter, part in zip("qkv", normed, strict=True)}
        parts |= {f"{letter}_image": part[:, :, texts:] for letter, part in zip("qkv", normed, strict=True)}
        out = self.attended(parts, split[0][:, :, texts:], image_rotary_emb)
        gate, forward = F.linear(hidden_states, attn.to_qkv_mlp_proj.weight[3 * width :]).chunk(2, dim=-1)
        return linear(attn.to_out, torch.cat([out, F.silu(gate) * forward], dim=-1))


class DenseKontext(DenseFlux):
    """The same where tokens of a reference picture follow those of the image: a segment of its own."""

    order = ("text", "image", "reference")

    def __init__(self, rule, texts, images, keep=None):
        super().__init__(rule, texts, keep)
        self.images = images

    def split(self, parts):
        for letter in "qkv":
            both = parts[f"{letter}_image"]
            parts[f"{letter}_image"], parts[f"{letter}_reference"] = (
                both[:, :, : self.images],
                both[:, :, self.images :],
            )
        return parts


class DenseQwen(DenseJoint):
    """The same in blocks of Qwen-Image: text first, each stream turned by itself, and texts padded at their ends."""

    order = ("text", "image", "reference")

    def __init__(self, rule, keep=None, images=None):
        super().__init__(rule, keep)
        self.images = images  # tokens of the image, where those of reference pictures follow them

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        encoder_hidden_states_mask=None,
        attention_mask=None,
        image_rotary_emb=None,
    ):
        image, text = hidden_states, encoder_hidden_states
        turned = dict(zip(("image", "text"), image_rotary_emb, strict=True))
        parts = {}
        for segment, tokens, names in (
            ("text", text, ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k")),
            ("image", image, ("to_q", "to_k", "to_v", "norm_q", "norm_k")),
        ):
            for letter, name, norm in zip("qkv", names[:3], (*names[3:], None), strict=True):
                part = heads(attn, getattr(attn, name), tokens, norm and getattr(attn, norm))
                if letter != "v":
                    part = apply_rotary_emb_qwen(part.transpose(1, 2), turned[segment], use_real=False).transpose(1, 2)
                parts[f"{letter}_{segment}"] = part
        self.mask = None if encoder_hidden_states_mask is None else encoder_hidden_states_mask.bool()
        for letter in "qkv" if self.images else "":
            both, tokens = parts[f"{letter}_image"], self.images
            parts[f"{letter}_image"], parts[f"{letter}_reference"] = both[:, :, :tokens], both[:, :, tokens:]
        parts["raw"] = heads(attn, attn.to_q, image[:, : self.images])
        rows = image.shape[0]
        out = torch.stack([self.row(row, rows, parts) for row in range(rows)])
        texts = text.shape[1]
        return linear(attn.to_out[0], out[:, texts:]), linear(attn.to_add_out, out[:, :texts])


def dense_row(terms, row, parts, order, keep=None, mask=None, fault=None):
    """One row's output [tokens, H·D]: segments in this order, and one softmax over all of their tokens.

    Args:
        keep: is shown the block of its map of image queries over text keys, [H, image tokens, text tokens].
        mask: of text tokens that are no padding, [rows, text tokens], which go where the keys of a row go. Numbers go
            where its queries go as well, and their products are added to scores.
        fault: as of `DenseJoint`.
    """
    if isinstance(terms, Blocks):
        return terms.row(row, parts, order, keep, mask, fault)
    total = kept = 0
    for weight, sources in terms or [(1.0, {})]:
        tokens = {name: stood_there(part, sources.get(name, row)) for name, part in parts.items() if name != "raw"}
        if fault == "before places" and sources.get("q_image", row) != row:
            tokens["q_image"] = stood_there(parts["raw"], sources["q_image"])
        if fault == "swapped":
            query, key, value = (swapped(letter, sources, row, parts, order) for letter in "qkv")
        else:
            query, key, value = (
                torch.cat([tokens[f"{letter}_{part}"] for part in order if f"{letter}_{part}" in tokens], dim=1)
                for letter in "qkv"
            )
        exists = existing(parts, order, mask, sources.get("q_text", row), sources.get("k_text", row))
        whole = written_out(query, key, exists)
        term = whole @ value  # [H, tokens, D]
        if isinstance(weight, torch.Tensor):  # of image tokens
            counts = {part: tokens[f"q_{part}"].shape[1] for part in order if f"q_{part}" in tokens}
            means = {part: weight.mean().expand(count) for part, count in counts.items()}
            weight = torch.cat(list({**means, "image": weight}.values()))[:, None]
        total = total + weight * term
        if keep is not None:
            kept = kept + weight * whole
    if keep is not None:
        image, text = ranges(parts, order, row)
        keep(kept[:, image, text])
    return total.transpose(0, 1).flatten(1)


def swapped(letter, sources, row, parts, order):
    """Queries, keys or values of all tokens, of which those that stand at the other order's places are exchanged."""
    names = [part for part in order if f"{letter}_{part}" in parts]
    wrong = other_order(names)
    whole = [torch.cat([parts[f"{letter}_{part}"][of] for part in names], dim=1) for of in range(len(parts["raw"]))]
    out, start = whole[row].clone(), 0
    for part in wrong:
        stop = start + parts[f"{letter}_{part}"][row].shape[1]
        there = [tokens[:, start:stop] for tokens in whole]
        out[:, start:stop] = stood_there(there, sources.get(f"{letter}_{part}", row))
        start = stop
    return out


def other_order(names):
    """Image and text in one another's places."""
    return [{"image": "text", "text": "image"}.get(name, name) if "text" in names else name for name in names]


def existing(parts, order, mask, asking, asked):
    """Which keys exist, where only these of the text do; what is added to scores, where the mask is numbers."""
    if mask is None:
        return None
    whole = {part: torch.ones(parts[f"k_{part}"].shape[2], dtype=mask.dtype) for part in order if f"k_{part}" in parts}
    asks, exists = (torch.cat([*({**whole, "text": mask[row]}[part] for part in whole)]) for row in (asking, asked))
    return asks[:, None] * exists if mask.is_floating_point() else exists


def written_out(query, key, exists=None):
    """The map itself, [H, queries, keys], over the keys that exist, or with these numbers added to its scores."""
    scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
    if exists is not None and exists.is_floating_point():
        scores = scores + exists
    elif exists is not None:
        scores = scores.masked_fill(~exists, float("-inf"))
    exponentials = torch.exp(scores - scores.max(dim=2, keepdim=True).values)
    return exponentials / exponentials.sum(dim=2, keepdim=True)


@dataclass(frozen=True)
class Blocks:
    """A row whose map is changed after the softmax: blocks of image queries, over image keys and over text keys.

    Args:
        source: the row whose map they are taken from.
        image: whether the first is the source's.
        text: gives the second, from the source's and the row's own [H, image queries, text keys].
    """

    source: int
    image: bool = False
    text: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    def row(self, row, parts, order, keep=None, mask=None, fault=None):
        order = [part for part in order if f"q_{part}" in parts]
        value = torch.cat([parts[f"v_{part}"][row] for part in order], dim=1)
        own, source = (self.map(which, parts, order, mask) for which in (row, self.source))
        if fault == "before places":
            source = self.map(self.source, {**parts, "q_image": parts["raw"]}, order, mask)
        named = other_order(order) if fault == "swapped" else order
        image, text = ranges(parts, named, row)
        from_image, from_text = ranges(parts, named, self.source)
        changed = own.clone()
        if self.image:
            changed[:, image, image] = source[:, from_image, from_image]
        if self.text is not None and text is not None:
            changed[:, image, text] = self.text(source[:, from_image, from_text], own[:, image, text])
        if keep is not None:
            keep(changed[:, image, text])
        return (changed @ value).transpose(0, 1).flatten(1)

    def map(self, row, parts, order, mask):
        query, key = (torch.cat([parts[f"{letter}_{part}"][row] for part in order], dim=1) for letter in "qk")
        return written_out(query, key, existing(parts, order, mask, row, row))


def ranges(parts, order, row):
    """Where a row's image tokens stand, and where its text's do; None for a layer without."""
    places, start = {}, 0
    for part in [one for one in order if f"q_{one}" in parts]:
        places[part] = slice(start, start + parts[f"q_{part}"][row].shape[1])
        start = places[part].stop
    return places["image"], places.get("text")


def stood_there(part, source):
    if not isinstance(source, tuple):
        return part[source]
    first, second, share = source
    return share[:, None] * part[first] + (1 - share[:, None]) * part[second]


def linear(projection, tokens):
    return F.linear(tokens, projection.weight, projection.bias)


def heads(attn, projection, tokens, norm=None):
    split = linear(projection, tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    return split if norm is None else norm(split)


@contextmanager
def dense(pipe, rule, *, steps, kinds=("attn",), layers="", keep=None, images=None, fault=None):
    """A pipeline whose layers of these names follow ``rule(row, rows)`` at some steps, and are dense at all.

    Args:
        rule: may look at the number of calls, which the block receives.
        layers: the beginning of the paths of those that follow the rule.
        images: tokens of the image, where those of a reference picture follow them.
        keep: is shown, of every layer, the row, the number of rows and the block of its map of image queries over text
            keys.
        fault: as of `DenseJoint`, in the layers that follow the rule.
    """
    transformer = pipe.transformer
    state = {"step": 0, "texts": 0, "calls": 0}

    def at_step(row, rows):
        return rule(row, rows) if state["step"] in steps else None

    def read(module, args, kwargs):
        index = pipe.scheduler.step_index
        state["step"] = (pipe.scheduler.begin_index or 0) if index is None else index
        state["texts"] = kwargs["encoder_hidden_states"].shape[1]
        state["calls"] += 1

    def processor(name):
        follows = name.split(".")[-2] in kinds and name.startswith(layers)
        made = of_family(at_step if follows else own, name)
        made.fault = fault if follows else None
        return made

    def of_family(chosen, name):
        if type(transformer).__name__.startswith("Qwen"):
            return DenseQwen(chosen, keep, images)
        if type(transformer).__name__.startswith("Flux2") and name.startswith("single"):
            return DenseFlux2Single(chosen, lambda: state["texts"], keep)
        if images is not None:
            return DenseKontext(chosen, lambda: state["texts"], images, keep)
        name = type(transformer).__name__
        like_flux = name.startswith(("Flux", "Bria", "LongCat", "Ovis"))
        in_blocks = DenseChroma if name.startswith("Chroma") else DenseFlux if like_flux else None
        return DenseJoint(chosen, keep) if in_blocks is None else in_blocks(chosen, lambda: state["texts"], keep)

    handle = transformer.register_forward_pre_hook(read, with_kwargs=True)
    try:
        with replaced_processors(transformer, processor):
            yield state
    finally:
        handle.remove()


@contextmanager
def replaced_processors(transformer, make):
    """Every layer has the processor that is made for its path; not all models of diffusers can be told so."""
    layers = {
        f"{name}.processor": module for name, module in transformer.named_modules() if hasattr(module, "set_processor")
    }
    before = {name: layer.processor for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.set_processor(make(name))
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.set_processor(before[name])


def own(row, rows):
    return None
