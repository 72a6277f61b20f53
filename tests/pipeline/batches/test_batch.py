"""A batch by the tiny model: what is made together, what is kept, what fails alone, what is made again."""

import csv
import hashlib
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fpe_pipeline.app import cli
from fpe_pipeline.atomic_folder import replaced
from fpe_pipeline.batches import batch as batches
from fpe_pipeline.batches import making, results
from fpe_pipeline.batches.batch import plan
from fpe_pipeline.batches.job_files import read_jobs
from fpe_pipeline.batches.request import BatchRequest
from fpe_pipeline.errors import InputError
from fpe_pipeline.images.distance import distance, pixel_hash
from fpe_pipeline.models.sources import find_model
from fpe_pipeline.runs import run as runs
from fpe_pipeline.runs.making import Loaded
from fpe_pipeline.runs.settings import Settings
from tests.pipeline.batches.conftest import batch, manifest, pictures, written

SOURCE = "a photo of a red car"
COLOURS = ("blue", "green", "yellow", "purple", "orange")
#: Sums of another batch round otherwise: a few of 255 levels after two steps.
LEVELS = 3


@pytest.fixture(scope="module")
def made(model, tmp_path_factory):
    """A folder with pictures, a list and its batch: one source with five targets and two methods, a photo, bad rows."""
    folder = tmp_path_factory.mktemp("batch")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[8:40, 16:48] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    (folder / "torn.png").write_bytes((folder / "photo.png").read_bytes()[:3000])
    rows = [{"name": colour, "source": SOURCE, "target": SOURCE.replace("red", colour)} for colour in COLOURS]
    rows.append({"name": "late", "source": SOURCE, "target": "a photo of a car", "method": "masactrl"})
    real = {"image": "photo.png", "source": SOURCE, "target": "a photo of a blue car", "inversion": "direct"}
    rows += [{**real, "name": "senseless", "options": {"no_such": 1}}]  # the first of its source
    rows += [{**real, "name": "masked", "mask": "mask.png", "kind": "photo"}]
    rows += [{**real, "name": "torn", "image": "torn.png"}, {**real, "name": "missing", "image": "none.png"}]
    rows += [{**real, "name": "unmasked", "mask": "none.png"}]
    rows += [{"source": SOURCE}, {"name": "wordless", "source": SOURCE, "target": "a cat", "method": "p2p-refine"}]
    rows[-1]["options"] = {"no_such": 1}
    jobs = written(folder / "jobs.jsonl", rows)
    defaults = {"model": str(model), "steps": 2, "seed": 5, "device": "cpu"}
    said = []
    finished = batch(jobs, folder / "out", said, defaults=defaults)
    return {"jobs": jobs, "out": folder / "out", "defaults": defaults, "finished": finished, "said": said}


def again(made, output=None, said=None, **options):
    return batch(made["jobs"], output or made["out"], said, **{"defaults": made["defaults"], **options})


def test_what_fails_costs_itself_alone(made):
    failed = made["finished"].failed
    assert failed.keys() == {"senseless", "torn", "missing", "unmasked", "row 12", "wordless"}
    assert "is damaged" in failed["torn"] and "No such file" in failed["missing"]
    assert "none.png" in failed["unmasked"] and "the target is missing" in failed["row 12"]
    assert "no_such" in failed["wordless"] and "no_such" in failed["senseless"]
    assert sorted(line.partition(" failed: ")[0] for line in made["said"]) == sorted(failed)


def test_every_picture_once_with_its_checksum(made):
    files = pictures(made["out"])
    lines = manifest(made["out"])
    assert sorted(line["file"] for line in lines) == sorted(files)
    for line in lines:
        assert hashlib.sha256(files[line["file"]]).hexdigest() == line["sha256"]
        assert pixel_hash(Image.open(made["out"] / line["file"])) == line["pixels_sha256"]
    assert {line["job"] for line in lines if "job" in line} == {*COLOURS, "late", "masked"}
    by_folder = {file.partition("/")[0] for file in files}
    assert len(by_folder) == 2  # one for the prompt, one for the photo
    assert {file.rpartition("/")[2] for file in files} >= {"source.png", "photo.png"}


