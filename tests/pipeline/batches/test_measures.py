"""What is measured of an edit: without weights, and by tiny random encoders in the place of trained ones."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

from fpe_pipeline.batches.encoders import Encoders, check_weights
from fpe_pipeline.batches.measures import measures, ssim
from fpe_pipeline.batches.request import Weights
from fpe_pipeline.errors import InputError
from tests.support.golden_cases import GOLDEN

SIDE = 32
PROMPTS = ("a red car", "a blue car")


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8))


@pytest.fixture
def pair():
    return picture(0), picture(1)


def values(image):
    return torch.from_numpy(np.array(image, np.float64) / 255).permute(2, 0, 1)


class TestWithoutWeights:
    def test_regions_add_up(self, pair):
        """Black elsewhere: the errors of both regions are parts of the whole's."""
        mask = np.zeros((SIDE, SIDE), bool)
        mask[4:20, 8:30] = True
        found = measures(*pair, mask)
        assert found["mse"] == pytest.approx(found["mse inside"] + found["mse outside"], rel=1e-12)
        assert found["psnr inside"] == pytest.approx(-10 * np.log10(found["mse inside"]))
        before, after = (values(image) for image in pair)
        assert found["mse inside"] == pytest.approx(float(((before - after)[:, mask] ** 2).sum() / before.numel()))

    def test_equal_pictures(self):
        found = measures(picture(0), picture(0), np.ones((SIDE, SIDE), bool))
        assert (found["mse"], found["psnr"]) == (0.0, None) and found["ssim"] == pytest.approx(1)
        assert "mse inside" in found and "mse outside" not in found  # there is no pixel outside

    def test_ssim_is_torchmetrics(self, pair):
        functional = pytest.importorskip("torchmetrics.functional.image")
        before, after = (values(image)[None] for image in pair)
        near = 0.9 * before + 0.1 * after
        for other in (after, near):
            expected = functional.structural_similarity_index_measure(other, before, data_range=1.0)
            assert ssim(before[0], other[0]) == pytest.approx(float(expected), abs=1e-6)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Folders as CLIP and DINO have them, of a few random numbers."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoders")
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = GOLDEN / "models" / "tiny-sd15" / "tokenizer"
    words = len(json.loads((tokenizer / "vocab.json").read_text()))
    seeing = {**layers, "image_size": SIDE, "patch_size": 8}
    reading = {**layers, "vocab_size": words, "max_position_embeddings": 77, "eos_token_id": words - 1}
    CLIPModel(CLIPConfig(vision_config=seeing, text_config=reading, projection_dim=8)).save_pretrained(folder / "clip")
    for path in tokenizer.iterdir():
        (folder / "clip" / path.name).write_bytes(path.read_bytes())
    ViTModel(ViTConfig(**seeing), add_pooling_layer=False).save_pretrained(folder / "dino")
    side = {"height": SIDE, "width": SIDE}
    cut = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIDE}, "crop_size": side}
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(cut))
    scaled = {"image_processor_type": "ViTImageProcessor", "size": side}
    (folder / "dino" / "preprocessor_config.json").write_text(json.dumps(scaled))
    return folder


