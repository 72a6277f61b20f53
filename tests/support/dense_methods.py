"""Methods of the literature as their papers write them: maps are matrices, stored, edited and multiplied.

Nothing here is the package's: words are placed by counting their tokens, maps are softmaxes that are written out, and a
run is a loop of its own over a tiny UNet in float64.
"""

from collections import defaultdict

import torch
from torch.nn import functional as F

from tests.support.tiny_unets import tiny_unet

STEPS = 5
TOKENS = 77


class Words:
    """Places of a prompt's words, which blanks separate, among its tokens."""

    def __init__(self, prompt, tokenizer):
        self.words, self.places, count = prompt.split(), [], 1  # after the start token
        for word in self.words:
            length = len(tokenizer(word, add_special_tokens=False)["input_ids"])
            self.places.append(list(range(count, count + length)))
            count += length
        self.end = count
        self.used = count + 1

    def of(self, word):
        return [
            place for known, places in zip(self.words, self.places, strict=True) if known == word for place in places
        ]


def replace_mapper(source, target):
    """M [77, 77] and which columns are taken: word i is taken for word i, its share spread over the other's tokens."""
    mapper = torch.zeros(TOKENS, TOKENS, dtype=torch.float64)
    for before, after in zip(source.places, target.places, strict=True):
        for index, token in enumerate(before):
            if len(before) == len(after):
                mapper[token, after[index]] = 1
            else:
                mapper[token, after] = 1 / len(after)
    _map_the_rest(mapper, source, target, keep=True)
    return mapper, torch.ones(TOKENS, dtype=torch.float64)


def refine_mapper(source, target):
    """The same for words that both prompts have, each once; the target's other words keep their own columns."""
    mapper = torch.zeros(TOKENS, TOKENS, dtype=torch.float64)
    for word in set(source.words) & set(target.words):
        mapper[source.of(word), target.of(word)] = 1
    _map_the_rest(mapper, source, target, keep=False)
    return mapper, (mapper.sum(0) > 0).double()


def _map_the_rest(mapper, source, target, keep):
    """Start to start, end to end, padding to padding; what is too much of it goes to the last token, or nowhere."""
    mapper[0, 0] = mapper[source.end, target.end] = 1
    for index in range(TOKENS - source.used):
        if target.used + index < TOKENS:
            mapper[source.used + index, target.used + index] = 1
        elif keep:
            mapper[source.used + index, -1] = 1


def prompt_to_prompt(source_map, target_map, mapper, kept, weights, alpha):
    """Edit(M, M*, t) of the paper, columns weighted by its re-weighting and each replaced in its own window."""
    edited = (source_map @ mapper) * kept + target_map * (1 - kept)
    return edited * weights * alpha + target_map * (1 - alpha)


def in_window(step, start, stop, total=STEPS):
    return int(total * start) <= step < int(total * stop)


class DenseRun:
    """A run of [source, targets …] in which ``change(site, step, maps)`` gives each layer's maps [rows, H, N, M].

    Attributes:
        maps: by layer path, the edited maps of every step.
    """

    def __init__(self, prompts, size):
        self.prompts, self.size = prompts, size
        noise = torch.Generator().manual_seed(3)

        def random(*shape):
            return torch.randn(*shape, generator=noise, dtype=torch.float64)

        self.unet = tiny_unet("sd1")
        for (
            name,
            parameter,
        ) in self.unet.named_parameters():  # enough for prompts to matter; at 3, rounding grows from step to step
            if "attn" in name and name.endswith("weight") and parameter.ndim == 2:
                parameter.requires_grad_(False).mul_(2.0)
        self.text = random(2 * prompts, TOKENS, 16)
        self.start = random(1, 4, *size).expand(prompts, -1, -1, -1)
        self.maps = defaultdict(list)

    @torch.no_grad()
    def sample(self, before=lambda step: None, after=lambda latents, step: latents):
        """Latents [prompts, 4, h, w] after all steps of a sampler that takes a share of the guided prediction off."""
        latents = self.start
        for step in range(STEPS):
            before(step)
            prediction = self.unet(torch.cat([latents, latents]), 900 - 180 * step, self.text).sample
            unconditional, conditional = prediction.chunk(2)
            latents = after(latents - 0.3 * (unconditional + 3 * (conditional - unconditional)), step)
        return latents

    def edited(self, session):
        """What the package gives in a session."""
        with session:
            return self.sample(
                lambda step: session.step(step, STEPS), lambda latents, step: session.after_step(latents)
            )

    def dense(self, sites, change, **hooks):
        """What maps that are changed give; every layer is computed so."""
        own = dict(self.unet.attn_processors)
        self.maps.clear()
        for site in sites:
            self.unet.get_submodule(site.path).set_processor(_DenseProcessor(self, site.at(*self.size), change))
        try:
            return self.sample(**hooks)
        finally:
            self.unet.set_attn_processor(own)

    def heat(self, sites, row, tokens):
        """Columns of some tokens, summed, averaged over heads, layers and steps so far, on the finest grid [h, w]."""
        grids = {site.path: site.at(*self.size).grid for site in sites}
        finest = max(grids.values())
        seen = [
            F.interpolate(
                maps[row][:, :, tokens].sum(-1).mean(0).reshape(1, 1, *grids[path]),
                finest,
                mode="bilinear",
                align_corners=False,
            )[0, 0]
            for path in grids
            for maps in self.maps[path]
        ]
        return torch.stack(seen).mean(0)


class _DenseProcessor:
    def __init__(self, run, site, change):
        self.run, self.site, self.change = run, site, change

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states

        def heads(tokens, projection):
            return F.linear(tokens, projection.weight).unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query, key, value = (
            heads(hidden_states, attn.to_q),
            heads(context, attn.to_k),
            heads(context, attn.to_v),
        )
        scores = (query @ key.transpose(-1, -2)) / query.shape[-1] ** 0.5
        maps = torch.exp(scores - scores.amax(-1, keepdim=True))
        maps = maps / maps.sum(-1, keepdim=True)
        step = len(self.run.maps[self.site.path])
        maps = self.change(self.site, step, maps.clone())
        self.run.maps[self.site.path].append(maps)
        return attn.to_out[0]((maps @ value).transpose(1, 2).flatten(2))
