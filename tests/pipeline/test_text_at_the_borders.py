"""Text that the system cannot encode costs no work: names, prompts and outputs."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from fpe_pipeline import FreePromptPipeline
from fpe_pipeline.app.cli import main
from fpe_pipeline.batches.summary import Line, write_summary
from fpe_pipeline.errors import InputError
from tests.support.silent import SOURCE, TARGET, embedded

NOT_UTF8 = "r\udce9d"  # how Python spells the byte 0xe9 of a Latin-1 command line
FAST = ["--steps", "1", "--size", "16x16", "--self-replace", "1", "--no-control", "--quiet"]


@pytest.fixture
def no_model(monkeypatch):
    """Fails a test that reads weights."""

    def load(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr("fpe_pipeline.runs.run.load_pipeline", load)


def latin(folder, name):
    return os.fsdecode(os.path.join(os.fsencode(folder), name))


@pytest.mark.slow
def test_a_picture_whose_name_is_no_utf8(tmp_path):
    path, out, again = (latin(tmp_path, name) for name in (b"caf\xe9.png", b"o\xfct", b"again"))
    Image.new("RGB", (80, 80), (200, 30, 30)).save(path)
    options = ["--image", path, "--source", SOURCE, "--target", TARGET, "--steps", "1", "--self-replace", "1"]
    assert main(["edit", *options, "--no-control", "--quiet", "-o", out]) == 0
    record = json.loads(Path(out, "run.json").read_bytes())
    assert record["settings"]["image"] == path
    assert main(["edit", "--from", os.path.join(out, "run.json"), "--quiet", "-o", again]) == 0
    made = [json.loads(Path(folder, "run.json").read_bytes())["images"] for folder in (out, again)]
    assert made[0] == made[1]


@pytest.mark.parametrize(
    "options",
    [
        ["--source", f"a {NOT_UTF8} car", "--target", TARGET],
        ["--source", SOURCE, "--target", f"a {NOT_UTF8} car"],
        ["--source", SOURCE, "--target", TARGET, "--negative", NOT_UTF8],
        ["--source", SOURCE, "--target", TARGET, "--model", f"/{NOT_UTF8}"],
    ],
    ids=["source", "target", "negative", "model"],
)
def test_prompts_and_models_are_refused_before_weights_are_read(tmp_path, capfd, no_model, monkeypatch, options):
    if "--model" in options:
        monkeypatch.setattr(Path, "is_dir", lambda self: True)
    assert main(["edit", *options, "-o", str(tmp_path / "out")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "UTF-8" in line
    assert not (tmp_path / "out").exists()


def test_prompts_are_refused_before_denoising(tmp_path):
    pipe = embedded(FreePromptPipeline)
    calls = []
    pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(None))
    for call in (
        lambda: pipe(NOT_UTF8, TARGET),
        lambda: pipe(SOURCE, [TARGET, NOT_UTF8]),
        lambda: pipe(SOURCE, TARGET, negative_prompt=NOT_UTF8),
        lambda: pipe.record(NOT_UTF8),
        lambda: pipe.invert(Image.new("RGB", (80, 80)), NOT_UTF8),
    ):
        with pytest.raises(ValueError, match=r"is no text in UTF-8: it holds '\\udce9' at character 1"):
            call()
    assert not calls


def test_a_recording_goes_where_it_can_be_read(tmp_path):
    """The library that maps tensor files takes no such name: said before the source is denoised, not after."""
    pipe = embedded(FreePromptPipeline)
    calls = []
    pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(None))
    with pytest.raises(InputError, match="has a name that is no UTF-8"):
        pipe.record(SOURCE, placement=Path(latin(tmp_path, b"caf\xe9")), num_inference_steps=1)
    assert not calls
    assert not list(tmp_path.iterdir())


def run_fpe(*arguments, encoding):
    code = "import sys; from fpe_pipeline.app.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, check=False)


SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    "encoding", ["ascii", pytest.param("latin-1", marks=SLOW), pytest.param("cp1252:strict", marks=SLOW)]
)
def test_paths_that_standard_output_cannot_spell(tmp_path, encoding):
    out = tmp_path / "вывод"
    done = run_fpe("edit", "--source", SOURCE, "--target", TARGET, *FAST, "-o", str(out), encoding=encoding)
    assert done.returncode == 0, done.stderr
    printed = [Path(os.fsdecode(line)) for line in done.stdout.splitlines()]
    assert sorted(printed) == sorted(out.iterdir())


@pytest.mark.slow
def test_paths_with_bytes_of_another_encoding(tmp_path):
    out = latin(tmp_path, b"o\xfct")
    done = run_fpe("edit", "--source", SOURCE, "--target", TARGET, *FAST, "-o", out, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert sorted(os.fsdecode(line) for line in done.stdout.splitlines()) == sorted(
        os.path.join(out, name) for name in os.listdir(out)
    )


def test_an_error_that_names_such_a_path(tmp_path):
    done = run_fpe("edit", "--from", str(tmp_path / "вывод.json"), encoding="ascii:strict")
    assert done.returncode == 2
    assert "вывод.json".encode() in done.stderr or b"\\u0432" in done.stderr


def test_the_table_of_an_evaluation(monkeypatch):
    """Tables hold signs such as ± that not every output has."""
    from fpe_pipeline.texts import print_text

    for encoding in ("ascii", "cp1252"):
        output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        print_text("| 0.5 ± 0.1 | ≥ 1 |", output)
        output.flush()
        assert output.buffer.getvalue().count(b"\n") == 1


def test_words_of_a_prompts_file_are_checked_before_anything_is_computed(tmp_path):
    from fpe_pipeline.quality.methods.image_folder import folder_subjects

    Image.new("RGB", (80, 80)).save(tmp_path / "one.png")
    entry = {"image": "one.png", "source": SOURCE, "target": f"a {NOT_UTF8} car"}
    (tmp_path / "prompts.json").write_text(json.dumps([entry]), encoding="utf-8")
    with pytest.raises(InputError, match="target is no text in UTF-8"):
        folder_subjects(tmp_path)


def test_what_stands_in_a_table_ends_no_cell(tmp_path):
    """Such as a kind of edits that is called so, or the reason why one failed."""
    lines = [Line("a", kind="car|boat"), Line("b", kind="two\nlines"), Line("c", failed="bfloat16 | float16")]
    write_summary(tmp_path, lines)
    table = [line for line in (tmp_path / "summary.md").read_text().splitlines() if line.startswith("|")]
    assert [line.replace(r"\|", "").count("|") for line in table] == 8 * [3]
    assert r"car\|boat" in table[2] and "two lines" in table[3]
