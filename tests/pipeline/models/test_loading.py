"""What people have on their disks for a model: variants of weights, folders that lack files, LoRAs."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fpe_pipeline.errors import InputError
from fpe_pipeline.models.loading import find_model
from fpe_pipeline.runs.loading import load_pipeline
from tests.support.tiny_cli import tiny_model_folder


def _load(folder):
    return load_pipeline(find_model(str(folder)), dtype=torch.float32, device="cpu")


@pytest.fixture
def model(tmp_path):
    """The tiny model in a folder whose files are links, to be moved and deleted."""
    made = tiny_model_folder(tmp_path / "tiny")
    for part in made.iterdir():
        if part.is_symlink() and part.is_dir():
            target = part.resolve()
            part.unlink()
            part.mkdir()
            for file in target.iterdir():
                (part / file.name).symlink_to(file)
    return made


def test_a_variant_is_loaded_where_there_are_no_ordinary_weights(model):
    """Folders hold weights by names such as model.fp16.safetensors, as half of the hub's do, beside others or alone."""
    ordinary = sorted(model.glob("*/*.safetensors"))
    for path in ordinary:
        doubled = {name: 2 * part.half() for name, part in load_file(path).items()}
        save_file(doubled, path.with_suffix(".fp16.safetensors"))
    weight = _load(model).unet.conv_in.weight
    for path in ordinary:
        path.unlink()
    variant = _load(model).unet.conv_in.weight
    assert variant.dtype == torch.float32 and torch.equal(variant, 2 * weight.half().float())


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("*", "its tokenizer has no words: expected tokenizer.json"),
        ("tokenizer_config.json", "its tokenizer has no length: expected tokenizer_config.json"),
    ],
)
def test_a_tokenizer_that_lacks_files_is_named(model, lost, said):
    """Of nothing, transformers makes a tokenizer to which every word is unknown."""
    for path in (model / "tokenizer").glob(lost):
        path.unlink()
    with pytest.raises(InputError, match=f"could not be loaded: {said}"):
        _load(model)


@pytest.mark.parametrize(
    "names",
    [
        ["unet.mid_block.to_q.lora_A.weight", "unet.mid_block.to_q.lora_B.weight"],
        ["lora_unet_mid_block_to_q.lora_down.weight", "lora_unet_mid_block_to_q.alpha"],
    ],
)
def test_a_lora_is_no_model(tmp_path, names):
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "style.safetensors")
    with pytest.raises(InputError, match="is a LoRA, which is added to a model"):
        find_model(str(tmp_path / "style.safetensors"))
