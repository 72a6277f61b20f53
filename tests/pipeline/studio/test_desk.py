"""What happens when something is pressed, without a browser: results, photos, maps, grids, errors, visitors."""

import gc
import html
import logging
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fpe_pipeline.images.distance import distance, pixel_hash
from fpe_pipeline.runs import run as runs
from fpe_pipeline.studio import shown, work
from fpe_pipeline.studio.desk import Desk
from fpe_pipeline.studio.models import Models
from fpe_pipeline.studio.visitors import Visitor
from tests.pipeline.studio.conftest import last
from tests.support import arrows
from tests.support.tiny_cli import SOURCE, TARGET


def test_a_picture_of_the_page_is_that_of_the_command(desk, visitor, values):
    made = last(desk.generate(visitor, True, *values(seed=5))).made
    assert "done in" not in made.title and made.folder.parent == visitor.folder
    settings, _ = runs.read_record(made.folder / "target-1.png")
    again = runs.execute(settings)
    assert [pixel_hash(image) for image in again.edited] == [pixel_hash(image) for image in made.run.edited]


@pytest.mark.slow
def test_progress_and_previews(desk, visitor, values):
    told = list(desk.generate(visitor, True, *values(steps=12)))
    assert "<progress" in told[1].status and any(len(each.preview) == 2 for each in told)


def test_an_open_lock_draws_another_seed(desk, visitor, values):
    made = last(desk.generate(visitor, False, *values(seed=5, control=False))).made
    assert made.run.settings.seed != 5


def test_what_is_wrong_is_said_in_place_of_the_result(desk, visitor, values):
    for fields, said in (({"targets": " "}, "target prompts"), ({"steps": 999}, "at most 200 steps")):
        end = last(desk.generate(visitor, True, *values(**fields)))
        assert 'role="alert"' in end.status and said in end.status and end.made is None
    other = values()
    other[0] = "/somewhere/else"
    assert "this page has the models" in last(desk.generate(visitor, True, *other)).status
    assert visitor.results == []


def test_an_error_tells_no_more_than_its_kind_and_leaves_the_model_as_it_was(desk, visitor, values, monkeypatch):
    assert last(desk.generate(visitor, True, *values())).made is not None
    pipe = desk.models._loaded[1].pipe
    processors, scheduler = dict(pipe.unet.attn_processors), pipe.scheduler
    held = []

    class Planted(RuntimeError):
        pass

    def fails(self, pipe, index, timestep, tensors, size):
        held.append(weakref.ref(tensors["latents"]))
        raise Planted("/secret/path")

    monkeypatch.setattr("fpe_pipeline.studio.watched.Watched.on_step", fails)
    monkeypatch.setattr(logging.getLogger("fpe_pipeline.studio.desk"), "disabled", True)  # pytest keeps what is logged
    end = last(desk.generate(visitor, True, *values()))
    assert "Planted" in end.status and "secret" not in end.status
    monkeypatch.undo()
    gc.collect()
    assert held and held[0]() is None, "the latents of a run that failed are kept"
    assert dict(pipe.unet.attn_processors) == processors and pipe.scheduler is scheduler
    assert "progress_bar" not in vars(pipe)
    assert last(desk.generate(visitor, True, *values())).made is not None


@pytest.mark.parametrize(
    ("fields", "kind"),
    [({"guidance": "abc"}, "ValueError"), ({"steps": float("inf")}, ""), ({"layers": ["level x"]}, "ValueError")],
    ids=["guidance", "steps", "layers"],
)
def test_fields_that_no_browser_fills_so_are_refused_as_well(desk, visitor, values, fields, kind):
    """In the page, where the visitor reads it, and not as an error of the server's."""
    (shown,) = desk.generate(visitor, True, *values(**fields))
    assert shown.made is None and kind in shown.status and 'role="alert"' in shown.status


def test_what_had_no_effect_is_said_beside_the_result(desk, visitor, values):
    end = last(desk.generate(visitor, True, *values(targets="a red car " * 40, steps=1, control=False)))
    assert end.made is not None and "done in" in end.status
    assert "reads the first 75 tokens of a prompt and no more: target 1" in end.status
    assert "FreePromptEdit did nothing by self_replace_steps" in end.status
    assert 'role="alert"' not in last(desk.generate(visitor, True, *values(steps=2, control=False))).status


def test_cancel(desk, visitor, values):
    told = desk.generate(visitor, True, *values(steps=60))
    for each in told:
        if "<progress" in each.status:
            assert "ending" in desk.cancel(visitor)
            break
    assert "nothing was kept" in last(told).status and visitor.results == []
    assert "nothing is running" in desk.cancel(visitor) and "nothing is running" in desk.cancel(None)


