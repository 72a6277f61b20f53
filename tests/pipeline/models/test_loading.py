"""What people have on their disks for a model, and on the hub: variants of weights, folders that lack files, LoRAs."""

import errno
import functools
import json
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file

from fpe_pipeline.errors import InputError
from fpe_pipeline.models import sources
from fpe_pipeline.models.sources import find_model
from fpe_pipeline.runs.loading import load_pipeline
from fpe_pipeline.runs.settings import Settings
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


def test_a_folder_that_this_user_may_not_read_is_refused_by_name(model, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(sources.Path, "is_file", refuse)  # whoever runs the tests may read everything
    with pytest.raises(InputError, match=r"may read it, got '.*model_index\.json': Permission denied; change its"):
        find_model(str(model))


class TestOnTheHub:
    @pytest.fixture
    def hub(self, tmp_path, monkeypatch):
        """A hub that gives what pipelines say of themselves, and counts how often it is asked."""
        asked = []

        def snapshot_download(name, allow_patterns):
            asked.append(name)
            folder = tmp_path / name
            if not folder.is_dir():
                raise LocalEntryNotFoundError(f"no {name} here")
            told = ["model_index.json", "modular_model_index.json", "*/config.json"]
            assert allow_patterns == told, "weights would be fetched"
            return str(folder)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        monkeypatch.setattr(sources, "_without_weights", functools.cache(sources._without_weights.__wrapped__))
        return tmp_path, asked

    @staticmethod
    def put(hub, name, kind, **parts):
        for part, said in {"model_index.json": {"_class_name": kind}, **parts}.items():
            path = hub[0] / name / part
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(said))

    def test_its_defaults_and_sizes_are_known_before_weights_are_fetched(self, hub):
        self.put(hub, "owner/picture", "QwenImagePipeline", **{"vae/config.json": {"temperal_downsample": [0, 1, 1]}})
        settings = Settings.of_model(source="a car", targets=("a bus",), model="owner/picture")
        assert (settings.steps, settings.guidance, settings.self_replace) == (50, 4.0, (0.0, 0.2))
        source = find_model("owner/picture")
        assert (source.kind, source.location, source.family) == ("hub", "owner/picture", "qwen")
        with pytest.raises(InputError, match="positive multiples of 16 px"):
            source.check_size((40, 64))
        assert hub[1] == ["owner/picture"]

    def test_what_is_not_served_is_refused_before_weights_are_fetched(self, hub):
        self.put(hub, "owner/video", "WanPipeline")
        with pytest.raises(InputError, match="'owner/video' holds a WanPipeline"):
            find_model("owner/video")

    def test_modular_pipelines_are_refused_with_what_edits_them(self, hub):
        self.put(hub, "owner/blocks", "")
        (hub[0] / "owner/blocks/model_index.json").rename(hub[0] / "owner/blocks/modular_model_index.json")
        with pytest.raises(InputError, match=r"holds a modular pipeline .*with fpe_pipeline\.editing\(pipe"):
            find_model("owner/blocks")

    def test_what_is_no_pipeline_is_refused(self, hub):
        self.put(hub, "owner/lora", "", **{"adapter_config.json": {}})
        (hub[0] / "owner/lora/model_index.json").unlink()
        with pytest.raises(InputError, match="'owner/lora' is not a diffusers pipeline folder"):
            find_model("owner/lora")

    @pytest.mark.parametrize(
        ("kind", "said"),
        [
            (RepositoryNotFoundError, "the hub has none of that name, or a private one: look for .*/owner/nothing"),
            (GatedRepoError, "who have accepted its terms: do so at .*/owner/nothing, then `hf auth login`"),
            (LocalEntryNotFoundError, "was not fetched from the hub before, .* does not answer; pass --model with"),
            (OSError, "the hub does not give it: it is lost; try again"),
        ],
    )
    def test_what_it_does_not_give_is_refused_with_what_to_do(self, hub, monkeypatch, kind, said):
        error = kind.__new__(kind, "it is lost")  # those of an answer of the hub's would be made of the answer
        monkeypatch.setattr("huggingface_hub.snapshot_download", mock.Mock(side_effect=error))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        with pytest.raises(InputError, match=f"model 'owner/nothing' is no folder here, and .*{said}"):
            find_model("owner/nothing")

    def test_without_the_network_is_said(self, hub, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(InputError, match="cannot be asked: HF_HUB_OFFLINE is set; pass --model with a folder"):
            find_model("owner/nothing")

    def test_one_that_was_fetched_in_part_says_how_it_becomes_whole(self, hub):
        self.put(hub, "owner/picture", "StableDiffusionPipeline")
        pipeline = SimpleNamespace(from_pretrained=mock.Mock(side_effect=OSError("no weights here")))
        with pytest.raises(InputError, match=r"no weights here; where it was not fetched .* run this again"):
            load_pipeline(find_model("owner/picture"), pipeline=pipeline, dtype=torch.float32, device="cpu")
