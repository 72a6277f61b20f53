"""Lists of edits are read as they are: ours, the paper's, PIE-Bench's; a bad row is one row."""

import json
import unicodedata

import numpy as np
import pytest

from fpe_pipeline.batches.job_files import read_jobs
from fpe_pipeline.batches.jobs import BadRow, Job
from fpe_pipeline.batches.masks import from_runs, mask_for
from fpe_pipeline.errors import InputError

SOURCE, TARGET, OTHER = "a red car", "a blue car", "a green car"


def written(folder, name, content):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def read(folder, name, content, **defaults):
    return read_jobs(written(folder, name, content), defaults)


def prompts(entries):
    return [(entry.name, entry.settings.source, entry.target) for entry in entries]


class TestOurs:
    def test_lines_with_settings_of_their_own(self, tmp_path):
        rows = [
            {"name": "blue", "source": SOURCE, "target": TARGET, "seed": 3, "self_replace": 0.5, "kind": "colour"},
            {"source": SOURCE, "targets": [TARGET, OTHER], "guidance": 5, "size": "64x128"},
        ]
        text = "\n".join(map(json.dumps, rows)) + "\n\n"
        blue, first, second = read(tmp_path, "jobs.jsonl", text, steps=4, seed=1)
        assert (blue.name, blue.kind, blue.settings.seed, blue.settings.steps) == ("blue", "colour", 3, 4)
        assert blue.settings.self_replace == (0.0, 0.5) and not blue.settings.control
        assert [first.name, second.name] == ["0002-1", "0002-2"] and (first.settings.seed, second.target) == (1, OTHER)
        assert first.settings.guidance == 5.0 and first.settings.size == (64, 128)

    def test_files_of_options_lie_where_the_masks_of_rows_do(self, tmp_path):
        row = {"source": SOURCE, "target": TARGET, "mask": "m.png", "options": {"mask": "m.png", "alpha": 1}}
        jobs = read(tmp_path, "jobs.json", [row, {**row, "mask": None, "options": {"mask": [1]}}], method="consistedit")
        assert jobs[0].settings.options == {"mask": jobs[0].mask, "alpha": 1}
        assert jobs[0].mask == str(tmp_path / "m.png") and jobs[1].settings.options == {"mask": [1]}

    def test_a_picture_in_the_home_folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        (job,) = read(tmp_path, "jobs.jsonl", json.dumps({"image": "~/a.png", "target": TARGET}))
        assert job.settings.image == str(tmp_path / "home" / "a.png")

    def test_options_of_a_row_join_those_of_all_rows(self, tmp_path):
        """Of the same method: what another one has, nobody said."""
        row = {"source": SOURCE, "target": TARGET}
        own = {"options": {"start_layer": 4}}
        rows = [row, {**row, **own}, {**row, "options": {"start_step": 1}}, {**row, "method": "masactrl", **own}]
        jobs = read(
            tmp_path, "jobs.json", [*rows, {**row, "method": "pnp"}], method="masactrl", options={"start_step": 3}
        )
        joined = {"start_step": 3, "start_layer": 4}
        assert [job.settings.options for job in jobs] == [{"start_step": 3}, joined, {"start_step": 1}, joined, {}]

    @pytest.mark.parametrize("own", [{"layers": ("up_blocks.1",)}, {"max_tokens": 64}, {"levels": (0,)}])
    def test_a_choice_of_layers_takes_the_place_of_that_of_all_rows(self, tmp_path, own):
        """As in `fpe edit --from`: the row was refused for having said two."""
        row = {"source": SOURCE, "target": TARGET}
        changed, usual = read(tmp_path, "jobs.json", [{**row, **own}, row], levels=(1,))
        chosen = {name: getattr(changed.settings, name) for name in ("levels", "max_tokens", "layers")}
        assert {name: value for name, value in chosen.items() if value is not None} == own
        assert changed.settings.edit() is not None and usual.settings.levels == (1,)

    @pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85"])
    def test_a_line_ends_where_json_lines_do(self, tmp_path, mark):
        """Other programs write such characters of a prompt as they are."""
        rows = [{"source": SOURCE, "target": f"{TARGET}{mark}on grass"}, {"source": SOURCE, "target": OTHER}]
        text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        first, second = read(tmp_path, "jobs.jsonl", text)
        assert (first.target, second.target) == (f"{TARGET}{mark}on grass", OTHER)

    @pytest.mark.parametrize("name", ["jobs.json", "jobs.yaml", "jobs.csv", "jobs.jsonl"])
    def test_every_format_says_the_same(self, tmp_path, name):
        rows = [{"source": SOURCE, "target": TARGET, "steps": 3, "options": {"start_step": 1}, "method": "masactrl"}]
        content = {
            "jobs.json": json.dumps(rows),
            "jobs.yaml": "- source: a red car\n  target: a blue car\n  steps: 3\n  method: masactrl\n"
            "  options: {start_step: 1}\n",
            "jobs.csv": "source,target,steps,method,options,mask\n"
            'a red car,a blue car,3,masactrl,"{""start_step"": 1}",\n',
            "jobs.jsonl": json.dumps(rows[0]),
        }[name]
        (job,) = read(tmp_path, name, content)
        assert (job.settings.steps, job.settings.options, job.mask) == (3, {"start_step": 1}, None)

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ({"name": "a", "source": SOURCE, "target": TARGET, "kind": "all"}, "kind 'all' stands for other rows"),
            ({"source": SOURCE}, "the target is missing: expected target or target_prompt or edit_prompt"),
            ({"target": TARGET}, "the source is missing"),
            ({"source": SOURCE, "target": TARGET, "sed": 1}, "nothing by the name of sed; did you mean seed?"),
            ({"source": SOURCE, "target": TARGET, "steps": 0}, "steps must be at least 1, got 0"),
            ({"source": SOURCE, "target": 3}, "must be text, got 3"),
            ({"source": SOURCE, "target": TARGET, "edit_prompt": OTHER}, "the target is said twice"),
            ({"source": SOURCE, "target": TARGET, "name": "a/b"}, "the name becomes a file"),
            ({"source": SOURCE, "target": TARGET, "name": "Source"}, "that of a file beside the edits"),
            ({"source": SOURCE, "target": TARGET, "name": "\u0301"}, "expected letters, digits"),
            ({"source": SOURCE, "target": TARGET, "name": "é" * 120}, "expected 200 bytes at most, got 240"),
            ({"source": SOURCE, "target": TARGET, "name": "good"}, "taken by a row before it"),
            ({"image": "https://a.org/b.png", "target": TARGET}, "download the picture and pass its path"),
            ([1], r"expected names with values, got \[1\]"),
            ("}", "no JSON"),
        ],
    )
    def test_a_bad_row_is_that_row_alone(self, tmp_path, row, reason):
        good = {"name": "good", "source": SOURCE, "target": TARGET}
        lines = [json.dumps(good), row if row == "}" else json.dumps(row), json.dumps(good | {"name": "best"})]
        first, bad, last = read(tmp_path, "jobs.jsonl", "\n".join(lines))
        assert isinstance(first, Job) and isinstance(last, Job)
        assert isinstance(bad, BadRow) and bad.name == "row 2"
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(bad.reason)

    def test_one_target_beside_several(self, tmp_path):
        """Neither is dropped; and several that are no list are not said to be missing."""
        rows = [{"source": SOURCE, "target": TARGET, "targets": [OTHER]}, {"source": SOURCE, "targets": TARGET}]
        both, text = read(tmp_path, "jobs.json", rows)
        assert "the target is said twice, as one and as several" in both.reason
        assert f"targets are a list of prompts, got {TARGET!r}" in text.reason

    def test_a_line_that_names_something_twice_is_that_row_alone(self, tmp_path):
        text = '{"source": "s", "target": "t", "target": "u"}\n{"source": "s", "target": "t"}\n'
        bad, good = read(tmp_path, "jobs.jsonl", text)
        assert isinstance(good, Job) and "'target' is named twice" in bad.reason

    def test_a_name_that_the_list_and_the_row_say_otherwise(self, tmp_path):
        row = {"source": SOURCE, "target": TARGET}
        rows = {"a": {**row, "name": "a"}, "b": {**row, "id": "c"}, "3": {**row, "id": 3}}
        same, bad, number = read(tmp_path, "jobs.json", rows)
        assert (same.name, number.name, bad.name) == ("a", "3", "row 2")
        assert "the name is said twice: the list calls the row 'b', the row itself 'c'" in bad.reason

    @pytest.mark.parametrize("name", ["हिन्दी", "e\u0301te\u0301", "q\u0303"])
    def test_letters_with_marks_are_letters(self, tmp_path, name):
        row = {"name": name, "source": SOURCE, "target": TARGET}
        composed = unicodedata.normalize("NFC", name)
        job, again = read(tmp_path, "jobs.json", [row, {**row, "name": composed}])
        assert job.name == composed and "is taken by a row before it" in again.reason

    def test_devices_of_windows_are_no_names(self, tmp_path):
        """Whatever the system: a folder of pictures goes to others."""
        names = ["CON", "nul.old", "Com1", "LPT¹", "con-1", "aux1", "com10"]
        entries = read(tmp_path, "jobs.json", [{"name": name, "source": SOURCE, "target": TARGET} for name in names])
        assert [entry.name for entry in entries if isinstance(entry, Job)] == ["con-1", "aux1", "com10"]
        assert "'nul' is a device on Windows, got 'nul.old'" in entries[1].reason

    def test_zero_is_a_name(self, tmp_path):
        rows = [{"id": number, "source": SOURCE, "target": TARGET} for number in (0, 1)]
        assert [job.name for job in read(tmp_path, "jobs.json", rows)] == ["0", "1"]

    def test_names_that_yaml_merges_are_not_named_twice(self, tmp_path):
        text = "a: &a {source: s, target: t, seed: 1}\nb: {<<: *a, seed: 2}\n"
        assert [job.settings.seed for job in read(tmp_path, "jobs.yaml", text)] == [1, 2]

    def test_a_row_of_a_csv_with_too_many_fields(self, tmp_path):
        good, bad = read(tmp_path, "jobs.csv", "source,target\na,b\na,b,c\n")
        assert isinstance(good, Job) and "number of fields" in bad.reason

    @pytest.mark.parametrize("separator", [",", ";", "\t"])
    def test_a_csv_of_a_spreadsheet(self, tmp_path, separator):
        """Its separator is that of the country, blanks stand around names, and below its rows are blank ones."""
        lines = ["source , target,seed", " a red car,a blue car ,3", ",,", '"a car, parked","a\nboat",', ",,"]
        text = "\r\n".join(lines).replace(",", separator).replace(f"car{separator} parked", "car, parked")
        jobs = read(tmp_path, "jobs.csv", text)
        assert prompts(jobs) == [("0001", SOURCE, TARGET), ("0002", "a car, parked", "a\nboat")]
        assert [job.settings.seed for job in jobs] == [3, 0]

    @pytest.mark.parametrize("encoding", ["utf-16", "cp1252"])
    def test_text_that_is_not_utf8(self, tmp_path, encoding):
        (tmp_path / "jobs.csv").write_bytes("source,target\na café,a bar\n".encode(encoding))
        with pytest.raises(InputError, match=r"no text in UTF-8, from byte \d+ on; save it as UTF-8"):
            read_jobs(tmp_path / "jobs.csv", {})

    @pytest.mark.parametrize(
        ("name", "content", "reason"),
        [
            ("jobs.json", "[]", "asks for nothing"),
            ("jobs.json", "{", "is damaged"),
            ("jobs.json", "3", "got int"),
            ("jobs.json", '{"a": {"source": "s", "target": "t"}, "a": {}}', "'a' is named twice"),
            ("jobs.yaml", "a: {source: s, target: t}\na: {source: s, target: u}\n", "'a' is named twice"),
            ("jobs.csv", "source,target,target\ns,t,u\n", "'target' is named twice: leave one out"),
            ("jobs.txt", "x", "expected a list of edits in .jsonl, .csv, .json or .yaml"),
        ],
    )
    def test_a_file_that_is_no_list(self, tmp_path, name, content, reason):
        with pytest.raises(InputError, match=reason):
            read(tmp_path, name, content)
        with pytest.raises(InputError, match="No such file"):
            read_jobs(tmp_path / "missing.json", {})

    def test_a_picture_is_no_list_in_another_encoding(self, tmp_path):
        (tmp_path / "photo.png").write_bytes(b"\x89PNG")
        for path in (tmp_path / "photo.png", tmp_path):
            with pytest.raises(InputError, match=r"expected a list of edits in \.jsonl, \.csv"):
                read_jobs(path, {})