@pytest.mark.slow
def test_a_grid_that_is_cancelled_shows_its_pictures_and_says_where_they_are(desk, visitor, values):
    for each in desk.grid(visitor, "strengths", *values(targets=TARGET, steps=2)):
        end = each
        if visitor.results:
            desk.cancel(visitor)
    assert "cancelled; what was made before is in History" in end.status and visitor.results
    assert [title for _, title, _ in end.made.tiles][:2] == ["source", "strength 0.25"]
    assert len(end.made.tiles) == 1 + len(visitor.results) and all(path.exists() for path, _, _ in end.made.tiles)


def test_a_grid_that_fails_shows_what_it_made_before(desk, visitor, values, monkeypatch):
    generate = work.generate

    def fails(models, visitor, settings, watched):
        if visitor.results:
            raise MemoryError
        return generate(models, visitor, settings, watched)

    monkeypatch.setattr(work, "generate", fails)
    monkeypatch.setattr(logging.getLogger("fpe_pipeline.studio.desk"), "disabled", True)
    end = last(desk.grid(visitor, "strengths", *values(targets=TARGET, steps=1)))
    assert "MemoryError" in end.status and len(end.made.tiles) == 2


def test_a_run_that_waits_for_its_turn_can_be_cancelled(desk, visitor, values):
    assert "waiting" in desk.ask(visitor, "generate")
    assert "before it began" in desk.cancel(visitor) and "nothing is running" in desk.cancel(visitor)
    assert "before it began" in last(desk.generate(visitor, True, *values())).status and visitor.results == []
    desk.ask(visitor, "generate")
    desk.ask(visitor, "grid")  # beginning one takes nothing else back
    assert last(desk.generate(visitor, True, *values(steps=1, control=False))).made is not None
    assert visitor.take_back() and not visitor.may_begin("grid") and visitor.may_begin("grid")


@pytest.mark.slow
def test_a_photo_is_inverted_once_and_edited_from_its_recording(desk, visitor, values, photo, monkeypatch):
    said, shown_photo = desk.receive_photo(visitor, photo)
    assert "72 × 64" in said and shown_photo.size == (72, 64)
    assert visitor.photo.parent == visitor.folder and visitor.photo.name == "upload-1.png"
    inverted = last(desk.invert(visitor, "direct", *values())).made.recorded
    assert inverted.psnr == distance(inverted.cut, inverted.back).psnr
    monkeypatch.setattr(work, "invert_and_record", lambda *a: pytest.fail("inverted twice"))
    first = last(desk.edit(visitor, "direct", *values())).made
    for method in ("p2p-replace", "masactrl"):
        assert last(desk.edit(visitor, "direct", *values(method=method))).made.run.settings.method == method
    monkeypatch.undo()
    whole = runs.execute(first.run.settings)
    for image, other in zip(first.run.edited, whole.edited, strict=True):
        assert distance(image, other).levels <= 2
    for image, other in zip(first.run.uncontrolled, whole.uncontrolled, strict=True):
        assert distance(image, other).levels <= 2
    assert distance(first.run.source, whole.source).levels <= 2
    end = last(desk.edit(visitor, "direct", *values(steps=4)))
    assert "inverted with other settings: press Invert" in end.status


def test_what_edits_of_a_photo_need(desk, visitor, values, photo):
    assert "drop one first" in last(desk.invert(visitor, "direct", *values())).status
    desk.receive_photo(visitor, photo)
    assert "not inverted yet" in last(desk.edit(visitor, "direct", *values())).status


def test_another_photo_forgets_the_first(desk, visitor, values, photo, tmp_path):
    desk.receive_photo(visitor, photo)
    last(desk.invert(visitor, "ddim", *values()))
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    said, picture = desk.receive_photo(visitor, str(bad))
    assert "not a picture" in said and picture is None and visitor.photo is None and visitor.inverted is None
    assert not bad.exists(), "an upload stays on the server"


@pytest.fixture
def another_photo(tmp_path):
    path = tmp_path / "another.png"
    Image.new("RGB", (128, 64), "blue").save(path)
    return str(path)


@pytest.mark.slow
def test_looking_inside_shows_the_photo_of_the_result_after_another_was_dropped(
    desk, visitor, values, photo, another_photo
):
    desk.receive_photo(visitor, photo)
    last(desk.invert(visitor, "direct", *values()))
    made = last(desk.edit(visitor, "direct", *values())).made
    desk.receive_photo(visitor, another_photo)
    look = last(desk.look(visitor)).made
    assert distance(look.images[0], made.run.source).levels <= 2