def test_pictures_are_those_of_single_edits(made, model):
    """Five targets from a recording in two batches, one by MasaCtrl, one of a photo: each as `fpe edit` makes it."""
    files = {line.get("job"): made["out"] / line["file"] for line in manifest(made["out"])}
    pipe = runs.load_pipeline(find_model(str(model)), dtype=torch.float32, device="cpu")
    loaded = Loaded(pipe, runs.identity(pipe))
    for name in ("orange", "late", "masked"):
        settings, record = runs.read_record(files[name])
        assert len(settings.targets) == 1 and record["picture"] == "target-1.png"
        single = runs.execute(settings, loaded=loaded)
        assert distance(single.edited[0], Image.open(files[name])).levels <= LEVELS, name
    different = runs.execute(Settings(SOURCE, ("a cat",), control=False, **made["defaults"]), loaded=loaded)
    assert distance(different.edited[0], Image.open(files["blue"])).levels > 10 * LEVELS


def test_from_a_picture_on_the_command_line(made, tmp_path, capsys):
    (path,) = made["out"].glob("*/blue.png")
    assert cli.main(["edit", "--from", str(path), "-o", str(tmp_path), "--quiet"]) == 0
    err = capsys.readouterr().err
    assert "bit for bit" in err or "levels" in err
    assert distance(Image.open(tmp_path / "target-1.png"), Image.open(path)).levels <= LEVELS


def test_summary(made):
    lines = list(csv.DictReader((made["out"] / "summary.csv").open()))
    assert [line["job"] for line in lines] == [
        *COLOURS, "late", "senseless", "masked", "torn", "missing", "unmasked", "row 12", "wordless"
    ]  # fmt: skip
    masked = lines[len(COLOURS) + 2]
    assert float(masked["mse"]) == pytest.approx(float(masked["mse inside"]) + float(masked["mse outside"]), rel=1e-9)
    photo, edit = (Image.open(next(made["out"].glob(f"*/{name}.png"))) for name in ("photo", "masked"))
    assert float(masked["psnr"]) == pytest.approx(distance(photo, edit).psnr)
    text = (made["out"] / "summary.md").read_text()
    assert "7 of 13 jobs made" in text and "| photo | 1 |" in text and "| wordless |" in text
    assert (made["out"] / "summary.png").exists()


def test_what_is_there_is_not_made_again(made, monkeypatch):
    """Nor is the model loaded."""
    before = pictures(made["out"])
    dates = {path: path.stat().st_mtime_ns for path in made["out"].glob("*/*.png")}
    good = made["jobs"].with_name("good.jsonl")
    good.write_text("".join(made["jobs"].read_text().splitlines(keepends=True)[:6]))
    monkeypatch.setattr(making, "load_pipeline", lambda *a, **k: pytest.fail("a model was loaded for nothing"))
    finished = again({**made, "jobs": good})
    assert (finished.failed, finished.kept, pictures(made["out"])) == ({}, 6, before)
    assert {path: path.stat().st_mtime_ns for path in made["out"].glob("*/*.png")} == dates


SLOW = ("deleted", "damaged", "no line", "its source")
DAMAGE = ["half a line", *(pytest.param(damage, marks=pytest.mark.slow) for damage in SLOW)]


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_made_again_to_the_same_bytes(made, tmp_path, damage):
    out = tmp_path / "out"
    for name, content in pictures(made["out"]).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    text = (made["out"] / "manifest.jsonl").read_text()
    (out / "manifest.jsonl").write_text(text)
    (path,) = out.glob("*/green.png")
    if damage == "deleted":
        path.unlink()
    elif damage == "damaged":
        path.write_bytes(path.read_bytes()[:-10])
    elif damage == "its source":
        (path.parent / "source.png").unlink()
    else:
        first, *rest = text.splitlines(keepends=True)
        assert "source.png" in first
        (out / "manifest.jsonl").write_text("".join(rest) + (first[:20] if damage == "half a line" else ""))
    finished = again(made, out)
    assert len(finished.lines) - len(finished.failed) == 7
    assert pictures(out) == pictures(made["out"])
    assert sorted(line["file"] for line in manifest(out)) == sorted(pictures(out))


def test_a_row_that_changed_is_made_again_with_its_unit(made, tmp_path):
    rows = made["jobs"].read_text().splitlines()
    rows[4] = rows[4].replace("orange", "red big").replace('"name": "red big"', '"name": "orange"')
    rows[8] = rows[0]  # another row fails now
    changed = made["jobs"].with_name("changed.jsonl")
    changed.write_text("\n".join(rows) + "\n")
    batch_of = plan(BatchRequest(jobs=changed, output=made["out"], defaults=made["defaults"]))
    wanted = {name for task in batch_of.tasks for name in task.wanted}
    assert "orange" in wanted and not wanted & {"blue", "green", "yellow", "purple", "late", "masked"}


