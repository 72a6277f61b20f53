"""Recordings: the same edits without the source, wherever the maps are kept, and nothing half-read."""

import copy
from typing import ClassVar

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from safetensors import safe_open

from fpe_kernels import AttentionMap
from fpe_pipeline import Recording, ddim_scheduler, make_edit
from fpe_pipeline.errors import InputError
from fpe_pipeline.recordings.folder_store import FileStore
from fpe_pipeline.recordings.keys import Part, TensorKey
from fpe_pipeline.recordings.precision import PRECISIONS, pack
from fpe_pipeline.recordings.record_run import estimate
from fpe_pipeline.recordings.store import MemoryStore
from fpe_pipeline.session.layers.known_rows import unpack
from tests.support.free_prompt_pipelines import OTHER, SOURCE, TARGET, distance, free_prompt_pipeline, noise

STEPS = 4
RUN = {"num_inference_steps": STEPS, "latents": noise()}


@pytest.fixture(scope="module")
def tiny(pipe):
    tiny = free_prompt_pipeline(pipe)
    tiny.scheduler = ddim_scheduler(tiny.scheduler)
    return tiny


@pytest.fixture(scope="module")
def full(tiny):
    return tiny(SOURCE, [TARGET, OTHER], output_type="latent", **RUN)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("recordings") / "source"
    tiny.record(SOURCE, placement=path, **RUN)
    return path


def targets(tiny, recorded, prompts=(TARGET, OTHER), **options):
    return tiny.edit(recorded, list(prompts), output_type="latent", **options).images


class TestSameImages:
    @pytest.mark.parametrize("placement", ["device", "cpu", "folder"])
    @pytest.mark.parametrize("guidance", [7.5, pytest.param(1.0, marks=pytest.mark.slow)])
    def test_as_with_the_source(self, tiny, full, tmp_path, placement, guidance):
        where = tmp_path / "recording" if placement == "folder" else placement
        recorded = tiny.record(SOURCE, placement=where, guidance_scale=guidance, negative_prompt="cars", **RUN)
        if placement == "folder":
            recorded = Recording.load(where)
        options = {"guidance_scale": guidance, "negative_prompt": "cars", "output_type": "latent", **RUN}
        expected = tiny(SOURCE, [TARGET, OTHER], **options).images
        assert recorded.error == 0
        assert distance(recorded.latents[-1], expected[:1]) <= 1e-4
        assert distance(targets(tiny, recorded), expected[1:]) <= 1e-4
        assert distance(targets(tiny, recorded, [OTHER]), expected[2:]) <= 1e-4
        plain = tiny(SOURCE, [TARGET, OTHER], self_replace_steps=0, **options).images
        assert distance(expected[1:], plain[1:]) > 1e-2

    def test_schedulers_that_call_the_unet_more_often(self, tiny, monkeypatch):
        monkeypatch.setattr(tiny, "scheduler", PNDMScheduler.from_config(tiny.scheduler.config, skip_prk_steps=True))
        expected = tiny(SOURCE, TARGET, output_type="latent", **RUN).images[1:]
        recorded = tiny.record(SOURCE, **RUN)
        assert recorded.schedule.steps == recorded.steps + 1
        assert distance(targets(tiny, recorded, [TARGET]), expected) <= 1e-5 * expected.abs().max()

    def test_the_source_does_not_run(self, tiny, folder):
        rows = []
        hook = tiny.unet.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[0]))
        try:
            targets(tiny, Recording.load(folder), [TARGET])
        finally:
            hook.remove()
        assert rows == [2] * STEPS

    def test_fewer_steps_than_were_recorded(self, tiny, folder):
        recorded = Recording.load(folder)
        expected = tiny(SOURCE, TARGET, self_replace_steps=(0.25, 0.5), output_type="latent", **RUN).images[1:]
        assert distance(targets(tiny, recorded, [TARGET], self_replace_steps=(0.25, 0.5)), expected) <= 1e-4
        assert distance(targets(tiny, recorded, [TARGET]), expected) > 1e-3

    @pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
    def test_other_samplers(self, tiny, monkeypatch, scheduler):
        monkeypatch.setattr(tiny, "scheduler", scheduler.from_config(tiny.scheduler.config))
        expected = tiny(SOURCE, [TARGET, OTHER], output_type="latent", **RUN).images[1:]
        got = targets(tiny, tiny.record(SOURCE, **RUN))
        assert distance(got, expected) <= 1e-5 * expected.abs().max()

    @pytest.mark.parametrize("method", ["direct", "null-text", "negative-prompt"])
    def test_of_real_images(self, tiny, tmp_path, method):
        photo = torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(0))
        inversion = tiny.invert(photo, SOURCE, num_inference_steps=3, height=24, width=32, method=method)
        expected = tiny(inversion=inversion, target_prompt=[TARGET, OTHER], output_type="latent").images[1:]
        tiny.record(inversion=inversion, placement=tmp_path / "r")
        assert distance(targets(tiny, Recording.load(tmp_path / "r")), expected) <= 1e-4

    @pytest.mark.parametrize("method", ["ddim", "direct", "negative-prompt"])
    def test_latents_are_those_that_the_source_goes_on_from(self, tiny, method):
        photo = torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(0))
        inversion = tiny.invert(photo, SOURCE, num_inference_steps=3, height=24, width=32, method=method)
        seen = []
        hook = tiny.unet.register_forward_pre_hook(lambda module, args: seen.append(args[0][:1].clone()))
        try:
            recorded = tiny.record(inversion=inversion)
        finally:
            hook.remove()
        last = tiny(inversion=inversion, output_type="latent").images
        assert torch.equal(recorded.latents[:-1], torch.stack(seen))
        assert distance(recorded.latents[-1], last) <= 1e-5  # of a run whose layers are diffusers' own

    def test_images_and_processors(self, tiny, folder):
        before = tiny.unet.attn_processors
        out = tiny.edit(Recording.load(folder), TARGET)
        assert out.source is None
        assert out.targets[0].size == (32, 24)
        assert tiny.unet.attn_processors == before


