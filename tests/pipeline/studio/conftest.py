"""A desk with a model so small that a run takes a second, and one visitor."""

import pytest
from PIL import Image

from fpe_pipeline.studio.desk import Desk
from fpe_pipeline.studio.models import Models
from fpe_pipeline.studio.requests import FIELDS, MOST_OPTIONS, defaults
from tests.support.tiny_cli import OTHER, SOURCE, TARGET, tiny_model_folder


@pytest.fixture(scope="package")
def tiny_folder(tmp_path_factory):
    return str(tiny_model_folder(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="package")
def models(tiny_folder):
    return Models((tiny_folder, "embedded"), device="cpu")


@pytest.fixture
def desk(models, tmp_path):
    return Desk(models, tmp_path / "out")


@pytest.fixture
def visitor(desk):
    return desk.arrive()


@pytest.fixture
def values(tiny_folder):
    """The page's values, in its order, with some of them changed."""

    def changed(options=(), **fields):
        given = defaults((SOURCE, TARGET, OTHER)) | {"steps": 3} | fields
        typed = [*options, *[""] * (MOST_OPTIONS - len(options))]
        return [tiny_folder, *(given[name] for name in FIELDS), *typed]

    return changed


@pytest.fixture
def photo(tmp_path):
    (tmp_path / "sent" / "from").mkdir(parents=True)  # so that it leads to no folder that other tests share
    path = tmp_path / "sent" / "from" / "../../etc" / "passwd.png"
    path.parent.mkdir()
    Image.linear_gradient("L").resize((72, 64)).convert("RGB").save(path)
    return str(path)


def last(generator):
    *_, end = generator
    return end
