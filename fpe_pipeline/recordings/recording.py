"""Recordings: the source pass of an edit, kept, so that later edits never run the source again.

What an edit takes from its source is attention maps, which are query, key and log-sum-exp; in some methods keys and
values, or features of a residual block. `pipe.record` generates the source once and keeps what the edits it is given
would take, layer by layer and step by step, with the latents of every step. `pipe.edit` denoises the targets alone.

=======================================================  ==========================================================
edit                                                     kept of the source
=======================================================  ==========================================================
Free-Prompt-Editing, also soft, in a region or by word   self-attention maps; by word, cross-attention maps too
Prompt-to-Prompt replace, refine, re-weight              cross- and self-attention maps
local blend, beside any of them                          cross-attention maps of the layers whose heat is read
MasaCtrl                                                 keys and values, of the unconditional row too
Plug-and-Play                                            self-attention maps and features, of the unconditional row too
StyleAligned                                             queries, keys and values, of the unconditional row too
Free-Prompt-Editing on a transformer                     image queries and keys; with ``scope="joint"`` text's too
Prompt-to-Prompt and ReFlex on a transformer             image queries and keys, text keys, the source's tokens
local blend and masks of a word on a transformer         the same, of all layers of joint attention
MasaCtrl, as Stable Flow, on a transformer               image keys and values, of the unconditional row too
value injection                                          values of image and text, of the unconditional row too
sums of these, edits of your own                         what they name of the source's rows
=======================================================  ==========================================================
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import InputError
from ..models.flow_solvers import FireFlowScheduler
from ..sampling.noise_schedule import NoiseSchedule
from .contents import recorded_steps
from .folder_store import FileStore
from .keys import HALVES, Contents
from .precision import Precision
from .source_text import SourceText, is_source_text
from .store import MapStore

__all__ = ["Recording"]

#: The first format whose latents are those at the ends of steps, whatever a solver's loop holds.
_AT_NODES = 5
#: What the names of origins begin with in a folder.
_ORIGIN = "origin-"


@dataclass(frozen=True, eq=False)
class Recording:
    """The source pass of an edit; `FreePromptPipeline.record` makes it, `load` reads one from a folder.

    Args:
        prompt: the source's.
        negative_prompt: of the source, and of the edits.
        guidance_scale: of the run.
        steps: what `num_inference_steps` was; some schedulers call the UNet more often.
        schedule: timesteps and noise levels of the run.
        contents: for each layer or module, what is kept of it and at which steps.
        window: (first, last) step, as fractions of the run, of the plain `FreePromptEdit` that it was made for; None
            where it was made for others alone.
        paths: the layers of that edit.
        latents: [steps + 1, 1, C, h, w], from the noise that all start from to the source's last latent; of FLUX.1, its
            kin, Qwen-Image and Chroma packed, as [steps + 1, 1, tokens, 4 · C], and with solvers that call the model
            between steps one a call: those at the end of a step where the call ends one.
        model: fingerprint of the weights and configurations that made it.
        precision: "exact", "half" or "int8-keys".
        error: largest relative error, over all recorded layers and steps, that the precision makes in the source's own
            attention output, or in a feature (2-norm); 0 where exact.
        store: where the tensors are.
        unconditional: [steps, 1, tokens, channels], the embeddings of a null-text inversion, or None.
        size: (height, width) in pixels, on a transformer; None on a UNet, whose latents say it.
        text_length: tokens of T5, on a transformer.
        true_cfg_scale: of FLUX.1 and Qwen-Image, beside a negative prompt.
        source_text: what the text encoders received, on a transformer by part of the text; empty in recordings of an
            earlier version, which on a transformer serve no edit that places words.
        text_lengths: on a transformer, tokens of the source's text that are no padding, of its "conditional" and
            "unconditional" row; empty in recordings of an earlier version.
        origins: where an image's place follows the length of its text (Lumina 2, Z-Image), what the image tokens of
            these rows were turned by in common, of which they are kept without: cosines and sines [D / 2, 2].
    """

    prompt: str
    negative_prompt: str | None
    guidance_scale: float
    steps: int
    schedule: NoiseSchedule
    contents: Contents = field(repr=False)
    window: tuple[float, float] | None
    paths: tuple[str, ...]
    latents: torch.Tensor
    model: str
    precision: Precision
    error: float
    store: MapStore = field(repr=False)
    unconditional: torch.Tensor | None = None
    size: tuple[int, int] | None = None
    text_length: int | None = None
    true_cfg_scale: float | None = None
    source_text: SourceText = field(default_factory=dict, repr=False)
    text_lengths: Mapping[str, int] = field(default_factory=dict)
    origins: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.prompt[:40]!r}, {self.steps} steps, guidance {self.guidance_scale:g}, "
            f"{len(self.contents)} layers and modules, {self.precision}, {self.nbytes / 2**20:.1f} MiB)"
        )

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept: parts of layers, latents and embeddings; the numbers of tokens, some kB, left out."""
        rest = 0 if self.unconditional is None else self.unconditional.nbytes
        return self.store.nbytes + self.latents.nbytes + rest

    @classmethod
    def load(cls, folder: str | Path) -> Recording:
        """A recording from the folder that it was placed in.

        Raises:
            InputError: no recording, one that was killed before its end, another version's, damaged files.
        """
        store, values = FileStore.open(Path(folder))
        store.check_steps(recorded_steps(values["contents"]))
        tensors = store.read_latents()
        schedule = dict(values.pop("schedule"))
        schedule.pop("levels_sha256", None)
        schedule |= {name: tuple(schedule.get(name, ())) for name in ("timesteps", "levels")}
        if values.pop("format") < _AT_NODES and schedule["scheduler"] == FireFlowScheduler.__name__:
            raise InputError(
                f"the recording '{folder}' is of an earlier version, which kept what FireFlow has inside of steps and "
                "took it for their ends: record it again"
            )
        values["window"] = None if values["window"] is None else tuple(values["window"])
        values["paths"] = tuple(values["paths"])
        values["size"] = None if values.get("size") is None else tuple(values["size"])
        return cls(
            schedule=NoiseSchedule(**schedule),
            store=store,
            latents=tensors["latents"],
            unconditional=tensors.get("unconditional"),
            source_text={name: tokens for name, tokens in tensors.items() if is_source_text(name)},
            origins={half: tensors[f"{_ORIGIN}{half}"] for half in HALVES.values() if f"{_ORIGIN}{half}" in tensors},
            **values,
        )

    def save(self, store: FileStore) -> None:
        """Finish the folder that `load` reads: what belongs to no step, and the index."""
        names = ("latents",) if self.unconditional is None else ("latents", "unconditional")
        origins = {f"{_ORIGIN}{half}": origin for half, origin in self.origins.items()}
        store.write_latents({name: getattr(self, name) for name in names} | dict(self.source_text) | origins)
        apart = ("store", "latents", "unconditional", "contents", "source_text", "origins")
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in apart}
        store.finish(self.contents, values | {"schedule": dataclasses.asdict(self.schedule)})
