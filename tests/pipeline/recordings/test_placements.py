"""Edits of inverted images from recordings, wherever those are kept: full runs to rounding, within a byte budget."""

import pytest
import torch

from fpe_pipeline import KVEdit, Recording, ValueInjectionEdit
from tests.support.flow_pipelines import FAMILIES, MADE, OTHER, SOURCE, TARGET, distance, edited_with, solving
from tests.support.slow_cases import few

pytestmark = pytest.mark.usefixtures("in_float64")

EXACT = 1e-8
PLACES = ["device", "cpu", "folder"]
MASK = torch.cat([torch.ones(48, 48), torch.zeros(48, 32)], dim=1)
# By the method, its solver, its edit on each family, and the parts that it needs of a layer.
VALUES = {"image-value", "text-value"}
METHODS = {
    "RF-Solver-Edit": ("rf-solver", lambda layers: ValueInjectionEdit(0.5, layers=layers), VALUES),
    "FireFlow": ("fireflow", lambda layers: ValueInjectionEdit(0.5, layers=layers), VALUES),
    "KV-Edit": ("euler", lambda layers: KVEdit(mask=MASK), {"image-key", "image-value"}),
}
LATE = {"sd3": ["transformer_blocks.1", "transformer_blocks.2"], "flux": ["single_transformer_blocks"]}


@pytest.fixture(scope="module")
def pipes(pipe):
    return {family: edited_with(MADE[family](pipe)) for family in FAMILIES}


@pytest.mark.parametrize("method", few(METHODS))
@pytest.mark.parametrize("family", few(FAMILIES, "flux"))
def test_full_runs_and_budgets(pipes, family, method, tmp_path):
    solver, make, parts = method
    tiny, edit = solving(pipes[family], solver), make(LATE[family])
    photo = torch.rand(3, 48, 80, generator=torch.Generator().manual_seed(3))
    inversion = tiny.invert(photo, SOURCE, num_inference_steps=4, max_sequence_length=12, height=48, width=80)
    options = {"inversion": inversion, "edit": edit, "max_sequence_length": 12}
    full = tiny(target_prompt=[TARGET, OTHER], output_type="latent", **options).images
    sizes = set()
    for place in PLACES:
        where = tmp_path / "kept" if place == "folder" else place
        tight = tiny.record(placement="cpu", **options).nbytes
        with pytest.raises(ValueError, match=f"more than budget_bytes={tight - 1}"):
            tiny.record(placement=where, budget_bytes=tight - 1, **options)
        recording = tiny.record(placement=where, budget_bytes=tight, **options)
        assert {part.name for kept in recording.contents.values() for part in kept} == parts
        if place == "folder":
            recording = Recording.load(where)
            assert recording.nbytes < 1.1 * tight  # with the heads of its files
        else:
            sizes.add(recording.nbytes)
        replayed = tiny.edit(recording, [TARGET, OTHER], edit=edit, output_type="latent").images
        assert distance(replayed, full[1:]) <= EXACT
    assert sizes == {tight}
    plain = tiny(inversion=inversion, target_prompt=TARGET, self_replace_steps=0, max_sequence_length=12,
                 output_type="latent").images  # fmt: skip
    assert distance(full[1], plain[1]) > 1e-5


@pytest.mark.parametrize("place", few(PLACES, "folder"))
def test_a_budget_is_checked_before_anything_runs(pipes, place, tmp_path, monkeypatch):
    tiny = solving(pipes["flux"], "euler")
    monkeypatch.setattr(tiny.transformer, "forward", lambda *args, **kwargs: pytest.fail("the transformer ran"))
    where = tmp_path / "kept" if place == "folder" else place
    with pytest.raises(ValueError, match="more than budget_bytes=1000"):
        tiny.record(SOURCE, placement=where, budget_bytes=1000, num_inference_steps=4, height=48, width=80)
    assert not (tmp_path / "kept").exists()