def _layer_of_a_copy(tiny, monkeypatch):
    """A layer whose weights may be changed."""
    monkeypatch.setattr(tiny, "unet", copy.deepcopy(tiny.unet))
    return tiny.unet.up_blocks[1].attentions[1].transformer_blocks[0].attn1


def _scale(projection, factor):
    with torch.no_grad():
        projection.weight.mul_(factor)


class TestPrecision:
    @pytest.mark.parametrize(("precision", "largest"), [("half", 2e-3), ("int8-keys", 3e-2)])
    def test_error_is_measured_and_small(self, tiny, full, precision, largest):
        exact, recorded = tiny.record(SOURCE, **RUN), tiny.record(SOURCE, precision=precision, **RUN)
        assert 0 < recorded.error <= largest
        assert recorded.store.nbytes < exact.store.nbytes
        error = distance(targets(tiny, recorded), full.images[1:])
        assert 1e-6 < error <= 100 * recorded.error

    @pytest.mark.parametrize("precision", ["half", "int8-keys"])
    def test_values_that_do_not_fit(self, tiny, monkeypatch, tmp_path, precision):
        """Queries beyond float16's range, with keys so small that the maps are ordinary."""
        layer = _layer_of_a_copy(tiny, monkeypatch)
        _scale(layer.to_q, 1e7)
        _scale(layer.to_k, 1e-7)
        with pytest.raises(ValueError, match=r"larger in up_blocks.1.attentions.1.* \(up to .*e\+0.\): record .*exact"):
            tiny.record(SOURCE, precision=precision, placement=tmp_path / "r", **RUN)
        assert not (tmp_path / "r").exists()
        expected = tiny(SOURCE, [TARGET, OTHER], output_type="latent", **RUN).images[1:]
        assert distance(targets(tiny, tiny.record(SOURCE, **RUN)), expected) <= 1e-4

    @pytest.mark.parametrize("precision", ["half", "int8-keys"])
    def test_values_that_are_nothing(self, tiny, monkeypatch, precision):
        layer = _layer_of_a_copy(tiny, monkeypatch)
        _scale(layer.to_v, 0)
        assert 0 < tiny.record(SOURCE, precision=precision, **RUN).error <= 3e-2

    @pytest.mark.parametrize("precision", ["half", "int8-keys"])
    def test_values_that_are_no_numbers(self, tiny, monkeypatch, precision):
        layer = _layer_of_a_copy(tiny, monkeypatch)
        _scale(layer.to_q, float("nan"))
        with pytest.raises(ValueError, match=r"up_blocks.1.attentions.1.* \(up to nan\)"):
            tiny.record(SOURCE, precision=precision, **RUN)

    @pytest.mark.parametrize("precision", PRECISIONS)
    def test_the_estimate_is_what_is_kept(self, tiny, precision):
        recorded = tiny.record(SOURCE, precision=precision, **RUN)
        assert estimate(tiny, make_edit("fpe", (), None, tiny), (12, 16), STEPS, precision) == recorded.nbytes
        assert recorded.nbytes == recorded.store.nbytes + recorded.latents.nbytes

    def test_rows_of_rounded_maps_sum_to_one(self):
        query, key = torch.randn(2, 1, 2, 9, 8)
        attention = AttentionMap(query, key)
        for precision in PRECISIONS:
            kept = unpack(pack({"query": query, "key": key}, precision), torch.float32)
            rounded = AttentionMap(kept["query"], kept["key"], scale=attention.scale)
            ones = rounded @ torch.ones(1, 2, 9, 1)
            assert distance(ones, torch.ones_like(ones)) <= 1e-5