@pytest.mark.slow
def test_a_photo_that_is_dropped_while_another_is_inverted(desk, visitor, values, photo, another_photo):
    desk.receive_photo(visitor, photo)
    for each in desk.invert(visitor, "direct", *values(steps=6)):
        if "<progress" in each.status and visitor.photo.name == "upload-1.png":
            desk.receive_photo(visitor, another_photo)
    assert "another photo was dropped meanwhile" in each.status and each.made is None
    assert "not inverted yet" in last(desk.edit(visitor, "direct", *values(steps=6))).status


def test_looking_inside(desk, visitor, values):
    assert "no picture yet" in last(desk.look(visitor)).status
    made = last(desk.generate(visitor, True, *values())).made
    look = last(desk.look(visitor)).made
    assert look is visitor.look and set(look.words) >= {"car", "red", "blue", "boat"}
    assert [distance(a, b).levels <= 1 for a, b in zip(look.images, (made.run.source, *made.run.edited), strict=True)]
    assert look.maps.word("car").shape == (8, 8)
    np.testing.assert_allclose(look.maps.pixel((40, 9)).sum(), 1, rtol=1e-5)
    picture = shown.components_picture(look.maps, 1, (64, 64))
    assert picture.size == (64, 64) and len(picture.getcolors()) > 2
    report = made.run.report
    assert shown.report_table(report).count("<tr>") == 1 + len(report.layers)
    assert "for the maps of one step" in shown.memory_bar(report) and shown.memory_bar(None) == ""


@pytest.mark.slow
def test_grids(desk, visitor, values):
    grid = last(desk.grid(visitor, "windows", *values(targets=TARGET))).made
    assert [title for _, title, _ in grid.tiles][:2] == ["source", "steps 0 to 0"] and len(grid.tiles) == 7
    assert grid.refused == [] and all(path.exists() for path, _, _ in grid.tiles)
    assert "a grid goes over" in last(desk.grid(visitor, "colours", *values())).status
    assert "has no window" in last(desk.grid(visitor, "windows", *values(method="pnp"))).status


@pytest.mark.slow
def test_a_grid_names_what_it_leaves_out(desk, visitor, values):
    grid = last(desk.grid(visitor, "methods", *values(targets="a photo of a very blue car", steps=1))).made
    assert any(each.startswith("Prompt-to-Prompt (replace)") for each in grid.refused)
    assert any(title == "MasaCtrl" for _, title, _ in grid.tiles)


