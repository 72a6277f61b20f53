"""`fpe` on each further family that `FreePromptPipeline` serves: its pictures are those of the same calls in Python."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
from PIL import Image

from fpe_pipeline import FreePromptPipeline, ddim_scheduler, make_edit
from fpe_pipeline.app import cli
from fpe_pipeline.errors import InputError
from fpe_pipeline.images.distance import distance
from fpe_pipeline.models import loading
from fpe_pipeline.models.loading import pick_dtype
from fpe_pipeline.models.served_families import FAMILIES, FAMILY_OF
from fpe_pipeline.models.sources import find_model
from fpe_pipeline.runs.settings import Settings
from tests.support.saved_transformers import SAVED, make_kandinsky_small, saved_transformer
from tests.support.tiny_cli import OTHER, SOURCE, one_error, refuse_loading

TARGET = "a photo of a big dog"
#: How the call of each family names a guidance of 3, a negative prompt, and its absence.
GUIDED = {
    "flux2": {"guidance_scale": 3.0},
    "flux2_klein": {"guidance_scale": 3.0},
    "qwen": {"true_cfg_scale": 3.0, "negative_prompt": ""},
    "chroma": {"guidance_scale": 3.0, "negative_prompt": "rain"},
    "lumina2": {"guidance_scale": 3.0},
    "z_image": {"guidance_scale": 3.0, "negative_prompt": "rain"},
    "ovis": {"guidance_scale": 3.0},
    "longcat": {"guidance_scale": 3.0, "negative_prompt": "rain"},
    "bria": {"guidance_scale": 3.0, "negative_prompt": "rain"},
    "cogview4": {"guidance_scale": 3.0, "negative_prompt": "rain"},
    "krea2": {"guidance_scale": 3.0},
    "ideogram4": {"guidance_scale": 3.0},
    "nucleus": {"guidance_scale": 3.0, "negative_prompt": "rain"},
    "aura_flow": {"guidance_scale": 3.0, "negative_prompt": "rain"},
    "hunyuan_image": {"guidance_scale": 3.0, "negative_prompt": "rain"},
    "kandinsky5": {"guidance_scale": 3.0, "negative_prompt": "rain"},
    "bria_fibo": {"guidance_scale": 3.0, "negative_prompt": "rain"},
    "cogview3": {"guidance_scale": 3.0, "negative_prompt": "rain"},
    "pixart_alpha": {"guidance_scale": 3.0},
    "pixart_sigma": {"guidance_scale": 3.0, "negative_prompt": "rain"},
}
FURTHER = [family for family in GUIDED if family in SAVED]
SIZE = {"width": 48, "height": 64}
SAME = 0  # levels of 255: the same calls in the same process

pytestmark = pytest.mark.filterwarnings("ignore::fpe_pipeline.errors.RequestWarning")


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    """Of a family that makes them of some sizes alone."""
    make_kandinsky_small(monkeypatch)


def few(*kept):
    """The further families, of which those that are not kept are left to the long run."""
    return [pytest.param(each, marks=() if each in kept else pytest.mark.slow) for each in FURTHER]


@pytest.fixture(scope="module")
def folder_of(pipe, tmp_path_factory):
    """Makes, once, a saved pipeline of a family."""
    made = {}

    def of(family):
        if family not in made:
            made[family] = saved_transformer(pipe, family, tmp_path_factory.mktemp(family))
        return made[family]

    return of


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.radial_gradient("L").resize((48, 64)).convert("RGB").save(path)
    return path


def fpe(command, folder, out, *more, steps=3):
    asked = [command, *more, "--model", folder, "--steps", steps, "--size", "48x64", "--quiet", "-o", out]
    assert cli.main([str(word) for word in asked]) == 0
    return json.loads((out / "run.json").read_text())


def edited(folder, out, family, *more, **given):
    told = [f"--negative={text}" for name, text in GUIDED[family].items() if name == "negative_prompt" and text]
    prompts = ["--source", SOURCE, "--target", TARGET, "--self-replace", "0.5", "--guidance", "3"]
    return fpe("edit", folder, out, *prompts, *told, *more, **given)


def served(folder):
    made = FreePromptPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def check_same(out, images):
    names = ["source.png", *(f"target-{number}.png" for number in range(1, len(images)))]
    assert [distance(Image.open(out / name), image).levels for name, image in zip(names, images, strict=True)] == [
        SAME
    ] * len(images)


@pytest.mark.parametrize("family", few("pixart_sigma"))
def test_pictures_are_those_of_the_call_in_python(family, folder_of, tmp_path, capsys):
    folder = folder_of(family)
    record = edited(folder, tmp_path / "made", family)
    tiny, noise = served(folder), torch.Generator().manual_seed(0)
    assert record["model"]["class"] == type(tiny).__name__ and FAMILY_OF[type(tiny).__name__] == family
    call = {"self_replace_steps": 0.5, "num_inference_steps": 3, **SIZE, **GUIDED[family]}
    made = tiny(SOURCE, [TARGET], generator=noise, **call)
    check_same(tmp_path / "made", made.images)
    plain = Image.open(tmp_path / "made" / "target-1-no-control.png")
    assert distance(plain, made.targets[0]).levels > SAME, "the edit did nothing"
    capsys.readouterr()
    assert cli.main(["edit", "--from", str(tmp_path / "made" / "target-1.png"), "-o", str(tmp_path / "again")]) == 0
    assert "bit for bit" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("family", few("qwen"))
def test_a_photo_is_edited_as_in_python_and_from_its_recording(family, folder_of, photo, tmp_path, capsys):
    folder, tiny = folder_of(family), served(folder_of(family))
    record = edited(folder, tmp_path / "made", family, "--image", photo)
    way = FAMILIES[family].inversions[0]
    assert record["settings"]["inversion"] == way
    if not FAMILIES[family].is_flow:
        tiny.scheduler = ddim_scheduler(tiny.scheduler)
    inversion = tiny.invert(str(photo), SOURCE, num_inference_steps=3, method=way, **SIZE)
    made = tiny(inversion=inversion, target_prompt=[TARGET], self_replace_steps=0.5, **GUIDED[family])
    check_same(tmp_path / "made", made.images)
    if not FAMILIES[family].is_recorded:
        capsys.readouterr()
        assert cli.main(["invert", str(photo), "--model", str(folder), "-o", str(tmp_path / "kept")]) == 2
        assert "of which nothing is recorded; edit the picture itself" in one_error(capsys)
        return
    negative = [f"--negative={GUIDED[family]['negative_prompt']}"] if "negative_prompt" in GUIDED[family] else []
    fpe("invert", folder, tmp_path / "kept", photo, "--prompt", SOURCE, "--guidance", "3", *negative)
    asked = ["edit", "--recording", tmp_path / "kept", "--target", TARGET, "--self-replace", "0.5", "--quiet"]
    assert cli.main([str(word) for word in [*asked, "-o", tmp_path / "recorded"]]) == 0
    for name in ("source.png", "target-1.png"):
        pictures = [Image.open(tmp_path / place / name) for place in ("recorded", "made")]
        assert distance(*pictures).levels <= 3  # sums over other rows round otherwise


@pytest.mark.slow
@pytest.mark.parametrize("family", FURTHER)
def test_words_are_edited_and_found(family, folder_of, tmp_path, monkeypatch):
    if family == "qwen":  # the tokens that its pipeline leaves out are as many as the template has in its tokenizer
        from diffusers import QwenImagePipeline

        from tests.support.tiny_language import qwen_tokenizer

        make = QwenImagePipeline._get_qwen_prompt_embeds

        def shorter(self, *arguments, **options):
            before = self.prompt_template_encode.partition("{}")[0]
            self.prompt_template_encode_start_idx = len(qwen_tokenizer()(before)["input_ids"])
            return make(self, *arguments, **options)

        monkeypatch.setattr(QwenImagePipeline, "_get_qwen_prompt_embeds", shorter)
    folder, tiny = folder_of(family), served(folder_of(family))
    record = fpe(
        "edit", folder, tmp_path / "made", "--source", SOURCE, "--target", OTHER, "--method", "p2p-replace",
        "--option", "self_replace_steps=0.5", "--no-control", "--guidance", "3",
    )  # fmt: skip
    assert record["settings"]["method"] == "p2p-replace"
    edit = make_edit("p2p-replace", [SOURCE, OTHER], tiny.tokenizer, tiny, self_replace_steps=0.5)
    call = {name: told for name, told in GUIDED[family].items() if told != "rain"}
    noise = torch.Generator().manual_seed(0)
    check_same(
        tmp_path / "made",
        tiny(SOURCE, [OTHER], edit=edit, generator=noise, num_inference_steps=3, **SIZE, **call).images,
    )
    heat = ["heatmap", SOURCE, "--word", "car", "--model", folder, "--steps", 2, "--size", "48x64", "--quiet"]
    assert cli.main([str(word) for word in [*heat, "-o", tmp_path / "heat"]]) == 0
    (read,) = json.loads((tmp_path / "heat" / "heat.json").read_text())["heat"]
    assert 0 < read["share"] <= read["most"] < 1


@pytest.mark.parametrize(
    "family, more, reason",
    [
        ("flux2", ["--negative", "rain"], "a transformer of FLUX.2's kind, which is told its guidance"),
        ("flux2_klein", ["--negative", "rain"], "which is guided by the empty prompt alone; leave --negative out"),
        ("flux2_klein", ["--guidance", "2"], "was distilled to be without guidance, and would take no notice of"),
        ("qwen", ["--method", "pnp"], "a transformer of Qwen-Image's kind; its methods are fpe, "),
        ("chroma", ["--size", "40x64"], "positive multiples of 16 px for this model's tokens"),
        ("qwen", ["--size", "40x64"], "positive multiples of 16 px for this model's tokens"),
        ("z_image", ["--size", "40x64"], "positive multiples of 16 px for this model's tokens"),
        ("lumina2", ["--image", "photo.png", "--inversion", "null-text"], "it has direct, reference, free"),
        ("pixart_sigma", ["--image", "photo.png", "--inversion", "null-text"], "it has ddim, direct, negative-prompt"),
        ("pixart_sigma", ["--levels", "1"], "--levels choose layers of a UNet"),
        ("cogview3", ["--image", "photo.png", "--inversion", "null-text"], "it has ddim, direct, negative-prompt"),
        ("kandinsky5", ["--levels", "1"], "--levels choose layers of a UNet"),
        ("kandinsky5", ["--image", "photo.png", "--inversion", "ddim"], "it has direct, reference, free"),
    ],
)
def test_what_a_family_is_refused_before_weights_are_read(family, more, reason, tmp_path, photo, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    refuse_loading(monkeypatch)
    folder = described(tmp_path / "model", family)
    asked = ["edit", "--source", SOURCE, "--target", TARGET, "--model", str(folder), "-o", str(tmp_path / "out")]
    assert cli.main([*asked, *more]) == 2
    assert reason in one_error(capsys)


@pytest.mark.skipif(not hasattr(diffusers, "QwenImage21Pipeline"), reason="this diffusers has no Qwen-Image 2.1")
@pytest.mark.parametrize("method", ["fpe", "p2p-refine"])
def test_a_model_whose_tokenizer_is_in_a_processor(method, tmp_path, monkeypatch, capsys):
    """Qwen-Image 2.1; its folder is told by its configuration alone."""
    from tests.support.tiny_qwen21 import tiny_qwen21_pipeline

    made = FreePromptPipeline.from_pipe(tiny_qwen21_pipeline(dtype=torch.float32))
    monkeypatch.setattr("fpe_pipeline.runs.run.load_pipeline", lambda *args, **kwargs: made)
    folder = described(tmp_path / "qwen21", "qwen21")
    asked = ["--source", SOURCE, "--target", TARGET, "--method", method, "--size", "64x64", "--steps", "2"]
    code = cli.main(["edit", "--model", str(folder), *asked, "--quiet", "-o", str(tmp_path / "out")])
    assert code == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "run.json").read_text())["model"]["class"] == type(made).__name__


def described(folder, family, **config):
    """A folder that says what a pipeline of the family is, and has no weights."""
    config = {"is_distilled": True, **config} if family == "flux2_klein" else config
    vae = {"temperal_downsample": [False, True, True]} if family == "qwen" else {"block_out_channels": [4] * 4}
    parts = {"vae/config.json": vae, "transformer/config.json": {"patch_size": 2, "all_patch_size": [2]}}
    parts["model_index.json"] = {"_class_name": FAMILIES[family].classes[0], **config}
    for name, said in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize(
    "family, steps, guidance, window, inversion",
    [
        ("flux2", 50, 4.0, 0.2, "direct"),
        ("flux2_klein", 4, 1.0, 0.25, "direct"),
        ("qwen", 50, 4.0, 0.2, "direct"),
        ("chroma", 35, 5.0, 0.2, "direct"),
        ("lumina2", 30, 4.0, 0.2, "direct"),
        ("z_image", 50, 5.0, 0.2, "direct"),
        ("ovis", 50, 5.0, 0.2, "direct"),
        ("longcat", 50, 4.5, 0.2, "direct"),
        ("bria", 30, 5.0, 0.2, "direct"),
        ("qwen21", 40, 1.0, 0.2, "direct"),
        ("cogview4", 50, 5.0, 0.2, "direct"),
        ("krea2", 28, 4.5, 0.2, "direct"),
        ("ideogram4", 48, 7.0, 0.2, "direct"),
        ("nucleus", 50, 4.0, 0.2, "direct"),
        ("aura_flow", 50, 3.5, 0.2, "direct"),
        ("hunyuan_image", 50, 3.5, 0.2, "direct"),
        ("kandinsky5", 50, 3.5, 0.8, "direct"),
        ("bria_fibo", 30, 5.0, 0.2, "direct"),
        ("cogview3", 50, 5.0, 0.2, "ddim"),
        ("pixart_alpha", 20, 4.5, 0.8, "ddim"),
    ],
)
def test_defaults_are_the_familys_own(family, steps, guidance, window, inversion, tmp_path):
    folder = described(tmp_path, family)
    made = Settings.of_model(source=SOURCE, targets=(TARGET,), model=str(folder))
    assert (made.steps, made.guidance, made.self_replace[1], made.inversion) == (steps, guidance, window, inversion)
    swapped = Settings.of_model(source=SOURCE, targets=(TARGET,), model=str(folder), method="masactrl")
    assert swapped.check().family == family  # a window of Free-Prompt-Editing's is none of another method


@pytest.mark.parametrize(
    "family, name, transformer, config, steps, guidance, window",
    [
        ("flux", "dev", {"guidance_embeds": True}, {}, 28, 3.5, 0.2),
        ("flux", "schnell", {"guidance_embeds": False}, {}, 4, 0.0, 0.25),
        ("hunyuan_image", "HunyuanImage-2.1", {"guidance_embeds": False}, {}, 50, 3.5, 0.2),
        ("hunyuan_image", "HunyuanImage-2.1-Distilled", {"guidance_embeds": True}, {}, 8, 3.25, 0.25),
        ("krea2", "raw", {}, {"is_distilled": False}, 28, 4.5, 0.2),
        ("krea2", "tdm", {}, {"is_distilled": True}, 8, 0.0, 0.25),
        ("z_image", "Z-Image-Turbo", {}, {}, 9, 0.0, 0.25),
        ("z_image", "z_image_turbo_bf16", {}, {}, 9, 0.0, 0.25),
        ("z_image", "turbocharged", {}, {}, 50, 5.0, 0.2),
        ("sd3", "stable-diffusion-3.5-large-turbo", {}, {}, 4, 0.0, 0.25),
        ("sd3", "stable-diffusion-3.5-large", {}, {}, 28, 7.0, 0.2),
        ("qwen", "a-turbo", {}, {}, 50, 4.0, 0.2),  # of which there is none that diffusers loads as a pipeline
    ],
)
def test_defaults_of_models_that_were_distilled(
    family, name, transformer, config, steps, guidance, window, tmp_path, monkeypatch
):
    folder = described(tmp_path / "turbo" / name, family, **config)
    said = folder / "transformer" / "config.json"
    said.write_text(json.dumps({**json.loads(said.read_text()), **transformer}))
    monkeypatch.chdir(folder.parent)
    for model in (str(folder), f"{folder}/", folder.name):
        made = Settings.of_model(source=SOURCE, targets=(TARGET,), model=model)
        assert (made.steps, made.guidance, made.self_replace) == (steps, guidance, (0.0, window))
        assert made.check().family == family
    own = Settings.of_model(source=SOURCE, targets=(TARGET,), model=str(folder), steps=30)
    assert (own.steps, own.guidance) == (30, guidance)


def test_guidance_that_a_distilled_model_would_hear(tmp_path):
    """Krea 2's guides all the same; FLUX.1 [schnell] takes no notice."""
    krea = described(tmp_path / "krea", "krea2", is_distilled=True)
    Settings.of_model(source=SOURCE, targets=(TARGET,), model=str(krea), guidance=2.0).check()
    flux = described(tmp_path / "flux", "flux")
    (flux / "transformer" / "config.json").write_text('{"guidance_embeds": false}')
    with pytest.raises(InputError, match=r"was distilled to be without guidance, .* --guidance 2; leave it out"):
        Settings.of_model(source=SOURCE, targets=(TARGET,), model=str(flux), guidance=2.0).check()


