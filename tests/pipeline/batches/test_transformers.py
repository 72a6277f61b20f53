"""A batch by transformers: groups, recordings and photos as of UNets, and what they are refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from fpe_pipeline.batches import making
from fpe_pipeline.images.distance import distance
from fpe_pipeline.models.sources import find_model
from fpe_pipeline.runs import run as runs
from fpe_pipeline.runs.making import Loaded
from tests.pipeline.batches.conftest import batch, pictures, written
from tests.support.saved_transformers import make_flux_small, saved_transformer

SOURCE = "a photo of a red car"
COLOURS = ("blue", "green", "yellow")
LEVELS = 3


@pytest.fixture(scope="module", params=["sd3", pytest.param("flux", marks=pytest.mark.slow)])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def transformer(pipe, family, tmp_path_factory):
    return saved_transformer(pipe, family, tmp_path_factory.mktemp(family))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    make_flux_small(monkeypatch)


@pytest.mark.slow
def test_pictures_are_those_of_single_edits(transformer, family, tmp_path, monkeypatch):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "photo.png")
    rows = [{"name": colour, "source": SOURCE, "target": SOURCE.replace("red", colour)} for colour in COLOURS]
    rows.append({**rows[0], "name": "consistent", "method": "consistedit"})
    photos = [{**row, "name": f"photo-{row['name']}", "image": "photo.png"} for row in rows[1:]]
    bad = {"pnp": {"method": "pnp"}, "levels": {"levels": [1]}}
    bad |= {"inverted": {"image": "photo.png", "inversion": "null-text"}}
    refused = [{**rows[0], "name": name, **more} for name, more in bad.items()]
    jobs = written(tmp_path / "jobs.jsonl", [*rows, *photos, *refused])
    runs_made = []
    sampled = making.runs.execute
    monkeypatch.setattr(making.runs, "execute", lambda *a, **k: runs_made.append(a) or sampled(*a, **k))
    said = []
    finished = batch(jobs, tmp_path / "out", said, defaults={"model": str(transformer), "steps": 4}, at_once=2)
    assert finished.failed.keys() == bad.keys()
    assert "pnp edits UNets" in finished.failed["pnp"] and "choose layers of a UNet" in finished.failed["levels"]
    assert "it has direct, reference, free" in finished.failed["inverted"]
    assert runs_made == [], "a source was made again beside its recording"
    files = {path.rpartition("/")[2].removesuffix(".png"): path for path in pictures(tmp_path / "out")}
    pipe = runs.load_pipeline(find_model(str(transformer)), dtype=torch.float32, device="cpu")
    loaded = Loaded(pipe, runs.identity(pipe))
    for name in ("yellow", "consistent", "photo-yellow", "photo-consistent"):
        path = tmp_path / "out" / files[name]
        settings, _ = runs.read_record(path)
        assert "consistent" in name or settings.self_replace == (0.0, 0.2)
        assert settings.guidance == {"sd3": 7.0, "flux": 3.5}[family]
        single = sampled(settings, loaded=loaded)
        with Image.open(path) as made, Image.open(path.with_name("source.png")) as source:
            assert distance(single.edited[0], made).levels <= LEVELS, name
            assert distance(single.source, source).levels <= LEVELS, name


def test_jobs_that_read_the_heat_of_words_stand_beside_others(transformer, tmp_path):
    """One recording of the source serves them all; what makes no sense is said once and costs them nothing."""
    row = {"source": SOURCE, "target": "a photo of a blue car"}
    rows = [{**row, "name": "plain"}, {**row, "name": "consistent", "method": "consistedit"}]
    rows += [{**row, "name": "regional", "method": "fpe-regional", "options": {"word": "car"}}]
    rows += [{**row, "name": "senseless", "options": {"no_such": 1}}]
    jobs, said = written(tmp_path / "jobs.jsonl", rows), []
    finished = batch(jobs, tmp_path / "out", said, defaults={"model": str(transformer), "steps": 1})
    assert finished.failed.keys() == {"senseless"} and len(said) == 1
    assert len(list((tmp_path / "out").rglob("regional*.png"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen", "pixart_sigma"])
def test_further_families_share_a_source_where_it_can_be_recorded(family, pipe, tmp_path, monkeypatch, caplog):
    folder = saved_transformer(pipe, family, tmp_path / "model")
    row = {"source": SOURCE, "target": "a photo of a red boat", "size": [48, 64], "guidance": 3.0}
    rows = [{**row, "name": "maps", "self_replace": [0.0, 0.5]}, {**row, "name": "words", "method": "p2p-replace"}]
    jobs = written(tmp_path / "jobs.jsonl", rows)
    finished = batch(jobs, tmp_path / "out", [], defaults={"model": str(folder), "steps": 3})
    assert finished.failed == {}
    # Of PixArt a recording holds no attention to text.
    assert ("made again for every unit" in caplog.text) == (family == "pixart_sigma")
    for path in (tmp_path / "out" / each for each in pictures(tmp_path / "out")):
        if path.stem in ("maps", "words"):
            with Image.open(path) as made:
                single = runs.execute(runs.read_record(path)[0])
                assert distance(single.edited[0], made).levels <= LEVELS, path.stem
