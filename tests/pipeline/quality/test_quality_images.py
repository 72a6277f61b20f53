"""Every method on generated and real images: what is tried, how it is scored, and that a run can be continued."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from PIL import Image
from transformers import CLIPTokenizer

from fpe_pipeline import FreePromptPipeline, ddim_scheduler
from fpe_pipeline.edits import CombinedEdit, Edit
from fpe_pipeline.edits.registry import methods_of
from fpe_pipeline.embedded import embedded_path, judge_path
from fpe_pipeline.embedded.judge import Verdict, load_judge
from fpe_pipeline.errors import InputError
from fpe_pipeline.quality import command, compare, contenders, generated_subjects, held_out_pairs, render_subjects
from fpe_pipeline.quality import images_command as module
from fpe_pipeline.quality.methods.comparison import LatestInversions, MethodScore, score_subject
from fpe_pipeline.quality.methods.comparison_table import inversion_table, method_table
from fpe_pipeline.quality.methods.contenders import CONTENDERS, DIFFERENT_NOISE, NO_EDIT, Unfit, chosen
from fpe_pipeline.quality.similarity import iou, psnr
from tests.support.tiny_cli import evaluation

KINDS = ("colour", "object", "background")


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(embedded_path(), subfolder="tokenizer")


@pytest.fixture(scope="module")
def embedded():
    pipe = FreePromptPipeline.from_pretrained(embedded_path())
    pipe.scheduler = ddim_scheduler(pipe.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class TestSubjects:
    def test_names_and_pairs_do_not_depend_on_what_else_is_asked_for(self):
        every = {s.name: (s.source_prompt, s.target_prompt, s.seed) for s in generated_subjects(held_out_pairs(3))}
        one = {
            s.name: (s.source_prompt, s.target_prompt, s.seed)
            for s in generated_subjects(held_out_pairs(2, ["object"]))
        }
        assert set(every) == {f"{kind}-{number}" for kind in KINDS for number in range(3)}
        assert one.items() <= every.items()

    def test_the_words_are_in_their_prompts(self):
        for subject in generated_subjects(held_out_pairs(5)):
            assert subject.region_words is not None
            assert {subject.object_word, subject.region_words[0]} <= set(subject.source_prompt.split())
            assert {*subject.new_words, subject.region_words[1]} <= set(subject.target_prompt.split())
            assert not set(subject.new_words) & set(subject.source_prompt.split())

    def test_renders_show_their_source_and_know_its_outline(self):
        pairs = held_out_pairs(4)
        subjects = render_subjects(pairs, 80)
        seen = load_judge(judge_path()).look(np.stack([s.picture for s in subjects]))
        shown = list(zip(seen.objects, seen.colours, seen.backgrounds, strict=True))
        assert sum(a == pair.source for a, pair in zip(shown, pairs, strict=True)) >= len(pairs) - 1
        known = np.stack([s.mask for s in subjects]) > 127
        assert (known & seen.masks).sum() / (known | seen.masks).sum() > 0.8


class TestContenders:
    def test_every_method_and_both_baselines_take_part(self):
        assert {NO_EDIT, DIFFERENT_NOISE} < set(CONTENDERS)
        assert (NO_EDIT, DIFFERENT_NOISE, *methods_of("unet")) == CONTENDERS

    def test_all_can_make_the_held_out_edits(self, tokenizer, embedded):
        for subject in generated_subjects(held_out_pairs(2)):
            edits = [c.edit_for(subject, tokenizer, embedded) for c in contenders() if c.options is not None]
            assert all(isinstance(edit, Edit | CombinedEdit) for edit in edits)
            assert len({repr(edit) for edit in edits}) == len(edits), "two methods are one"

    def test_what_cannot_be_made_has_a_reason(self, tokenizer):
        subject = generated_subjects(held_out_pairs(1))[0]
        bare = replace(subject, object_word=None, region_words=None, new_words=())
        longer = replace(subject, target_prompt=f"{subject.target_prompt} at night")
        reasons = {}
        for name, tried in (
            ("fpe-regional", bare),
            ("p2p-blend", bare),
            ("p2p-reweight", bare),
            ("p2p-replace", longer),
        ):
            with pytest.raises(Unfit) as caught:
                chosen([name])[0].edit_for(tried, tokenizer, None)
            reasons[name] = str(caught.value)
        assert "`object`" in reasons["fpe-regional"] and "`target_object`" in reasons["p2p-blend"]
        assert "no word" in reasons["p2p-reweight"] and "words" in reasons["p2p-replace"]

    def test_unknown_names(self):
        assert [c.name for c in chosen(["pnp", "fpe"])] == ["fpe", "pnp"]
        with pytest.raises(InputError, match="unknown methods 'dreambooth'"):
            chosen(["dreambooth"])


class FakePipe:
    """Draws the source as grey and targets as white in the left half; inverts a picture to itself."""

    def __init__(self):
        self.device, self.tokenizer = torch.device("cpu"), None
        self.vae_scale_factor, self.native_size = 4, (8, 8)
        self.denoiser = SimpleNamespace(config=SimpleNamespace(in_channels=4, sample_size=64), dtype=torch.float32)
        self.calls = []
        # Gives back a picture that is everywhere 20 grey levels from the black one that it is asked of.
        config = FrozenDict(scaling_factor=2.0, shift_factor=None, latent_channels=4)
        self.vae = SimpleNamespace(config=config, dtype=torch.float32, decode=lambda latents, **_: [latents])
        decoded = [Image.new("RGB", (8, 8), (20, 20, 20))]
        self.image_processor = SimpleNamespace(postprocess=lambda image, output_type: decoded)

    def __call__(self, prompt, targets=(), **options):
        self.calls.append((prompt, *targets))
        image = np.full((8, 8, 3), 0.5)
        target = image.copy()
        target[:, :4] = 1.0
        return SimpleNamespace(images=np.stack([image, *(target for _ in targets)]))

    def invert(self, picture, prompt, **options):
        return SimpleNamespace(
            image=Image.fromarray(picture), noise=torch.zeros(1, 4, 2, 2), latents=torch.zeros(2, 1, 4, 2, 2)
        )


class FakeJudge:
    """Sees one scene, and an object wherever a picture is not grey."""

    def __init__(self, scene):
        self.scene = scene

    def look(self, images):
        masks = np.stack([np.asarray(image)[..., 0] != 128 for image in images])
        return Verdict(*([name] for name in self.scene), masks)


class TestScores:
    subject = render_subjects(held_out_pairs(1, ["colour"]), 16)[0]

    def score(self, subject, origin="ddim", names=(NO_EDIT,), scene=None):
        judge = FakeJudge(scene or self.subject.scene)
        return list(score_subject(FakePipe(), judge, subject, origin, chosen(names)))

    def test_figures_of_a_real_image(self):
        picture = np.full((8, 8, 3), 138, np.uint8)
        mask = np.zeros((8, 8), np.uint8)
        mask[:, 2:6] = 255
        (score,) = self.score(replace(self.subject, picture=picture, mask=mask))
        # Two silhouettes of half the picture each share a quarter of it.
        assert score.iou == pytest.approx(1 / 3)
        # Source row and edit are 10 grey levels from the photo wherever neither has its object.
        assert score.outside_psnr == score.reconstruction == pytest.approx(20 * np.log10(25.5))
        assert score.success is True and score.inversion_seconds is not None
        assert self.score(replace(self.subject, picture=picture, mask=mask), scene=("x", "y", "z"))[0].success is False

    def test_edits_of_one_picture_share_its_inversion(self, monkeypatch):
        pipe, inverted, inversions = FakePipe(), [], LatestInversions()
        monkeypatch.setattr(pipe, "invert", lambda *a, **k: inverted.append(k["method"]) or FakePipe().invert(*a, **k))
        first = replace(self.subject, picture=np.zeros((8, 8, 3), np.uint8), mask=None)
        again, elsewhere = replace(first, name="again"), replace(first, picture=first.picture.copy())
        seconds = []
        for subject, origin in ((first, "ddim"), (first, "direct"), (again, "ddim"), (elsewhere, "ddim")):
            judge = FakeJudge(self.subject.scene)
            (score,) = score_subject(pipe, judge, subject, origin, chosen([NO_EDIT]), inversions=inversions)
            seconds.append(score.inversion_seconds)
        assert inverted == ["ddim", "direct", "ddim"] and seconds[2] == seconds[0]
        assert score.picture == ""
        (score,) = score_subject(pipe, judge, replace(first, picture_name="car.png"), "ddim", chosen([NO_EDIT]))
        assert score.picture == "car.png"
        list(score_subject(pipe, judge, replace(elsewhere, source_prompt="x"), "ddim", chosen([NO_EDIT])))
        assert len(inverted) == 5

    def test_the_autoencoder_alone_stands_beside_the_reconstruction(self):
        (score,) = self.score(replace(self.subject, picture=np.zeros((8, 8, 3), np.uint8), mask=None))
        assert score.autoencoder == pytest.approx(20 * np.log10(255 / 20))
        (score,) = self.score(self.subject, "generated")
        assert score.autoencoder is None

    def test_of_a_background_edit_the_background_is_not_asked(self):
        subject = replace(self.subject, kind="background", picture=np.zeros((8, 8, 3), np.uint8))
        (score,) = self.score(subject)
        assert score.outside_psnr is None and score.iou is not None

    def test_where_nothing_lies_outside_nothing_is_measured_there(self):
        picture, mask = np.zeros((8, 8, 3), np.uint8), np.full((8, 8), 255, np.uint8)
        (score,) = self.score(replace(self.subject, picture=picture, mask=mask))
        assert score.outside_psnr is None and score.iou is not None

    def test_what_the_judge_does_not_know_is_not_made_up(self):
        subject = replace(self.subject, picture=np.zeros((8, 8, 3), np.uint8), mask=None, scene=None)
        (score,) = self.score(subject)
        assert (score.success, score.iou, score.outside_psnr) == (None, None, None)
        assert score.reconstruction is not None and score.seconds is not None

    def test_generated_sources_are_compared_with_themselves(self):
        pipe = FakePipe()
        judge = FakeJudge(self.subject.scene)
        first, alone = score_subject(pipe, judge, self.subject, "generated", chosen([NO_EDIT, DIFFERENT_NOISE]))
        assert first.reconstruction is None and first.inversion_seconds is None
        assert pipe.calls == [
            (self.subject.source_prompt, self.subject.target_prompt),
            (self.subject.target_prompt,),
        ]
        assert alone.outside_psnr is not None


def test_similarities():
    one, other = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    nowhere, left = np.zeros((2, 2), bool), np.array([[True, False], [True, False]])
    assert psnr(one, other) == 0.0 and psnr(one, one) == psnr(one, other, nowhere) == 60.0
    assert iou(left, left) == 1.0 and iou(left, ~nowhere) == 0.5 and iou(nowhere, nowhere) == 0.0


@pytest.mark.slow
def test_a_real_image_end_to_end(embedded):
    """The source row comes back as its autoencoder leaves it, and every kind of contender leaves figures."""
    subject = render_subjects(held_out_pairs(1, ["colour"]), embedded.native_size[0])[0]
    names = [NO_EDIT, DIFFERENT_NOISE, "fpe-regional", "p2p-blend"]
    scores = list(score_subject(embedded, load_judge(judge_path()), subject, "direct", chosen(names), steps=2))
    assert [score.method for score in scores] == names
    assert all(score.iou is not None and score.outside_psnr is not None and not score.reason for score in scores)
    assert [score.reconstruction is None for score in scores] == [False, True, False, False]
    assert scores[0].reconstruction > 28
    # "direct" ends with the autoencoder's own reconstruction.
    assert scores[0].autoencoder == pytest.approx(scores[0].reconstruction, abs=0.01)
    assert scores[0].reconstruction == pytest.approx(scores[2].reconstruction, abs=0.1)


def rows(*values):
    return [MethodScore(*row[:4], **row[4]).to_json() for row in values]


def test_tally_and_table():
    good = {"success": True, "iou": 0.5, "outside_psnr": 20.0, "reconstruction": 31.0, "seconds": 2.0}
    good |= {"autoencoder": 31.5, "inversion_seconds": 1.0}
    other = {"outside_psnr": None, "success": False, "reconstruction": 33.0}
    summary = compare(
        rows(
            ("a", "colour", "ddim", "fpe", good),
            ("a", "colour", "ddim", "pnp", {"reason": "no | decoder"}),
            ("b", "background", "ddim", "fpe", {**good, **other}),
            ("a", "colour", "generated", "fpe", {**good, "reconstruction": None}),
        )
    )
    assert summary["ddim"]["pictures"] == 2 and summary["ddim"]["reconstruction"]["mean"] == 32.0
    assert summary["ddim"]["reconstruction"]["minimum"] == 31.0 and summary["ddim"]["autoencoder"]["mean"] == 31.5
    fpe = summary["ddim"]["kinds"]["all"]["fpe"]
    assert (fpe["edits"], fpe["success"]["mean"], fpe["outside_psnr"]["mean"]) == (2, 0.5, 20.0)
    assert "reconstruction" not in summary["generated"]
    text = method_table(summary, ("generated", "ddim"))
    assert "| edit | method | generated: edits |" in text and "real, ddim: edits" in text
    # Not dropped: the reason stands where the figures would be; so does an edit that was made on one origin only.
    assert "| colour | pnp | 0 | – | – | – | – | 0 | no \\| decoder | – | – | – |" in text
    assert "| colour | fpe | 1 | 100 % [21, 100] | 0.50 [0.50, 0.50] | 20.0 [20.0, 20.0] | 2.00 |" in text
    assert text.count("| background | fpe | 0 | – |") == 1
    inversions = inversion_table(summary, ("ddim", "direct"))
    assert (
        "| ddim | 2 | 32.0 [31.0, 33.0] | 31.00 | 31.5 [31.5, 31.5] | 31.50 | 1.00 | 2 | 50 % [9, 91] |" in inversions
    )
    assert "| direct | 0 | not measured yet | – | – | – | – | – | – | – | – |" in inversions
    assert inversion_table(summary).splitlines()[2:] == inversions.splitlines()[2:3]


def test_a_picture_of_several_edits_is_one_picture():
    """Its reconstruction does not count again with each of them, nor make the interval of all pictures narrower."""
    often, once = ({"reconstruction": level, "autoencoder": 40.0, "inversion_seconds": 1.0} for level in (20.0, 30.0))
    shared = [("a: red", "own", "ddim", "fpe", often), ("a: blue", "own", "ddim", "fpe", often)]
    scores = rows(*shared, ("a: green", "own", "ddim", "fpe", often), ("b: red", "own", "ddim", "fpe", once))
    for score in scores:
        score["picture"] = score["subject"][0]
    whole = compare(scores)["ddim"]
    assert whole["pictures"] == 2 and whole["reconstruction"]["mean"] == 25.0
    assert whole["kinds"]["all"]["fpe"]["edits"] == 4


class TestCommand:
    @pytest.fixture(autouse=True)
    def fakes(self, monkeypatch):
        self.scored, self.stop_at = [], None

        def score_subject(pipe, judge, subject, origin, methods, **_):
            for method in methods:
                if len(self.scored) == self.stop_at:
                    raise KeyboardInterrupt
                self.scored.append((subject.name, origin, method.name))
                yield MethodScore(subject.name, subject.kind, origin, method.name, True, 0.5, 20.0, 31.0, 1.0)

        monkeypatch.setattr(module, "score_subject", score_subject)
        monkeypatch.setattr(module, "fingerprint", lambda folder: "weights")
        monkeypatch.setattr(module, "_load", lambda *_: (SimpleNamespace(native_size=(16, 16)), None))

    def run(self, out, *given):
        return command.run(evaluation("--images", "held-out", "--kinds", "colour", "-o", out, *given))

    def test_a_run_is_continued_and_extended(self, tmp_path):
        self.stop_at = 3
        with pytest.raises(KeyboardInterrupt):
            self.run(tmp_path, "--pairs", 2, "--methods", "fpe", "pnp")
        # The file ends in half a line.
        with (tmp_path / "scores.jsonl").open("a") as file:
            file.write('{"subject": "colour-1", "origin": "ddim", "meth')
        self.stop_at = None
        assert self.run(tmp_path, "--pairs", 2, "--methods", "fpe", "pnp") == 0
        assert len(self.scored) == len(set(self.scored)) == 4
        assert self.run(tmp_path, "--pairs", 2, "--methods", "fpe", "--inversion", "ddim", "direct") == 0
        assert self.scored[4:] == [(f"colour-{number}", "direct", "fpe") for number in range(2)]
        result = json.loads((tmp_path / "evaluation.json").read_text())
        assert len(result["scores"]["rows"]) == 6
        assert result["summary"]["ddim"]["kinds"]["colour"]["pnp"]["edits"] == 2
        assert "real, direct" in (tmp_path / "table.md").read_text()
        assert "| direct | 2 | 31.0 [31.0, 31.0] | 31.00 | – | – |" in (tmp_path / "table.md").read_text()
        with pytest.raises(InputError, match="other settings"):
            self.run(tmp_path, "--pairs", 2, "--steps", 7)

    def test_all_methods_are_the_default(self, tmp_path):
        self.run(tmp_path, "--pairs", 1)
        assert [method for _, _, method in self.scored] == list(CONTENDERS)

    def test_a_damaged_score_file_is_not_half_read(self, tmp_path):
        (tmp_path / "scores.jsonl").write_text("{}\nnot json\n")
        with pytest.raises(InputError, match=r"scores\.jsonl is damaged"):
            self.run(tmp_path, "--pairs", 1)
        (tmp_path / "scores.jsonl").write_text("{}\n3\n")
        with pytest.raises(InputError, match=r"scores\.jsonl is damaged"):
            self.run(tmp_path, "--pairs", 1)

    def test_figures_of_another_version_are_not_mixed_in(self, tmp_path):
        self.run(tmp_path, "--pairs", 1, "--methods", "fpe")
        path = tmp_path / "scores.jsonl"
        path.write_text(path.read_text().replace('"autoencoder", ', "", 1))
        with pytest.raises(InputError, match="other settings"):
            self.run(tmp_path, "--pairs", 1, "--methods", "fpe")

    def test_what_fails_leaves_what_was_there(self, tmp_path, monkeypatch):
        self.run(tmp_path, "--pairs", 1, "--methods", "fpe")
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        del before["scores.jsonl"]

        monkeypatch.setattr(module, "inversion_table", lambda summary: "\ud800")  # fails when table.md is written
        with pytest.raises(UnicodeEncodeError):
            self.run(tmp_path, "--pairs", 1, "--methods", "fpe", "pnp")
        now = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert {**now, **before} == now
        # The scores are kept: the next run has them.
        assert now.keys() == {*before, "scores.jsonl"} and b"pnp" in now["scores.jsonl"]

    def test_a_run_that_makes_no_score_leaves_nothing(self, tmp_path):
        self.stop_at = 0
        with pytest.raises(KeyboardInterrupt):
            self.run(tmp_path / "out", "--pairs", 1)
        assert not (tmp_path / "out").exists()

    def test_a_model_without_a_judge(self, tmp_path):
        for entry in embedded_path().iterdir():
            if entry.name != "judge.safetensors":
                (tmp_path / entry.name).symlink_to(entry)
        for images in ([], ["--images", "generated"]):
            with pytest.raises(InputError, match=r"has no judge\.safetensors, which says what"):
                command.run(evaluation(*images, "--model", tmp_path, "-o", tmp_path / "out"))
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (["--images", "generated", "--inversion", "ddim"], "generated images are not inverted"),
            (["--images", "held-out", "--sweep"], "leave out --images"),
            (["--methods", "fpe"], "--images"),
            (["--inversion", "ddim"], "--images"),
            (["--images", "/no/such/folder"], "is no folder: pass generated, held-out"),
            (["--images", "generated", "--model", "/no/such/model"], "neither a folder nor a file here"),
            (["--model", "/no/such/model"], "neither a folder nor a file here"),
            (["--model", __file__], "must end in .safetensors or .ckpt"),
            (["--pairs", "0"], "pairs must be at least 1, got 0"),
            (["--images", "held-out", "--steps", "0"], "steps must be at least 1"),
            (["--guidance", "nan"], "guidance must be a finite number"),
            (["--self-replace", "2"], "self_replace must be at most 1, got 2.0"),
            (["--kinds"], "kinds must be a list of at least 1"),
            (["--kinds", "colr"], "did you mean colour?"),
            (["--device", "abacus"], "device 'abacus' is not available here"),
            (["--images", "held-out", "--inversion", "null-text", "--guidance", "1"], "unconditional half"),
            (["--images", "folder", "--pairs", "2", "--kinds", "colour"], "--pairs and --kinds choose among"),
            (["--images", "generated", "--chunk", "2"], "--chunk is of runs without --images"),
            (["--images", "held-out", "--text-tokens", "9"], "--text-tokens is about a transformer's text"),
        ],
    )
    def test_options_that_do_not_fit(self, tmp_path, given, message):
        with pytest.raises(InputError, match=message):
            command.run(evaluation(*given, "-o", tmp_path / "out"))
        assert not (tmp_path / "out").exists()