def test_undistilled_klein_is_guided(tmp_path):
    folder = described(tmp_path, "flux2_klein", is_distilled=False)
    made = Settings.of_model(source=SOURCE, targets=(TARGET,), model=str(folder), guidance=3.0)
    assert (made.check().is_distilled, made.steps, made.guidance) == (False, 50, 3.0)


def test_weights_of_a_family_that_overflows_in_half_precision_are_bfloat16_on_a_gpu(tmp_path):
    qwen, pixart = (find_model(str(described(tmp_path / name, name))) for name in ("qwen", "pixart_sigma"))
    assert [pick_dtype("auto", "cuda", each) for each in (qwen, pixart)] == [torch.bfloat16, torch.float16]
    assert pick_dtype("float16", "cuda:1", qwen) is torch.float16 and pick_dtype("auto", "cpu", qwen) is torch.float32


def test_every_family_has_a_class_in_python():
    from fpe_pipeline.pipelines import free_prompt

    for family in FAMILIES:
        if family != "unet" and family in SAVED:
            made = free_prompt._class_for(family)
            assert FAMILY_OF[made.parent.__name__] == FAMILY_OF[made.__name__] == family
    assert {"qwen", "chroma", "lumina2", "z_image"} <= {*FAMILIES}


def test_a_processor_in_the_place_of_a_tokenizer_identifies_a_model():
    """FLUX.2 [dev] has one, which reads pictures too."""
    flux2 = pytest.importorskip("tests.support.tiny_flux2")
    tiny = flux2.tiny_flux2_that_encodes(dtype=torch.float32)
    before = loading.identity(tiny)
    loading._check_tokenizers(tiny, "folder")
    tiny.tokenizer.tokenizer.add_tokens("jabberwocky")
    assert loading.identity(tiny) != before