class TestBudget:
    def test_the_estimate_is_told(self, tiny, capsys):
        tiny.set_progress_bar_config(disable=False)
        try:
            tiny.record(SOURCE, **RUN)
        finally:
            tiny.set_progress_bar_config(disable=True)
        assert "layers at 3 of 4 steps, exact, placed on device" in capsys.readouterr().err
        tiny.record(SOURCE, **RUN)
        assert capsys.readouterr().err == ""

    def test_one_that_is_too_small(self, tiny, tmp_path, monkeypatch):
        monkeypatch.setattr(tiny.unet, "forward", lambda *a, **k: pytest.fail("denoised before the budget was checked"))
        with pytest.raises(ValueError, match=r"more than budget_bytes=1000 \(0.0 MiB\): raise it"):
            tiny.record(SOURCE, budget_bytes=1000, placement=tmp_path / "r", **RUN)
        assert not (tmp_path / "r").exists()

    @pytest.mark.slow
    def test_everything_counts(self, tiny):
        """Latents and a null-text inversion's embeddings too."""
        photo = torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(0))
        inversion = tiny.invert(photo, SOURCE, num_inference_steps=2, height=24, width=32, method="null-text")
        recorded = tiny.record(inversion=inversion)
        assert recorded.nbytes > recorded.store.nbytes + recorded.latents.nbytes
        assert tiny.record(inversion=inversion, budget_bytes=recorded.nbytes).nbytes == recorded.nbytes
        with pytest.raises(ValueError, match="more than budget_bytes"):
            tiny.record(inversion=inversion, budget_bytes=recorded.nbytes - 1)


class TestStores:
    TENSORS: ClassVar = {
        TensorKey("layer", Part(True, "key")): torch.arange(5, dtype=torch.int8),
        TensorKey("layer", Part(True, "query")): torch.arange(6, dtype=torch.float16).view(2, 3),
        TensorKey("layer", Part(True, "logsumexp")): torch.arange(3, dtype=torch.float64),
    }

    @pytest.mark.parametrize("kind", ["memory", "folder"])
    def test_a_step_is_one_block(self, tmp_path, kind):
        cpu = torch.device("cpu")
        store = MemoryStore(cpu) if kind == "memory" else FileStore.create(tmp_path / "r")
        for step in (2, 3):
            store.write(step, {name: tensor + step for name, tensor in self.TENSORS.items()})
        for step in (2, 3, 2):
            read = store.read(step, cpu)
            assert read.keys() == self.TENSORS.keys()
            assert all(torch.equal(read[name], tensor + step) for name, tensor in self.TENSORS.items())
            assert len({tensor.untyped_storage().data_ptr() for tensor in read.values()}) == 1
        assert store.read(4, cpu) == {}
        store.release()

    def test_keys_are_text_in_files_alone(self, tmp_path):
        store = FileStore.create(tmp_path / "r")
        store.write(0, self.TENSORS)
        with safe_open(tmp_path / "r" / "step-0000.safetensors", "pt") as file:
            assert set(file.keys()) == {
                "layer|conditional key",
                "layer|conditional query",
                "layer|conditional logsumexp",
            }

    @pytest.mark.parametrize("key", [TensorKey("a.b", Part(False, "key_scale")), TensorKey("", Part(True, "feature"))])
    def test_a_key_is_read_as_it_was_written(self, key):
        assert TensorKey.parse(str(key)) == key

    @pytest.mark.parametrize("text", ["", "layer", "layer|query", "layer|unconditional ", "layer|Conditional key"])
    def test_what_is_no_key(self, text):
        with pytest.raises(ValueError, match="expected a part"):
            TensorKey.parse(text)


