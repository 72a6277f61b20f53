"""What of a model decides the images that it makes, as one number: by it a recording knows the model that made it.

What only changes how a model is computed is left out: wrappers of ``torch.compile``, fused copies of projections, and
where weights wait while they are offloaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import torch

from ..models.adapters.adapter import identity
from ..models.guiders import guider_settings

__all__ = ["fingerprint"]

# Of `fuse_qkv_projections`: copies of projections that stay where they are.
_FUSED = ("to_qkv", "to_kv", "to_added_qkv", "to_added_kv")
_FREEU = ("s1", "s2", "b1", "b2")


def fingerprint(pipe: Any) -> str:
    """SHA-256 (hex) of the text encoders' and the model's configuration, switches, samples of every weight, guiders.

    64 numbers a weight, and the tokens that textual inversion has added: another checkpoint, an adapter and another
    dtype are told apart in a fraction of the time that it takes to read everything.

    Raises:
        ValueError: a weight that is nowhere.
    """
    digest = hashlib.sha256()
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3", "unet", "transformer"):
        if getattr(pipe, name, None) is None:
            continue
        module = identity(getattr(pipe, name))
        config: Any = module.config
        config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        settings = {key: value for key, value in config.items() if not key.startswith("_")}
        digest.update(json.dumps([settings, _switches(module)], sort_keys=True, default=str).encode())
        samples, learnt = [], _learnt_tokens(pipe, name, module)
        for key, tensor in sorted(_weights(module)):
            flat = tensor.detach().flatten()
            samples.append(flat[:: max(1, flat.numel() // 64)][:64].double())
            samples += [tensor.detach()[number].double() for number in learnt.get(key, ())]
            digest.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        device = samples[0].device  # one copy from the device for all
        digest.update(torch.cat([sample.to(device) for sample in samples]).cpu().numpy().tobytes())
    guiders = guider_settings(pipe)
    if guiders:
        digest.update(json.dumps(guiders, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _learnt_tokens(pipe: Any, name: str, module: Any) -> dict[str, list[int]]:
    """By weight, the rows that textual inversion has added to a text encoder's: few among many, all of which count."""
    tokenizer = getattr(pipe, name.replace("text_encoder", "tokenizer"), None)
    if not name.startswith("text_encoder") or not hasattr(pipe, "load_textual_inversion") or tokenizer is None:
        return {}
    known, embedding = tokenizer.vocab_size, module.get_input_embeddings()
    paths = [path for path, part in module.named_modules() if part is embedding]
    added = sorted(number for number in tokenizer.get_added_vocab().values() if number >= known)
    return {
        _unwrapped(f"{path}.weight"): [number for number in added if number < len(embedding.weight)] for path in paths
    }


def _switches(module: torch.nn.Module) -> dict[str, Any]:
    """By submodule, what acts on its output and is no weight: adapters' strengths and FreeU's factors."""
    found: dict[str, Any] = {}
    for path, part in module.named_modules():
        if hasattr(part, "merged_adapters"):  # a layer of peft
            active = () if part.disable_adapters else part.active_adapters
            scaling = getattr(part, "scaling", {})
            strengths = [[adapter, scaling.get(adapter)] for adapter in active]
            found[_unwrapped(path)] = {"adapters": strengths, "merged": part.merged_adapters}
        factors = [getattr(part, name, None) for name in _FREEU]
        if None not in factors:
            found[_unwrapped(path)] = {"FreeU": factors}
    return found


def _weights(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for key, tensor in module.state_dict().items():
        path, _, name = key.rpartition(".")
        if path.rpartition(".")[2] not in _FUSED:
            yield _unwrapped(key), _offloaded(module.get_submodule(path), path, name) if tensor.is_meta else tensor


def _unwrapped(path: str) -> str:
    return ".".join(name for name in path.split(".") if name != "_orig_mod")


def _offloaded(module: torch.nn.Module, path: str, name: str) -> torch.Tensor:
    """A weight that accelerate holds while its module does not run."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        weights = getattr(one, "weights_map", None)
        if weights is not None:
            return weights[name]
    raise ValueError(
        f"{path}.{name} is on the meta device and no hook of accelerate holds it: load the weights before recording"
    )
