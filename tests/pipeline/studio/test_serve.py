"""The page is built and served: its headers, what it asks the network for, and what the command refuses."""

import re
import socket
import urllib.error
import urllib.request
from unittest import mock

import pytest
from PIL import Image

from fpe_pipeline import extras
from fpe_pipeline.app import cli
from fpe_pipeline.runs import run as runs
from fpe_pipeline.runs.settings import Settings
from fpe_pipeline.studio.desk import Desk
from fpe_pipeline.studio.models import Models
from fpe_pipeline.studio.requests import FIELDS
from fpe_pipeline.studio.serve import HEADERS, serve, until_ended
from tests.support.tiny_cli import SOURCE, TARGET, one_error

pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def address(models, root):
    page = serve(Desk(models, root), block=False)
    yield page.local_url
    page.close()


def answer(url):
    try:
        with urllib.request.urlopen(url) as given:
            return given.status, given.headers, given.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.headers, ""


def test_headers_and_nothing_from_elsewhere(address):
    status, headers, text = answer(address)
    assert status == 200 and address.startswith("http://127.0.0.1:")
    assert all(headers[name] == value for name, value in HEADERS.items())
    fetched = re.findall(r"""<(?:script|link|img|iframe)[^>]*?(?:src|href)=["'](https?://[^"']+)""", text)
    assert [url for url in fetched if not url.startswith(address)] == []
    assert "googleapis" not in text and "gstatic" not in text


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:80", 200), ("127.0.0.1", 200), ("[::1]:7860", 200), ("elsewhere.example:7860", 403), ("[", 403)],
)
def test_a_page_elsewhere_whose_name_leads_here_reads_nothing(address, host, status):
    """A browser takes it for the same site: what is served to this machine alone goes by this machine's names."""
    for path in ("", "config", "gradio_api/info"):
        given, headers, _ = answer(urllib.request.Request(f"{address}{path}", headers={"Host": host}))
        assert given == status and headers["referrer-policy"] == "no-referrer"


def test_only_its_own_output_is_served(address, root, tmp_path):
    own, other = root / "token" / "001" / "target-1.png", tmp_path / "secret.png"
    own.parent.mkdir(parents=True)
    for path in (own, other):
        path.write_bytes(b"\x89PNG")
    assert answer(f"{address}gradio_api/file={own}")[0] == 200
    for path in (other, f"{root}/../{other.parent.name}/{other.name}", "/etc/passwd", "pyproject.toml", root):
        assert answer(f"{address}gradio_api/file={path}")[0] in (403, 404), path


def test_no_page_of_the_interface_is_offered(address):
    for path in ("docs", "redoc", "openapi.json", "monitoring"):
        assert "swagger" not in answer(f"{address}{path}")[2].lower()
    status, _, text = answer(f"{address}gradio_api/info")
    assert status == 404 or '"named_endpoints":{}' in text.replace(" ", "")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "./nothing-here"], "neither a folder nor a file"),
        (["--host", "203.0.113.7"], "cannot listen at 203.0.113.7: "),
        (["--port", "70000"], "cannot listen at"),
        (["--dtype", "int8"], "dtype must be one of"),
    ],
)
def test_refusals(arguments, said, tmp_path, capsys):
    assert cli.main(["app", *arguments, "-o", str(tmp_path)]) == 2
    assert said in one_error(capsys)


@pytest.mark.slow
def test_port_0_is_any_free_one(models, tmp_path):
    page = serve(Desk(models, tmp_path), port=0, block=False)
    try:
        assert answer(page.local_url)[0] == 200 and not page.local_url.endswith(":0/")
    finally:
        page.close()


def test_the_end_of_the_server_removes_what_was_uploaded(desk, photo, capsys):
    visitor, page = desk.arrive(), mock.Mock(is_running=True)
    desk.receive_photo(visitor, photo)
    assert list(desk.root.rglob("upload-*.png"))
    with mock.patch("time.sleep", side_effect=KeyboardInterrupt):  # Ctrl-C, and what SIGTERM becomes
        until_ended(page, desk)
    assert not list(desk.root.rglob("upload-*.png"))
    page.close.assert_called_once_with(verbose=False)
    assert capsys.readouterr() == ("", "")


def test_a_port_that_is_taken(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert cli.main(["app", "--port", str(taken.getsockname()[1]), "-o", str(tmp_path)]) == 2
    assert "pass another --port" in one_error(capsys)


def test_without_gradio_it_says_how_to_get_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(extras, "missing", lambda modules=extras.PIPELINE: [m for m in modules if m == "gradio"])
    assert cli.main(["app", "-o", str(tmp_path)]) == 2
    assert "pip install 'fpe-kernels[app]'" in one_error(capsys)


@pytest.mark.slow
def test_a_picture_of_another_kind_of_model_brings_what_that_one_offers(tmp_path):
    """Gradio refuses the values of fields that do not offer them."""
    from fpe_pipeline.studio.page import build

    desk = Desk(Models(("embedded", "embedded-sd3"), device="cpu"), tmp_path / "out")
    page = build(desk)
    (restored,) = [each.fn for each in page.fns.values() if each.name == "restored"]
    settings = Settings.of_model(source=SOURCE, targets=(TARGET,), model="embedded-sd3", method="consistedit")
    record = {"format": 1, "settings": settings.model_dump(), "model": {"identity_sha256": "0" * 64}, "images": {}}
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=runs.png_info(record, "target-1.png"))
    said, _, model, inversion, *fields = restored(str(tmp_path / "a.png"), "embedded")
    method, layers = (fields[FIELDS.index(name)] for name in ("method", "layers"))
    assert "are in the fields" in said and model == "embedded-sd3" and "reference" in inversion["choices"]
    assert method["value"] == "consistedit" and method["value"] in dict(method["choices"]).values()
    assert any(path.startswith("transformer_blocks.") for _, path in layers["choices"])
    of_a_photo = record["settings"] | {"image": "photo.png", "inversion": "reference"}
    for shown in ("embedded", "embedded-sd3"):
        info = runs.png_info(record | {"settings": of_a_photo}, "target-1.png")
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
        _, _, _, inversion, *_ = restored(str(tmp_path / "a.png"), shown)
        assert (inversion if isinstance(inversion, str) else inversion["value"]) == "reference"
