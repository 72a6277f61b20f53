"""The page, driven in a browser: what it makes is what the pipeline makes, and what it refuses costs nothing.

``FPE_SCREENSHOTS=docs/studio`` writes the pictures of the documentation anew.
"""

import io
import json
import os
import re
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fpe_pipeline.images.distance import distance, pixel_hash
from fpe_pipeline.runs import run as runs
from tests.pages.conftest import PHONE
from tests.pipeline.studio.test_uploads import bomb, header

TABS = ("Generate", "Photo", "Compare", "Look inside", "History")


def faults(page):
    """What axe finds wrong by WCAG 2 of levels A and AA, as [rule, element]: contrast, names, roles, labels."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    options = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}
    found = axe.run(page, options=options).response
    assert any(rule["id"] == "color-contrast" and rule["nodes"] for rule in found["passes"] + found["violations"])
    return [[rule["id"], node["html"][:160]] for rule in found["violations"] for node in rule["nodes"]]


def shoot(page, name):
    """A picture of what is seen, where the documentation is to have new ones."""
    folder = os.environ.get("FPE_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder, f"{name}.png")
        page.screenshot(path=path, full_page=True)
        with Image.open(path) as picture:
            picture.convert("RGB").quantize(256).save(path, optimize=True)


def pixels(page, selector):
    """A part of the page as an array."""
    return np.asarray(Image.open(io.BytesIO(page.locator(selector).first.screenshot())).convert("RGB"), np.int16)


def test_generate_compare_look_inside_and_restore(visit, out, tmp_path):
    visitor = visit()
    page = visitor.page
    visitor.said("#estimate", "of memory")
    visitor.few_steps(4, pictured=True)
    visitor.generate()
    page.locator(".fpe-tiles a").nth(1).wait_for()
    with page.expect_download() as download:
        page.locator(".fpe-tiles a").nth(1).click()
    picture = tmp_path / download.value.suggested_filename
    download.value.save_as(picture)
    settings, _ = runs.read_record(picture)
    assert settings.targets == ("a photo of a blue car on the beach",)
    again = runs.execute(settings)
    with Image.open(picture) as made:  # this process may round otherwise
        assert pixel_hash(made) == pixel_hash(again.edited[0]) or distance(made, again.edited[0]).levels <= 2

    slider = page.locator(".fpe-slider input").first
    middle = pixels(page, ".fpe-pair")
    slider.focus()
    slider.press("End")  # all of the source
    source = pixels(page, ".fpe-pair")
    slider.press("Home")
    target = pixels(page, ".fpe-pair")
    assert np.abs(source - target).max() > 60 and np.abs(middle - target).max() > 60
    for _ in range(50):
        slider.press("ArrowRight")
    assert page.evaluate("document.querySelector('.fpe-slider').style.getPropertyValue('--cut')") == "50%"
    shoot(page, "generate")
    page.get_by_role("button", name="Copy as a command or as Python").click()
    page.locator(".cm-line", has_text="fpe edit").first.wait_for()
    page.wait_for_timeout(700)
    assert faults(page) == []

    visitor.tab("Compare")
    page.locator("#compare-slider .fpe-slider").wait_for()
    shoot(page, "compare")

    visitor.tab("Look inside")
    page.locator("#look").click()
    page.locator("#words label").first.wait_for()
    plain = pixels(page, "#heat img")
    page.locator("#words label", has_text="car").click()
    visitor.said("#look-status", "where 'car' acts")
    page.wait_for_timeout(700)
    heated = pixels(page, "#heat img")
    assert (heated - plain)[..., 0].mean() > (heated - plain)[..., 2].mean() + 1, "red lies where the word acts"
    shoot(page, "look-inside")
    box = page.locator("#heat img").bounding_box()
    page.locator("#heat img").click(position={"x": box["width"] * 0.5, "y": box["height"] * 0.6})
    assert "attends to" in visitor.said("#look-status", "what the place")
    assert page.locator("#report tbody tr").count() == 7
    assert faults(page) == []

    page.locator("#source textarea").fill("something else")
    visitor.tab("History")
    page.locator("#record-upload input[type=file]").set_input_files(picture)
    visitor.said("#history-status", "are in the fields")
    assert page.locator("#source textarea").input_value() == settings.source
    page.locator("#source textarea").fill("something else")
    page.locator("#history button").first.click()
    visitor.said("#history-status", "the settings of 1: fpe")
    assert faults(page) == []
    assert page.locator("#source textarea").input_value() == settings.source


@pytest.mark.slow
def test_photos_bad_uploads_and_the_servers_files(visit, out, photo, tmp_path, address):
    visitor = visit()
    page = visitor.page
    visitor.few_steps(6, pictured=True)
    visitor.tab("Photo")
    drop = page.locator("#photo-upload input[type=file]")
    text = tmp_path / "notes.png"
    text.write_text("no picture")
    bad = [
        (text, "not a picture"),
        (header(tmp_path / "large.png", 10_000, 5_000), "50 million"),
        (bomb(tmp_path / "bomb.png"), "at most 40 million"),
    ]
    for path, said in bad:
        drop.set_input_files(path)
        visitor.said("#photo-status", said)
    drop.set_input_files({"name": "../../../etc/passwd.png", "mimeType": "image/png", "buffer": photo.read_bytes()})
    visitor.said("#photo-status", "160 × 160 px")
    assert list((out / "results").rglob("upload-*.png"))
    assert not list((out / "results").rglob("passwd*")), "an upload keeps its name"
    page.locator("#invert").click()
    assert "recorded for any number of edits" in visitor.said("#photo-status", " dB;")
    assert faults(page) == []
    page.locator("#edit").click()
    visitor.said("#photo-status", "done in")
    assert page.locator(".fpe-tiles >> visible=true").locator("img").count() == 4
    shoot(page, "photo")

    def status(path):
        try:
            with urllib.request.urlopen(f"{address.rstrip('/')}/{path}") as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    (out / "results" / "letter.txt").write_text("dear")  # an output folder may hold other things
    assert status(f"gradio_api/file={out}/results/letter.txt") in (403, 404)
    for path in ("etc/passwd", str(Path(__file__).resolve())[1:], f"{str(out)[1:]}/server.log"):
        assert status(f"gradio_api/file=/{path}") in (403, 404), path
        assert status(f"gradio_api/file={out}/results/../../../../../../../{path}") in (403, 404), path
    made = max((out / "results").rglob("target-1-no-control.png"), key=os.path.getmtime)
    assert status(f"gradio_api/file={made}") == 200
    config = json.load(urllib.request.urlopen(f"{address}config"))
    assert config["analytics_enabled"] is False


@pytest.mark.slow
def test_stop_and_go_on(visit):
    one, other = visit(), visit()
    before = one.said("#estimate", "of memory")
    one.few_steps(60)
    one.page.locator("#estimate", has_not_text=before).wait_for()  # more steps, more time
    other.few_steps(3)
    one.page.locator("#run").click()
    one.page.locator("#status progress").wait_for()
    one.page.locator("#generate-stop").click()
    stopped = int(re.search(r"step (\d+) of 60", one.said("#status", "stopped; "))[1])
    other.generate()  # while the first stands still, with the model that both have
    one.page.locator("#generate-go-on").click()
    first = int(re.search(r"step (\d+) of 60", one.said("#status", " left"))[1])
    assert 0 < stopped <= first < 60
    one.said("#status", "done in")
    assert one.page.locator("#generate-go-on").is_hidden()


@pytest.mark.slow
def test_a_page_that_is_closed_frees_the_model(visit):
    gone, other = visit(), visit()
    gone.few_steps(200)
    gone.page.locator("#run").click()
    gone.page.locator("#status progress").wait_for()
    gone.page.close()
    other.few_steps(2)
    begun = time.monotonic()
    other.generate()
    assert time.monotonic() - begun < 100  # long before two hundred steps


@pytest.mark.slow
def test_two_visitors_cancel_and_keys(visit):
    one, other = visit(), visit()
    one.few_steps(60)
    one.page.locator("#run").click()
    one.page.locator("#status progress").wait_for()
    other.page.locator("#run").click()
    other.said("#status", "waiting for the model")
    other.page.locator("#generate-cancel").click()  # while it waits for the other page's run
    other.said("#status", "cancelled before it began")
    one.page.locator("#generate-cancel").click()
    one.said("#status", "cancelled")
    other.page.wait_for_timeout(1500)
    assert "cancelled before it began" in other.page.locator("#status").inner_text()

    for visitor, model in ((one, "embedded"), (other, "embedded-80")):
        visitor.page.get_by_label("Model").click()
        visitor.page.get_by_role("option", name=model, exact=True).click()
    one.few_steps(3)
    other.few_steps(2)
    other.page.locator("#targets textarea").fill("a photo of a green car on the beach")
    one.page.locator("#run").click()
    other.page.locator("#run").click()
    for visitor, said in ((one, "a photo of a blue car"), (other, "a photo of a green car")):
        visitor.said("#status", "done in")
        visitor.tab("History")
        visitor.page.locator("#history figcaption").first.wait_for()
        titles = visitor.page.locator("#history figcaption").all_inner_texts()
        assert len(titles) == 1 and said in titles[0]
    assert "3 steps" in one.page.locator("#history").inner_text()
    assert "2 steps" in other.page.locator("#history").inner_text()

    page = other.page
    page.locator("#source textarea").focus()
    order = []
    for _ in range(40):
        page.keyboard.press("Tab")
        order.append(
            page.evaluate("document.activeElement.innerText || document.activeElement.ariaLabel || ''").strip()
        )
        if order[-1] == "History":
            break
    wanted = ["Another colour", "Method and layers", "Sampling", "History"]
    places = [next(n for n, text in enumerate(order) if text.startswith(name)) for name in wanted]
    assert places == sorted(places), order


@pytest.mark.slow
def test_a_transformer_has_fields_of_its_own(visit, transformer, tmp_path):
    visitor = visit()
    page = visitor.page
    visitor.few_steps(5)
    page.get_by_role("button", name="Method and layers").click()
    page.get_by_label("Method", exact=True).click()
    page.get_by_role("option", name="Plug-and-Play").click()
    page.get_by_label("Model").click()
    page.get_by_role("option", name=transformer, exact=True).click()
    page.locator("#window output", has_text="0 – 0.2").wait_for()
    assert page.get_by_label("Method", exact=True).input_value() == "Free-Prompt-Editing"
    page.locator(".fpe-layers label", has_text="transformer 0").wait_for()
    visitor.generate()
    page.locator(".fpe-tiles a").nth(1).wait_for()
    with page.expect_download() as download:
        page.locator(".fpe-tiles a").nth(1).click()
    picture = tmp_path / "made.png"
    download.value.save_as(picture)
    settings, record = runs.read_record(picture)
    assert settings.method == "fpe" and settings.self_replace == (0.0, 0.2) and settings.guidance == 7.0
    assert record["model"]["class"] == "FreePromptSD3Pipeline"
    visitor.tab("Photo")
    page.get_by_label("How the source is held to the photo").click()
    ways = [text.split()[-1] for text in page.get_by_role("option").all_inner_texts()]
    assert ways == ["direct", "reference", "free"]
    page.keyboard.press("Escape")
    visitor.tab("Look inside")
    page.locator("#look").click()
    page.locator("#words label", has_text="car").click()
    visitor.said("#look-status", "where 'car' acts")
    page.locator("#heat img").click()
    visitor.said("#look-status", "choose a word")
    assert page.locator("#components").is_hidden()


@pytest.mark.slow
def test_a_phone(visit):
    visitor = visit(PHONE)
    page = visitor.page
    visitor.few_steps(4, pictured=True)
    page.locator("#targets textarea").fill("unbreakable" * 12)
    page.locator(".fpe-diff ins", has_text="unbreakable").wait_for()
    assert visitor.widths()[0] <= PHONE["width"], "a long word widens the page"
    page.locator("#targets textarea").fill("a photo of a blue car on the beach")
    visitor.generate()
    for name in TABS:
        visitor.tab(name)
        page.wait_for_timeout(300)
        content, window = visitor.widths()
        assert content <= window, f"{name} scrolls sideways: {content} px on {window}"
        assert faults(page) == [], name
    page.evaluate("document.querySelector('.fpe-head p').style.color = '#9ca3af'")
    assert [rule for rule, _ in faults(page)] == ["color-contrast"], "faint text is not seen"
    page.evaluate("document.querySelector('.fpe-head p').style.color = ''")
    visitor.tab("Generate")
    sizes = page.evaluate(
        "[...document.querySelectorAll('button')].filter(e => e.offsetParent && e.innerText.trim())"
        ".map(e => [e.innerText.trim(), e.getBoundingClientRect().height])"
    )
    assert [name for name, height in sizes if height < 24] == [], "too small for a finger"
    shoot(page, "phone")
    assert pytest.approx(page.locator(".fpe-pair >> visible=true").bounding_box()["width"], abs=40) == 366