class TestPublished:
    def test_cars_of_the_paper(self, tmp_path):
        """Both lists: generated pictures have prompts alone, real ones a name."""
        row = {"soure_prompt": "a red car", "edit_prompt": "a green car"}
        assert prompts(read(tmp_path, "Car_fake_edit.json", [row])) == [("0001", "a red car", "a green car")]
        (job,) = read(tmp_path, "Car_real_edit.json", [{"image_name": "000141.jpg", **row}])
        assert job.settings.image == str(tmp_path / "000141.jpg")

    @pytest.mark.parametrize("place", ["n02088364/val_1.JPEG", "val_1.JPEG"])
    def test_pictures_of_imagenet_by_class_folder_or_in_one(self, tmp_path, place):
        picture = tmp_path / "pictures" / place
        picture.parent.mkdir(parents=True)
        picture.touch()
        row = {"image_name": "n02088364/val_1.JPEG", "soure_prompt": "a beagle", "edit_prompt": "a basset"}
        path = written(tmp_path, "ImageNet_real_edit.json", [row])
        (job,) = read_jobs(path, {}, images=tmp_path / "pictures")
        assert job.settings.image == str(picture)

    def test_words_of_imagenet(self, tmp_path):
        """The list that the paper's was made of: its prompt, and the rows of the test."""
        row = {"": "3741", "path": "n1/a.JPEG", "source": "beagle", "source_id": "162", "target": "basset"}
        rows = [row | {"target_id": "1", "is_test": said} for said in ("False", "True")]
        (job,) = read(tmp_path, "ImageNet.json", rows)
        assert (job.settings.source, job.target) == ("a photo of a beagle", "a photo of a basset")

    def test_is_test_as_spreadsheets_write_it(self, tmp_path):
        said = ("True", "TRUE", "1", "FALSE", "0", "yes")
        path = tmp_path / "jobs.csv"
        path.write_text("source,target,is_test\n" + "".join(f"beagle,basset {each},{each}\n" for each in said))
        *jobs, bad = read_jobs(path, {})
        assert [job.target.rpartition(" ")[2] for job in jobs] == ["True", "TRUE", "1"]
        assert "expected true or false, got 'yes'" in bad.reason

    def test_pie_bench(self, tmp_path):
        (tmp_path / "annotation_images").mkdir()
        entry = {
            "image_path": "0_random_140/000000000000.jpg",
            "original_prompt": "a slanted mountain bicycle on the road",
            "editing_prompt": "a slanted [rusty] mountain bicycle on the road",
            "editing_instruction": "Make the frame of the bike rusty",
            "editing_type_id": "0",
            "blended_word": "bicycle bicycle",
            "mask": [513, 2],
        }
        (job,) = read(tmp_path, "mapping_file.json", {"000000000000": entry})
        assert (job.name, job.kind, job.target) == ("000000000000", "0", "a slanted rusty mountain bicycle on the road")
        assert job.settings.image == str(tmp_path / "annotation_images" / entry["image_path"])
        mask = mask_for(job.mask, (512, 512))
        border = np.zeros((512, 512), bool)
        border[[0, -1], :] = border[:, [0, -1]] = True
        assert np.array_equal(np.argwhere(mask & ~border), [[1, 1], [1, 2]]) and mask[border].all()

    @pytest.mark.parametrize("runs", [[1], [512 * 512, 1], [-1, 2], [0, -3], [0.5, 1]])
    def test_masks_that_are_none(self, runs):
        with pytest.raises(InputError, match=r"expected a mask as pairs|has no run of"):
            from_runs(runs)