class TestRefusals:
    def test_another_model(self, tiny, folder):
        recorded = Recording.load(folder)
        weight = tiny.unet.conv_in.weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1.001)
        try:
            with pytest.raises(ValueError, match="the recording is of another model"):
                targets(tiny, recorded)
        finally:
            with torch.no_grad():
                weight.copy_(before)
        assert targets(tiny, recorded).shape[0] == 2

    def test_another_schedule(self, tiny, folder, monkeypatch):
        monkeypatch.setattr(tiny, "scheduler", DDIMScheduler.from_config(tiny.scheduler.config, beta_end=0.013))
        with pytest.raises(ValueError, match="the recording belongs to another noise schedule"):
            targets(tiny, Recording.load(folder))

    def test_more_steps_than_were_recorded(self, tiny, folder):
        with pytest.raises(ValueError, match="asks for steps 0 to 3; the recording holds 0 to 2"):
            targets(tiny, Recording.load(folder), self_replace_steps=1.0)

    def test_noise_in_each_step(self, tiny, monkeypatch):
        monkeypatch.setattr(tiny, "scheduler", EulerAncestralDiscreteScheduler())
        with pytest.raises(ValueError, match="adds noise in each step"):
            tiny.record(SOURCE, **RUN)

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"precision": "int4"}, ValueError, "precision must be one of exact, half, int8-keys"),
            ({"latents": noise(2)}, ValueError, "a recording holds one image"),
            ({"prompt": [SOURCE]}, TypeError, "one source prompt, got list"),
            ({"levels": 9}, ValueError, "match none"),
            ({"num_inference_steps": 0}, ValueError, "a whole number from 1 on, got 0"),
            ({"edit": []}, ValueError, "expected an edit to record for"),
            ({"height": 48, "width": 32}, ValueError, "latents of 12 x 16 make images of 24 x 32 pixels"),
            ({"placement": "gpu"}, ValueError, r"placement must be .* got 'gpu'; .* pass Path\('gpu'\)"),
            ({"placement": "cuda:0"}, ValueError, "placement must be"),
            ({"placement": torch.device("cpu")}, TypeError, "placement must be .* got device"),
            ({"negative_prompt": ["a", "b"]}, TypeError, "one negative prompt, got list"),
            ({"inversion": 3}, TypeError, "what pipe.invert returns as inversion, got int"),
        ],
    )
    def test_of_recording(self, tiny, monkeypatch, tmp_path, options, error, message):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(error, match=message):
            tiny.record(**{"prompt": SOURCE, **RUN, **options})
        assert list(tmp_path.iterdir()) == []

    def test_without_targets(self, tiny, folder):
        with pytest.raises(TypeError, match="one or more target prompts"):
            tiny.edit(Recording.load(folder), [])

    def test_of_something_else(self, tiny, folder, tmp_path):
        with pytest.raises(TypeError, match="what record returned, or its folder, got int"):
            tiny.edit(3, TARGET)
        with pytest.raises(InputError, match="does not exist"):
            tiny.edit(tmp_path / "nothing", TARGET)


def test_a_folder_stands_for_its_recording(tiny, folder):
    expected = targets(tiny, Recording.load(folder))
    assert torch.equal(targets(tiny, folder), expected)
    assert torch.equal(targets(tiny, str(folder)), expected)