def test_other_settings_are_other_pictures(made):
    everything = {*COLOURS, "late", "senseless", "masked", "torn", "unmasked", "wordless"}
    for change in ({"steps": 3}, {"guidance": 3.0}):
        request = BatchRequest(jobs=made["jobs"], output=made["out"], defaults=made["defaults"] | change)
        assert {name for task in plan(request).tasks for name in task.wanted} == everything


def test_pictures_of_another_number_of_threads_are_kept(made, monkeypatch):
    """Or of workers, among whom the threads are divided; each picture's record says how many made it."""
    monkeypatch.setattr(batches, "check_ray", lambda: None)
    kept = {*COLOURS, "late", "masked"}
    for change in ({"defaults": made["defaults"] | {"threads": 3}}, {"workers": 2, "defaults": made["defaults"]}):
        planned = plan(BatchRequest(jobs=made["jobs"], output=made["out"], **change))
        assert not kept & {name for task in planned.tasks for name in task.wanted}
        assert {entry["job"] for entry in planned.results.entries.values() if "job" in entry} == kept


@pytest.mark.slow
def test_a_unit_that_fails_together_is_tried_one_by_one(made, tmp_path, monkeypatch):
    real = making.Maker._run

    def planted(self, settings, source):
        if any("green" in target for target in settings.targets):
            raise RuntimeError("planted")
        return real(self, settings, source)

    monkeypatch.setattr(making.Maker, "_run", planted)
    finished = again(made, tmp_path / "out")
    assert finished.failed["green"] == "planted"
    assert finished.failed.keys() - made["finished"].failed.keys() == {"green"}
    assert "source.png" in {file.rpartition("/")[2] for file in pictures(tmp_path / "out")}


