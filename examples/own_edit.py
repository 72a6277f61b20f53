"""An edit of one's own: in the decoder, targets look up the source's tokens beside their own from a step on."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fpe_pipeline import BatchRoles, FreePromptPipeline, Product, SelfAttentionEdit, Site, Step

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", type=Path, default=Path("out/examples"), help="where pictures are written")
parser.add_argument("steps", nargs="?", type=int, default=10, help="denoising steps (default 10)")
given = parser.parse_args()
folder, steps = given.folder, given.steps


@dataclass(frozen=True)
class SourceMemoryEdit(SelfAttentionEdit):
    """``softmax(q_target [k_target ‖ k_source]ᵀ) @ [v_target ‖ v_source]`` in both halves of the batch.

    Args:
        start_step: the first step that is edited.
    """

    start_step: int = 2

    def active(self, step: Step) -> bool:
        return step.index >= self.start_step

    def default_sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return tuple(site for site in super().default_sites(sites) if site.place == "up")

    def products(self, site: Site, step: Step, roles: BatchRoles) -> Mapping[int, Product]:
        pairs = roles.pairs(conditional=None)
        return {target: Product(target, (target, source), (target, source)) for source, target in pairs}


pipe = FreePromptPipeline.from_pretrained("embedded")
result = pipe(
    "a photo of a red car on the beach",
    "a photo of a red house on the beach",
    edit=SourceMemoryEdit(),
    num_inference_steps=steps,
    generator=torch.Generator().manual_seed(0),
)
result.save(folder / "own_edit")
print(result.report.explain())
