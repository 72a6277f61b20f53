"""A mask that an option names: a record finds it from every folder, and says where it is another one by now."""

import json

import pytest
from PIL import Image

from fpe_pipeline.app import cli
from fpe_pipeline.errors import InputError
from fpe_pipeline.runs.option_files import check_option_files, option_files, with_places
from fpe_pipeline.runs.settings import Settings
from tests.support.tiny_cli import one_error, tiny_model_folder


def drawn(path, grey):
    Image.new("L", (64, 64), grey).save(path)
    return str(path)


def test_a_run_is_repeated_from_another_folder_by_the_mask_that_it_had(tmp_path, monkeypatch, capsys):
    (tmp_path / "other").mkdir()
    drawn(tmp_path / "mask.png", 255)
    drawn(tmp_path / "other" / "mask.png", 0)
    model = tiny_model_folder(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    asked = [
        "--source",
        "a red car",
        "--target",
        "a car",
        "--model",
        str(model),
        "--steps",
        "1",
        "--quiet",
        "-o",
        "out",
    ]
    assert cli.main(["edit", *asked, "--no-control", "--option", "mask=mask.png"]) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["settings"]["options"] == {"mask": str((tmp_path / "mask.png").resolve())}
    monkeypatch.chdir(tmp_path / "other")
    capsys.readouterr()
    assert cli.main(["edit", "--from", "../out/target-1.png", "--quiet"]) == 0
    assert "bit for bit" in capsys.readouterr().err
    drawn(tmp_path / "mask.png", 0)
    assert cli.main(["edit", "--from", "../out/run.json", "--seed", "1", "--quiet"]) == 2
    assert "the option mask is not the one of the record" in one_error(capsys)


def test_what_is_no_file_stays_as_it_is(tmp_path):
    mask = drawn(tmp_path / "mask.png", 255)
    for options in ({"mask": "x" * 5000}, {"mask": "a\0b"}, {"mask": str(tmp_path)}, {"mask": [1]}, {"word": mask}):
        assert with_places(options) == options and option_files(options) == {}


@pytest.mark.parametrize("damaged", [None, [], {"mask": 3}])
def test_a_record_that_was_written_by_hand_is_no_crash(tmp_path, damaged):
    settings = Settings("a", ("b",), options={"mask": drawn(tmp_path / "mask.png", 255)})
    record = {"files": damaged}
    if damaged:
        with pytest.raises(InputError, match="mask"):
            check_option_files(settings, record)
    else:
        check_option_files(settings, record)