@pytest.mark.slow
def test_a_sampler_with_noise_has_no_recording(made, model, tmp_path):
    from diffusers import EulerAncestralDiscreteScheduler

    copy = tmp_path / "noisy"
    copy.mkdir()
    for entry in model.iterdir():
        if entry.name not in ("scheduler", "model_index.json"):
            (copy / entry.name).symlink_to(entry)
    EulerAncestralDiscreteScheduler(beta_schedule="scaled_linear").save_pretrained(copy / "scheduler")
    index = json.loads((model / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EulerAncestralDiscreteScheduler"]
    (copy / "model_index.json").write_text(json.dumps(index))
    jobs = made["jobs"].with_name("few.jsonl")
    jobs.write_text("".join(made["jobs"].read_text().splitlines(keepends=True)[:3]))
    finished = batch(jobs, tmp_path / "out", defaults=made["defaults"] | {"model": str(copy)}, at_once=2)
    assert finished.failed == {}
    for line in finished.lines:
        single = runs.execute(runs.read_record(tmp_path / "out" / line.file)[0])
        assert distance(single.edited[0], Image.open(tmp_path / "out" / line.file)).levels <= LEVELS


def test_the_command(made, tmp_path, capsys):
    rows = made["jobs"].read_text().splitlines(keepends=True)
    jobs = made["jobs"].with_name("command.jsonl")
    jobs.write_text("".join([*rows[:6], rows[9], rows[11]]))  # a picture that is missing, and no target
    arguments = [
        "batch",
        str(jobs),
        "-o",
        str(made["out"]),
        "--model",
        made["defaults"]["model"],
        "--seed",
        "5",
    ]
    arguments += ["--steps", "2", "--device", "cpu", "--quiet"]
    assert cli.main([*arguments, "--json"]) == 1
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert (said["jobs"], said["made"], said["kept"]) == (8, 0, 6)
    assert said["failed"].keys() == {"missing", "row 8"}
    assert "fpe: row 8 failed: the target is missing" in err
    assert cli.main([*arguments[:2], "--model", str(tmp_path / "none")]) == 2
    assert cli.main(["batch", str(tmp_path / "none.json")]) == 2
    assert cli.main([*arguments, "--workers", "0"]) == 2
    assert capsys.readouterr().out == ""


def test_settings_of_an_optimisation_that_no_row_asks_for(model, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    row = {"image": "a.png", "target": "a blue car"}
    request = BatchRequest(
        jobs=written(tmp_path / "jobs.jsonl", [row]),
        output=tmp_path / "out",
        defaults={"model": str(model), "inner_steps": 3},
    )
    with pytest.raises(InputError, match="the list inverts no picture by it; pass --inversion null-text"):
        plan(request)
    written(request.jobs, [row, {**row, "name": "one", "inversion": "null-text"}])
    assert len(plan(request).tasks) == 2


def test_a_rows_own_settings_of_an_optimisation_that_it_does_not_ask_for(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    row = {"image": "a.png", "target": "a blue car", "inner_steps": 3}
    rows = [row, {**row, "inversion": "null-text"}, {"source": SOURCE, "target": "a blue car", "early_stop": 0.1}]
    first, optimised, generated = read_jobs(written(tmp_path / "jobs.jsonl", rows), {})
    assert optimised.settings.inner_steps == 3
    for refused in (first, generated):
        assert "are null-text inversion's, by which this row inverts no picture" in refused.reason


def test_ray_that_is_missing(made, monkeypatch):
    from fpe_pipeline.batches import workers

    monkeypatch.setattr(workers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'fpe-kernels\[cluster\]'"):
        plan(BatchRequest(jobs=made["jobs"], output=made["out"], defaults=made["defaults"], workers=2))


def test_a_clusters_device_need_not_be_here(made, monkeypatch):
    monkeypatch.setattr(batches, "check_ray", lambda: None)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    defaults = made["defaults"] | {"device": "cuda:99"}
    asked = {"jobs": made["jobs"], "output": made["out"], "defaults": defaults}
    assert plan(BatchRequest(**asked, cluster="ray://head:10001")).tasks
    with pytest.raises(InputError, match="device 'cuda:99' is not available here"):
        plan(BatchRequest(**asked))


def test_what_a_files_new_content_decides_is_made_again(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    code = "from fpe_pipeline import FreePromptEdit\nclass Edit(FreePromptEdit):\n    pass\n"
    (tmp_path / "my_batched_edit.py").write_text(code)
    row = {"source": SOURCE, "target": "a photo of a car"}
    rows = [{**row, "name": "plain"}, {**row, "name": "masked", "options": {"mask": "mask.png"}}]
    rows += [
        {**row, "name": "own", "method": "my_batched_edit:Edit"},
        {**row, "name": "none", "method": "no_such:Edit"},
    ]
    jobs = written(tmp_path / "jobs.jsonl", rows)

    def units():
        request = BatchRequest(jobs=jobs, output=tmp_path / "out", defaults={"model": str(model)})
        return {job.name: unit.digest for group in plan(request).groups for unit in group.units for job in unit.jobs}

    before = units()
    Image.new("L", (64, 64), 0).save(tmp_path / "mask.png")
    (tmp_path / "my_batched_edit.py").write_text(code + "    # another\n")
    after = units()
    assert {name for name in before if before[name] != after[name]} == {"masked", "own"}


def test_batches_of_two_lists_in_one_folder_at_once_keep_each_others_lines(tmp_path):
    def planned(name):
        jobs = written(tmp_path / f"{name}.jsonl", [{"name": name, "source": name, "target": "a car"}])
        return plan(BatchRequest(jobs=jobs, output=tmp_path / "out"))

    def keep(one):
        (group,) = one.groups
        one.results.keep(group, group.units[0], making.Made(group.jobs[0].name, b"a picture", "", {}))
        one.results.close()

    first, second = planned("first"), planned("second")
    keep(second)
    keep(first)
    assert {line["job"] for line in manifest(tmp_path / "out")} == {"first", "second"}
    assert planned("second").results.entries.keys() == second.results.entries.keys()


def test_a_batch_that_begins_leaves_what_another_is_writing(tmp_path):
    jobs = written(tmp_path / "jobs.jsonl", [{"source": "a red car", "target": "a car"}])
    request = BatchRequest(jobs=jobs, output=tmp_path / "out")
    folder = tmp_path / "out" / plan(request).groups[0].folder
    with replaced(folder / "0001.png") as partial:
        partial.write_bytes(b"a picture")
        number = f"-{2**31 - 1}."  # of a process that is no more
        (folder / partial.name.replace("0001", "0002").replace(f"-{os.getpid()}.", number)).touch()
        plan(request)
    assert [path.name for path in folder.iterdir()] == ["0001.png"]


class Counted(str):
    """A text that counts how often it is compared with another."""

    compared = 0

    def __eq__(self, other):
        Counted.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_a_line_of_the_manifest_is_not_compared_with_every_job(tmp_path, monkeypatch):
    rows = [{"name": f"job-{number}", "source": "a car", "target": f"a car {number}"} for number in range(200)]
    request = BatchRequest(jobs=written(tmp_path / "jobs.jsonl", rows), output=tmp_path / "out")
    files = [f"{group.folder}/{job.name}.png" for group in plan(request).groups for job in group.jobs]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.jsonl").write_text("\n".join(files))
    read = SimpleNamespace(loads=lambda line: {"file": Counted(line), "unit": "another"})
    monkeypatch.setattr(results, "json", read)
    assert not plan(request).results.entries
    assert 0 < Counted.compared < 10 * len(files)