class TestRestore:
    def test_settings_of_a_picture(self, desk, visitor, values, tmp_path):
        made = last(desk.generate(visitor, True, *values(seed=9, guidance=3.0))).made
        copy = tmp_path / "download.png"
        copy.write_bytes((made.folder / "target-1.png").read_bytes())
        said, settings = desk.restore(str(copy))
        assert (settings.seed, settings.guidance, settings.source) == (9, 3.0, SOURCE)
        assert "are in the fields" in said and "other weights" not in said and not copy.exists()

    def test_what_a_stranger_wrote_is_refused(self, desk, tmp_path, values, visitor):
        made = last(desk.generate(visitor, True, *values(control=False))).made
        record = made.run.record()
        planted = (
            ({"method": "os:system"}, "the page knows the methods"),
            ({"model": "/etc"}, "this page has the models"),
            ({"options": {"mask": "/etc/passwd"}}, "a file of the server"),
            ({"steps": 10**6}, "at most 200 steps"),
            ({"steps": "many"}, "does not hold settings"),
            ({"guidance": -0.5}, "guidance from 0 (none) to 20, got -0.5"),
            ({"seed": 2**62 + 1}, "below 9,007,199,254,740,992 only, got seed 4611686018427387905"),
            ({"layers": [0, 1]}, "offers the layers level 0, level 1, level 2, level 3, down_blocks.0,"),
            ({"layers": ["up_blocks.1.attentions.0"]}, "these settings have up_blocks.1.attentions.0; repeat"),
            ({"targets": ["a photo of\na blue car"]}, "no field for targets=('a photo of\na blue car',); repeat"),
            ({"image": "photo.png", "inversion_guidance": 2.0}, "no field for inversion_guidance=2.0; repeat"),
        )
        for change, said in planted:
            path = tmp_path / "stranger.png"
            info = runs.png_info(record | {"settings": record["settings"] | change}, "target-1.png")
            made.run.edited[0].save(path, pnginfo=info)
            status, settings = desk.restore(str(path))
            assert settings is None and said in html.unescape(status).replace("\\n", "\n"), status
            assert str(tmp_path) not in status

    @pytest.mark.slow
    def test_a_model_that_was_named_from_where_the_server_began(self, tiny_folder, tmp_path, values, monkeypatch):
        """A record has its whole path; the page calls it as the command line did."""
        monkeypatch.chdir(Path(tiny_folder).parent)
        name = f"./{Path(tiny_folder).name}"
        desk = Desk(Models((name,), device="cpu"), tmp_path / "out")
        visitor = desk.arrive()
        made = last(desk.generate(visitor, True, name, *values(control=False)[1:])).made
        copy = tmp_path / "download.png"
        copy.write_bytes((made.folder / "target-1.png").read_bytes())
        status, settings = desk.restore(str(copy))
        assert settings is not None and settings.model == name and "other weights" not in status, status
        look = last(desk.look(visitor))
        assert look.made is not None, look.status

    @pytest.mark.parametrize("part", ["model", "images", "machine"])
    def test_what_a_stranger_wrote_beside_the_settings(self, desk, tmp_path, values, visitor, part):
        made = last(desk.generate(visitor, True, *values(control=False))).made
        path = tmp_path / "stranger.png"
        made.run.edited[0].save(path, pnginfo=runs.png_info(made.run.record() | {part: "x"}, "target-1.png"))
        status, settings = desk.restore(str(path))
        assert settings is None and f"what it says of its {part} is missing or damaged" in status

    def test_no_path_of_a_picture_is_taken_over(self, desk, tmp_path, values, visitor):
        made = last(desk.generate(visitor, True, *values(control=False))).made
        record = made.run.record()
        path = tmp_path / "stranger.png"
        info = runs.png_info(record, "a.png")
        made.run.edited[0].save(path, pnginfo=info)
        text = path.read_bytes()
        assert text
        status, settings = desk.restore(str(path))
        assert settings.image is None and "fields" in status

    def test_an_edit_of_a_photo_says_how_it_was_inverted(self, desk, tmp_path, values, visitor):
        made = last(desk.generate(visitor, True, *values(control=False, steps=1))).made
        record = made.run.record()
        planted = record["settings"] | {"image": "photo.png", "inversion": "null-text"}
        made.run.edited[0].save(tmp_path / "a.png", pnginfo=runs.png_info(record | {"settings": planted}, "a.png"))
        _, settings = desk.restore(str(tmp_path / "a.png"))
        assert (settings.image, settings.inversion) == ("photo.png", "null-text")

    def test_nothing_dropped(self, desk):
        assert desk.restore(None) == ("", None)


class TestVisitors:
    def test_folders_of_their_own_that_nobody_guesses(self, desk, values):
        one, other = desk.arrive(), desk.arrive()
        last(desk.generate(one, True, *values(control=False)))
        assert one.folder != other.folder and len(one.folder.name) >= 16
        assert other.results == [] and not other.folder.exists()

    def test_who_leaves_is_forgotten(self, desk, values, photo):
        visitor = desk.arrive()
        desk.receive_photo(visitor, photo)
        last(desk.generate(visitor, True, *values(control=False)))
        last(desk.look(visitor))
        kept = weakref.ref(visitor.look.maps)
        visitor.close()
        gc.collect()
        assert kept() is None and visitor.results == [] and not list(visitor.folder.glob("upload*"))
        assert visitor.folder.joinpath("001", "target-1.png").exists()

    @pytest.mark.slow
    def test_results_are_bounded(self, tmp_path, desk, values, visitor, monkeypatch):
        monkeypatch.setattr("fpe_pipeline.studio.visitors.MOST_RESULTS", 2)
        for seed in range(3):
            last(desk.generate(visitor, True, *values(seed=seed, control=False, steps=1)))
        assert [result.number for result in visitor.results] == [2, 3]
        assert isinstance(visitor, Visitor)


@pytest.mark.slow
def test_the_desk_needs_no_gradio():
    """Everything but the layout is tested without a browser, and without the page's library."""
    drawn, reached, ahead = arrows.imports(), set(), {"fpe_pipeline.studio.desk"}
    while ahead:
        reached |= ahead
        ahead = {target for name in ahead for target in drawn.get(name, ())} - reached
    assert "fpe_pipeline.studio.work" in reached and "fpe_pipeline.session.session" in reached
    sources = {
        name: path.read_text(encoding="utf-8") for name, path in arrows.modules(arrows.ROOT, "fpe_pipeline").items()
    }
    needing = {name for name, text in sources.items() if "import gradio" in text}
    layout = {name.rpartition(".")[2] for name in needing}
    assert (
        layout
        == {
            "choices",
            "events",
            "inside_tab",
            "looks",
            "page",
            "recipe",
        }
        and not needing & reached
    )
