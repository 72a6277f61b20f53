"""Measures that ask a pretrained encoder: only where somebody says where its weights lie, and never from a hub.

- CLIP score: 100 · max(cos(image, prompt), 0) of the target's image and prompt (Hessel et al., 2021).
- Directional similarity, the CDS of Free-Prompt-Editing's paper: the cosine of the ways from source to target that CLIP
  sees in the images and in the prompts (Gal et al., 2021).
- Structure distance: mean squared difference of the self-similarities of the last layer's keys of a DINO-trained vision
  transformer (Tumanyan et al., 2022), as in PIE-Bench.
- LPIPS by torchmetrics, on a backbone of torchvision's whose weights are given as a file (Zhang et al., 2018).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import InputError
from .request import Weights

__all__ = ["Encoders", "check_weights"]

#: Of a state dictionary of torchvision's, an entry and its shape, by the name that torchmetrics has for the network.
_BACKBONES = {
    "alex": ("features.0.weight", (64, 3, 11, 11)),
    "vgg": ("features.0.weight", (64, 3, 3, 3)),
    "squeeze": ("features.3.squeeze.weight", (16, 64, 1, 1)),
}


def check_weights(weights: Weights) -> None:
    """Raise InputError for weights that are not there, or for packages that they need and that are not installed."""
    for name, path in weights:
        if path is None:
            continue
        kind, there = ("file", Path(path).is_file()) if name == "lpips" else ("folder", Path(path).is_dir())
        if not there:
            raise InputError(f"expected a {kind} of weights for --{name}, got '{path}'; nothing is fetched from a hub")
    needed = ("torchmetrics", "torchvision") if weights.lpips is not None else ()
    if absent := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise InputError(f"--lpips needs {' and '.join(absent)}: pip install 'fpe-kernels[metrics]', or leave it out")


class Encoders:
    """The encoders that somebody has weights for, loaded.

    Args:
        weights: where they lie.
        device: to compute on.

    Raises:
        InputError: weights of something else.
    """

    def __init__(self, weights: Weights, device: str) -> None:
        self.device = device
        self._measures: list[Callable[[Image.Image, Image.Image, str, str], dict[str, float]]] = []
        for name, path, load in (
            ("clip", weights.clip, self._load_clip),
            ("dino", weights.dino, self._load_dino),
            ("lpips", weights.lpips, self._load_lpips),
        ):
            if path is None:
                continue
            try:
                self._measures.append(load(path))
            except InputError:
                raise
            except Exception as error:  # of whatever reads the weights
                raise InputError(f"'{path}' cannot be loaded for --{name}: {' '.join(str(error).split())}") from error

    @torch.no_grad()
    def measures(self, source: Image.Image, edited: Image.Image, prompt: str, target: str) -> dict[str, float]:
        """Of one edit, by name.

        Args:
            source, edited: RGB images of one size.
            prompt, target: what they show.
        """
        return {name: value for one in self._measures for name, value in one(source, edited, prompt, target).items()}

    def _load_clip(self, path: str) -> Callable[..., dict[str, float]]:
        from transformers import AutoTokenizer, CLIPModel

        model = CLIPModel.from_pretrained(path, local_files_only=True).to(self.device).eval()
        processor = _image_processor(path)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)

        def measured(source: Image.Image, edited: Image.Image, prompt: str, target: str) -> dict[str, float]:
            pixels = processor(images=[source.convert("RGB"), edited.convert("RGB")], return_tensors="pt")
            words = tokenizer([prompt, target], return_tensors="pt", padding=True, truncation=True)
            seen = _unit(_embedding(model.get_image_features(**pixels.to(self.device))))  # [2, D]
            meant = _unit(_embedding(model.get_text_features(**words.to(self.device))))
            score = 100 * torch.relu(seen[1] @ meant[1])
            found = {"clip score": float(score)}
            if prompt and prompt != target:  # a prompt that is the other one, or none, is no direction
                found["directional similarity"] = float(_unit(seen[1] - seen[0]) @ _unit(meant[1] - meant[0]))
            return found

        return measured

    def _load_dino(self, path: str) -> Callable[..., dict[str, float]]:
        from transformers import ViTModel

        model = ViTModel.from_pretrained(path, local_files_only=True, add_pooling_layer=False).to(self.device).eval()
        processor = _image_processor(path)
        keys: list[torch.Tensor] = []
        _last_key_layer(model).register_forward_hook(lambda layer, given, key: keys.append(key))

        def measured(source: Image.Image, edited: Image.Image, prompt: str, target: str) -> dict[str, float]:
            pixels = processor(images=[source.convert("RGB"), edited.convert("RGB")], return_tensors="pt")
            keys.clear()
            model(**pixels.to(self.device))
            unit = _unit(keys[0].float())  # [2, tokens, D]
            before, after = unit @ unit.transpose(1, 2)
            return {"structure distance": float(((before - after) ** 2).mean())}

        return measured

    def _load_lpips(self, path: str) -> Callable[..., dict[str, float]]:
        from torchmetrics.functional.image import lpips

        make: Any = lpips._LPIPS  # what torchmetrics' metric is made of, which fetches its backbone
        state = torch.load(path, map_location="cpu", weights_only=True)
        names = [
            net for net, (entry, shape) in _BACKBONES.items() if entry in state and tuple(state[entry].shape) == shape
        ]
        if not names:
            raise InputError(f"expected weights of torchvision's alexnet, vgg16 or squeezenet1_1 in '{path}'")
        # The layers on top come with torchmetrics.
        network = make(net=names[0], pnet_rand=True)
        features = {name: value for name, value in state.items() if name.startswith("features.")}
        slices = {name.rpartition(".slice")[2].partition(".")[2]: name for name in network.net.state_dict()}
        network.net.load_state_dict({slices[name.removeprefix("features.")]: value for name, value in features.items()})
        network.eval().to(self.device)

        def measured(source: Image.Image, edited: Image.Image, prompt: str, target: str) -> dict[str, float]:
            images = [_tensor(image).to(self.device) for image in (source, edited)]
            return {"lpips": float(network(*images, normalize=True))}

        return measured


def _embedding(features: Any) -> torch.Tensor:
    """[B, D] of what transformers returns for an encoder: a tensor, or since its fifth version a record with one."""
    embedding: torch.Tensor = features if isinstance(features, torch.Tensor) else features.pooler_output
    return embedding.float()


def _last_key_layer(model: Any) -> Any:
    """The projection to keys in a ViT's last layer, by either of the names that transformers has had for it."""
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] in ("key", "k_proj")]
    if not found:
        raise InputError("expected a vision transformer whose layers have keys")
    return found[-1]


def _image_processor(path: str) -> Any:
    # By its own module: some versions of transformers offer it at the top where torchvision is installed alone.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(path, local_files_only=True, use_fast=False)


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)


def _tensor(image: Image.Image) -> torch.Tensor:
    """[1, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"), np.float32) / 255).permute(2, 0, 1)[None]
