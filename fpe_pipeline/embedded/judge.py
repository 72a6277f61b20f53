"""The judge: a small network that says what a picture shows and where its object is.

It is trained on renders, whose attributes and silhouettes are known, blurred and noised so that it also reads pictures
that a diffusion model made. Its own error on held-out renders is measured beside every figure it helps to produce.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .scenes.scenes import BACKGROUNDS, COLOURS, OBJECTS

__all__ = ["Judge", "Verdict", "load_judge", "save_judge"]

_COLOURS = tuple(COLOURS)


@dataclass(frozen=True)
class Verdict:
    """What the judge sees in ``n`` pictures.

    Args:
        objects, colours, backgrounds: ``n`` names each.
        masks: bool ``[n, h, w]``, the pixels of the object.
    """

    objects: list[str]
    colours: list[str]
    backgrounds: list[str]
    masks: np.ndarray


class _Block(nn.Sequential):
    def __init__(self, enter: int, leave: int, stride: int = 1) -> None:
        super().__init__(nn.Conv2d(enter, leave, 3, stride, 1), nn.GroupNorm(8, leave), nn.SiLU())


class Judge(nn.Module):
    """Three classifiers and a segmenter over one convolutional trunk.

    Pictures of any size are looked at in ``size`` × ``size`` pixels.
    """

    def __init__(self, size: int = 96, widths: tuple[int, ...] = (16, 32, 48, 72)) -> None:
        super().__init__()
        self.size = size
        self.enter = _Block(3, widths[0], 2)
        self.down = nn.ModuleList(nn.Sequential(_Block(a, b, 2), _Block(b, b)) for a, b in pairwise(widths))
        self.up = nn.ModuleList(
            _Block(a + b, b) for a, b in zip(reversed(widths[1:]), reversed(widths[:-1]), strict=True)
        )
        self.mask = nn.Conv2d(widths[0], 1, 3, 1, 1)
        counts = (len(OBJECTS), len(_COLOURS), len(BACKGROUNDS))
        self.classes = nn.ModuleList(nn.Linear(2 * widths[-1], count) for count in counts)

    def forward(self, pixels: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Logits of pictures ``[n, 3, size, size]`` in [-1, 1]: three ``[n, classes]``, and ``[n, size, size]``."""
        level = self.enter(pixels)
        levels = [level]
        for down in self.down:
            level = down(level)
            levels.append(level)
        summary = torch.cat([level.mean(dim=(2, 3)), level.amax(dim=(2, 3))], dim=1)
        for up, skip in zip(self.up, reversed(levels[:-1]), strict=True):
            wide = F.interpolate(level, size=skip.shape[-2:], mode="nearest")
            level = up(torch.cat([wide, skip], dim=1))
        fine = F.interpolate(self.mask(level), size=pixels.shape[-2:], mode="bilinear", align_corners=False)
        return [head(summary) for head in self.classes], fine[:, 0]

    @torch.no_grad()
    def look(self, images: Sequence[Image.Image] | np.ndarray, batch: int = 64) -> Verdict:
        """Judge pictures: PIL images, or uint8 ``[n, h, w, 3]``; masks come back in the first picture's size."""
        arrays = [np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image) for image in images]
        pixels = np.stack(arrays)
        tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        shape = tensor.shape[-2:]
        device = next(self.parameters()).device
        found: list[list[int]] = [[], [], []]
        masks = []
        for block in tensor.split(batch):
            seen = F.interpolate(block.to(device), size=(self.size, self.size), mode="bilinear", antialias=True)
            logits, mask = self(seen)
            for store, logit in zip(found, logits, strict=True):
                store += logit.argmax(dim=1).tolist()
            masks.append((F.interpolate(mask[:, None], size=shape, mode="bilinear")[:, 0] > 0).cpu().numpy())
        names = (OBJECTS, _COLOURS, BACKGROUNDS)
        objects, colours, backgrounds = ([name[i] for i in store] for name, store in zip(names, found, strict=True))
        return Verdict(objects, colours, backgrounds, np.concatenate(masks))


def save_judge(judge: Judge, path: Path) -> None:
    """Write the judge as float16 safetensors, with the size that it looks at in the file's metadata."""
    state = {name: value.half().contiguous() for name, value in judge.state_dict().items()}
    save_file(state, path, metadata={"size": str(judge.size)})


def load_judge(path: Path) -> Judge:
    """Read a judge.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged, or holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no judge at {path}: train one with `python -m fpe_pipeline.embedded.training.train`")
    try:
        with safe_open(path, "pt") as file:
            judge = Judge(int((file.metadata() or {}).get("size", 96)))
            judge.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"'{path}' is damaged or no judge: {str(error).splitlines()[0]}; copy the model folder anew, or train one "
            "with `python -m fpe_pipeline.embedded.training.train`"
        ) from error
    return judge.eval()
