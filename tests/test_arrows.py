"""No circle of imports in any package, and no arrow but those that are listed here."""

from pathlib import Path

import pytest

from tests.support import arrows

#: By room, the rooms that it may import: of its own package by their last names, of others in full. The list is exact:
#: an arrow that is no longer needed is taken off it.
ALLOWED = {
    "fpe_pipeline.embedded": "",
    "fpe_pipeline.ground": "",
    "fpe_pipeline.images": "ground",
    "fpe_pipeline.models": "embedded ground",
    "fpe_pipeline.models.adapters": "ground models",
    "fpe_pipeline.prompts": "ground",
    "fpe_pipeline.edits": "ground images models models.adapters prompts fpe_kernels",
    "fpe_pipeline.session.layers": "edits models fpe_kernels",
    "fpe_pipeline.session.processors": "edits session.layers fpe_kernels",
    "fpe_pipeline.session": "ground models models.adapters prompts edits session.layers session.processors fpe_kernels",
    "fpe_pipeline.heatmaps": "ground images models models.adapters prompts edits session session.layers fpe_kernels",
    "fpe_pipeline.testing": "embedded models models.adapters edits session fpe_kernels",
    "fpe_pipeline.sampling": "ground images models models.adapters prompts edits session",
    "fpe_pipeline.inversion": "ground images models models.adapters prompts session sampling",
    "fpe_pipeline.recordings": "embedded ground models models.adapters prompts edits session session.layers sampling "
    "inversion fpe_kernels",
    "fpe_pipeline.pipelines": "embedded ground models models.adapters prompts edits session sampling inversion "
    "recordings",
    "fpe_pipeline.compat": "ground images models models.adapters prompts edits session session.layers heatmaps "
    "sampling inversion pipelines fpe_kernels",
    "fpe_pipeline.runs": "ground images models models.adapters edits session heatmaps sampling inversion recordings "
    "pipelines fpe_kernels",
    "fpe_pipeline.quality": "embedded ground images models models.adapters edits session sampling inversion runs "
    "fpe_kernels",
    "fpe_pipeline.studio": "embedded ground images models models.adapters edits session heatmaps sampling runs",
    "fpe_pipeline.batches": "ground images models runs",
    "fpe_pipeline.app": "batches embedded ground images models edits runs quality studio testing fpe_kernels",
    "fpe_pipeline.embedded.training": "embedded ground images quality",
    "fpe_kernels.backends": "ready",
    "fpe_kernels.given": "",
    "fpe_kernels.kept": "",
    "fpe_kernels.partial_softmax": "",
    "fpe_kernels.precision": "",
    "fpe_kernels.ready": "",
    "fpe_kernels.validation": "",
    "fpe_kernels.backends.triton": "backends ready",
    "fpe_kernels.gradient_rules": "backends validation",
    "fpe_kernels.normal_form": "given precision validation",
    "fpe_kernels.pooling": "validation",
    "fpe_kernels.testing": "attention_map backends validation",
    "fpe_kernels.dispatch": "backends backends.triton",
    "fpe_kernels.indices": "validation",
    "fpe_kernels.views": "given precision validation indices pooling",
    "fpe_kernels.softmax_map": "normal_form views",
    "fpe_kernels.ops": "backends partial_softmax precision validation gradient_rules dispatch",
    "fpe_kernels.ranges": "normal_form softmax_map",
    "fpe_kernels.composition": "validation indices normal_form softmax_map ranges views",
    "fpe_kernels.attention_map": "kept precision ready validation indices normal_form dispatch softmax_map ops "
    "composition",
    "fpe_kernels.combining": "validation indices normal_form composition",
    "fpe_kernels.joined_map": "partial_softmax validation indices normal_form softmax_map composition attention_map "
    "combining",
    "fpe_kernels.known_columns": "precision validation indices normal_form composition",
    "fpe_kernels": "dispatch composition attention_map combining joined_map known_columns",
}
FLOORS = {"fpe_pipeline": 14}  # three of them rooms inside of rooms


@pytest.fixture(scope="module")
def drawn():
    return arrows.imports()


def allowed(room: str) -> frozenset[str]:
    package = room.partition(".")[0]
    return frozenset(name if name in arrows.PACKAGES else f"{package}.{name}" for name in ALLOWED[room].split())


def crossed(between: arrows.Arrows) -> list[str]:
    """What is drawn and not listed, and what is listed and not drawn."""
    found = []
    drawn_rooms = {name for name in between if name.partition(".")[0] in LISTED and name not in arrows.TABLES}
    for room in sorted(ALLOWED.keys() | drawn_rooms):
        drawn, listed = between.get(room, frozenset()), allowed(room) if room in ALLOWED else frozenset()
        found += [f"{room} → {target} is not allowed" for target in sorted(drawn - listed)]
        found += [f"{room} → {target} is listed and not needed" for target in sorted(listed - drawn)]
    return found


LISTED = ("fpe_pipeline", "fpe_kernels")


def test_no_circles(drawn):
    assert arrows.circles(drawn) == []
    assert arrows.circles(arrows.rooms(drawn)) == []


def test_every_import_names_a_module():
    assert arrows.astray() == []


def test_an_import_gone_astray_is_seen(tmp_path):
    Path(tmp_path, "fpe_kernels").mkdir()
    Path(tmp_path, "fpe_kernels", "__init__.py").write_text(
        "def late():\n    from .moved import name\n", encoding="utf-8"
    )
    assert arrows.astray(tmp_path, ("fpe_kernels",)) == ["fpe_kernels → fpe_kernels.moved"]


def test_private_names_stay_in_their_module():
    assert arrows.private(packages=LISTED) == []


def test_no_arrow_but_the_listed_ones(drawn):
    assert crossed(arrows.rooms(drawn)) == []


def test_benchmarks_stand_on_top(drawn):
    assert not [name for name in drawn if not name.startswith("benchmarks") and "benchmarks" in str(drawn[name])]


@pytest.mark.parametrize("package", FLOORS)
def test_floors(drawn, package):
    height = arrows.floors(arrows.inside(arrows.rooms(drawn), package))
    assert max(height.values()) <= FLOORS[package]


def test_the_drawing_says_the_same(drawn):
    text = arrows.drawing(drawn, "fpe_pipeline")
    assert text.startswith("fpe_pipeline: ") and "0 circles of modules, 0 circles of rooms" in text
    assert "  app → batches, quality, studio, runs" in text


PLANTED = {
    "at the top": "from ..session.session import editing\n",
    "in a function": "def late():\n    import fpe_pipeline.session.session\n",
    "for types": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..session import session\n",
    "as a string": "import importlib\nimportlib.import_module('fpe_pipeline.session.session')\n",
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_arrow_is_seen(tmp_path, kind):
    for package in LISTED:
        for path in arrows.modules(arrows.ROOT, package).values():
            copy = tmp_path / path.relative_to(arrows.ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    planted = Path(tmp_path, "fpe_pipeline", "models", "roles.py")
    text = planted.read_text(encoding="utf-8")
    planted.write_text(text + PLANTED[kind], encoding="utf-8")
    seen = arrows.imports(tmp_path, LISTED)
    assert "fpe_pipeline.models → fpe_pipeline.session is not allowed" in crossed(arrows.rooms(seen))
    (group,) = (group for group in arrows.circles(seen) if "fpe_pipeline.models.roles" in group)
    assert "fpe_pipeline.session.session" in group
    with pytest.raises(ValueError, match=r"import one another: .*fpe_pipeline\.models\.roles"):
        arrows.floors(seen)