class TestEncoders:
    def test_clip_and_direction(self, weights, pair):
        found = Encoders(Weights(clip=str(weights / "clip")), "cpu").measures(*pair, *PROMPTS)
        assert found.keys() == {"clip score", "directional similarity"}
        model = CLIPModel.from_pretrained(weights / "clip").eval()
        from transformers import AutoTokenizer, CLIPProcessor
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        processor = CLIPProcessor(
            CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
            AutoTokenizer.from_pretrained(weights / "clip"),
        )
        given = processor(images=list(pair), text=list(PROMPTS), return_tensors="pt", padding=True)
        with torch.no_grad():
            out = model(**given)
        image, text = (x.double() / x.double().norm(dim=-1, keepdim=True) for x in (out.image_embeds, out.text_embeds))
        assert found["clip score"] == pytest.approx(100 * max(float(image[1] @ text[1]), 0), abs=1e-3)
        ways = torch.stack((image[1] - image[0], text[1] - text[0]))
        expected = torch.nn.functional.cosine_similarity(*ways, dim=0)
        assert found["directional similarity"] == pytest.approx(float(expected), abs=1e-3)

    def test_a_prompt_that_stays_is_no_direction(self, weights, pair):
        found = Encoders(Weights(clip=str(weights / "clip")), "cpu").measures(*pair, PROMPTS[0], PROMPTS[0])
        assert found.keys() == {"clip score"}

    def test_structure(self, weights, pair):
        encoders = Encoders(Weights(dino=str(weights / "dino")), "cpu")
        assert encoders.measures(pair[0], pair[0], *PROMPTS) == {"structure distance": 0.0}
        (found,) = encoders.measures(*pair, *PROMPTS).values()
        model = ViTModel.from_pretrained(weights / "dino", add_pooling_layer=False).eval()
        kept = []
        keys = [module for name, module in model.named_modules() if name.endswith(("key", "k_proj"))]
        keys[-1].register_forward_hook(lambda layer, given, key: kept.append(key[0].double()))
        for image in pair:
            model(((values(image).float() - 0.5) / 0.5)[None])  # scaled as ViT's own preprocessing does
        maps = [((key @ key.T) / (key.norm(dim=1)[:, None] * key.norm(dim=1))).detach() for key in kept]
        assert found == pytest.approx(float(((maps[0] - maps[1]) ** 2).mean()), rel=1e-3) and found > 0

    def test_lpips_on_the_backbone_that_the_file_is_of(self, pair, tmp_path, monkeypatch):
        """torchvision need not be there: it would give the layers, which stand here."""
        pytest.importorskip("torchmetrics")
        from torchmetrics.functional.image import lpips

        def features():
            conv, act, pool = torch.nn.Conv2d, torch.nn.ReLU, lambda: torch.nn.MaxPool2d(3, 2)
            layers = [conv(3, 64, 11, 4, 2), act(), pool(), conv(64, 192, 5, padding=2), act(), pool()]
            layers += [conv(192, 384, 3, padding=1), act(), conv(384, 256, 3, padding=1), act()]
            return torch.nn.Sequential(*layers, conv(256, 256, 3, padding=1), act())

        models = types.SimpleNamespace(alexnet=lambda weights: types.SimpleNamespace(features=features()))
        monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(models=models))
        monkeypatch.setattr(lpips, "_TORCHVISION_AVAILABLE", True)
        trained = features()
        torch.save({f"features.{n}": v for n, v in trained.state_dict().items()}, tmp_path / "alexnet.pth")
        large = [image.resize((64, 64)) for image in pair]
        encoders = Encoders(Weights(lpips=str(tmp_path / "alexnet.pth")), "cpu")
        (found,) = encoders.measures(*large, *PROMPTS).values()
        assert encoders.measures(large[0], large[0], *PROMPTS)["lpips"] == pytest.approx(0, abs=1e-6)
        reference = lpips._LPIPS(net="alex", pnet_rand=True)
        slices = [getattr(reference.net, f"slice{n}") for n in range(1, 6)]
        for slice_ in slices:
            for number, layer in slice_.named_children():
                layer.load_state_dict(trained[int(number)].state_dict())
        with torch.no_grad():
            expected = reference.eval()(*(2 * values(image).float()[None] - 1 for image in large))
        assert found == pytest.approx(float(expected), rel=1e-4) and found > 0

    @pytest.mark.parametrize("name", ["clip", "dino", "lpips"])
    def test_weights_that_are_not_there(self, tmp_path, name):
        with pytest.raises(InputError, match=f"weights for --{name}, got .*nothing is fetched"):
            check_weights(Weights(**{name: str(tmp_path / "none")}))

    def test_weights_of_something_else(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(InputError, match="cannot be loaded for --clip"):
            Encoders(Weights(clip=str(tmp_path)), "cpu")
