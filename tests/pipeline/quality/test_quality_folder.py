"""A folder of one's own pictures: what its prompts file may say, and what is said where something is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from fpe_pipeline.app.cli import main
from fpe_pipeline.embedded import embedded_path
from fpe_pipeline.embedded.scenes.scenes import Scene, render
from fpe_pipeline.errors import InputError
from fpe_pipeline.quality import folder_subjects
from fpe_pipeline.quality.methods.image_folder import folder_digest

SOURCE, TARGET = "a photo of a red car on the beach", "a photo of a blue car on the beach"


@pytest.fixture
def folder(tmp_path):
    drawn = render(Scene("car", "red", "beach"), 96)
    Image.fromarray(drawn.image).save(tmp_path / "car.png")
    Image.fromarray(drawn.mask).save(tmp_path / "mask.png")
    return tmp_path


def write(folder, *entries):
    (folder / "prompts.json").write_text(json.dumps(entries))
    return folder


def test_csv_and_json_say_the_same(folder):
    entry = {"image": "car.png", "source": SOURCE, "target": TARGET, "mask": "mask.png", "object": "car"}
    (subject,) = folder_subjects(write(folder, entry))
    assert subject.scene == ("car", "blue", "beach") and subject.new_words == ("blue",)
    assert subject.region_words == ("car", "car") and subject.kind == "own" and subject.picture_name == "car.png"
    digest = folder_digest(folder)
    (folder / "prompts.json").unlink()
    (folder / "prompts.csv").write_text(f"image,source,target,mask,object\ncar.png,{SOURCE},{TARGET},mask.png,car\n")
    assert vars(folder_subjects(folder)[0]) == vars(subject)
    assert folder_digest(folder) != digest


def test_published_lists_are_read(folder):
    entry = {"image_name": "car.png", "soure_prompt": SOURCE, "edit_prompt": "a photo of a wet car at night"}
    (subject,) = folder_subjects(write(folder, entry))
    assert subject.source_prompt == SOURCE and subject.target_prompt.endswith("at night")
    assert subject.scene is None and subject.region_words is None and subject.mask is None


def test_the_digest_knows_the_pictures(folder):
    write(folder, {"image": "car.png", "source": SOURCE, "target": TARGET})
    before = folder_digest(folder)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "car.png")
    assert folder_digest(folder) != before


@pytest.mark.parametrize("suffix", ["tif", "jpg"])
def test_a_mask_has_the_size_of_the_picture_as_it_is_shown(folder, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    Image.new("RGB", (96, 64)).save(folder / f"car.{suffix}", exif=exif)
    Image.new("L", (64, 96)).save(folder / "mask.png")
    entry = {"image": f"car.{suffix}", "source": SOURCE, "target": TARGET, "mask": "mask.png"}
    assert folder_subjects(write(folder, entry))[0].mask == folder / "mask.png"


def test_everything_that_is_wrong_is_said_at_once(folder):
    good = {"image": "car.png", "source": SOURCE, "target": TARGET}
    (folder / "cut.png").write_bytes((folder / "car.png").read_bytes()[:200])
    Image.new("L", (50, 40)).save(folder / "small.png")
    entries = [
        {**good, "image": "gone.png"},
        {**good, "image": "cut.png"},
        {**good, "mask": "small.png"},
        {**good, "target": ""},
        {**good, "object": "boat"},
        {**good, "kind": "all"},
        good,
        good,
    ]
    with pytest.raises(InputError) as caught:
        folder_subjects(write(folder, *entries))
    message = str(caught.value)
    assert "edit 1: cannot read" in message and "gone.png" in message
    assert "edit 2:" in message and "damaged" in message
    assert "50x40 pixels" in message and "96x96" in message
    assert "edit 4: target missing" in message
    assert "edit 5: the object 'boat' is not in the prompt" in message
    assert "edit 6: kind 'all'" in message
    assert "is asked for twice" in message and "edit 7" not in message


@pytest.mark.parametrize("text", ["[", "{}", "[]", "[1]"])
def test_a_prompts_file_that_is_none(folder, text):
    (folder / "prompts.json").write_text(text)
    with pytest.raises(InputError, match=r"prompts\.json"):
        folder_subjects(folder)


def test_a_csv_of_a_spreadsheet(folder):
    (folder / "prompts.csv").write_text(f"image ; source;target\r\ncar.png;{SOURCE}; {TARGET}\r\n;;\r\n")
    (subject,) = folder_subjects(folder)
    assert (subject.source_prompt, subject.target_prompt) == (SOURCE, TARGET)


def test_a_prompt_with_a_comma_is_not_cut(folder):
    (folder / "prompts.csv").write_text(f"image,source,target\ncar.png,{SOURCE}, parked,{TARGET}\n")
    with pytest.raises(InputError, match="edit 1: another number of fields than the heading has"):
        folder_subjects(folder)


def test_a_prompts_file_names_a_thing_once(folder):
    entry = json.dumps({"image": "car.png", "source": SOURCE, "target": TARGET})
    (folder / "prompts.json").write_text(f'[{entry[:-1]}, "target": "a boat"}}]')
    with pytest.raises(InputError, match="'target' is named twice"):
        folder_subjects(folder)


def test_one_prompts_file(folder):
    with pytest.raises(InputError, match="found neither"):
        folder_subjects(folder)
    write(folder, {"image": "car.png", "source": SOURCE, "target": TARGET})
    (folder / "prompts.csv").write_text("image,source,target\n")
    with pytest.raises(InputError, match="found both"):
        folder_subjects(folder)


@pytest.mark.slow
def test_from_the_command_line(folder, capsys):
    """A scene is judged, another picture is measured as far as it can be; a bad folder costs no time."""
    known = {"image": "car.png", "source": SOURCE, "target": TARGET, "mask": "mask.png", "object": "car"}
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8))
    wide.save(folder / "wide.jpg")
    other = {"image": "wide.jpg", "source": "noise", "target": "louder noise"}
    write(folder, known, other)
    out = folder / "out"
    methods = ("no edit", "fpe-regional", "p2p-replace")
    options = ["--steps", "2", "--inversion", "direct", "--model", str(embedded_path()), "-o", str(out)]
    assert main(["evaluate", "--images", str(folder), "--methods", *methods, *options]) == 0
    scores = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()[1:]]
    assert [score["method"] for score in scores] == [*methods, *methods]
    assert all(score["iou"] is not None and score["reconstruction"] > 25 for score in scores[:3])
    assert [bool(score["reason"]) for score in scores[3:]] == [False, True, True]
    assert scores[3]["success"] is None and scores[3]["outside_psnr"] is None and scores[3]["reconstruction"] > 5
    shown = capsys.readouterr().out
    assert "| own | no edit | 2 |" in shown and "| own | fpe-regional | 1 of 2 |" in shown
    assert "- own, fpe-regional: not every edit was made: no word says where" in shown

    (folder / "car.png").write_bytes(b"")
    assert main(["evaluate", "--images", str(folder), "-o", str(folder / "none")]) == 2
    assert "car.png" in capsys.readouterr().err and not (folder / "none").exists()
