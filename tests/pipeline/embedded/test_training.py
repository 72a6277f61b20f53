"""Training the embedded model from nothing: loops that resume, steps, graphs, and time that is kept to."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from io import BytesIO
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from fpe_pipeline import endings
from fpe_pipeline.embedded.training.loop import fit
from fpe_pipeline.embedded.training.presets import PRESETS, Fit, Shares
from fpe_pipeline.embedded.training.step import OptimiserStep, Weights
from fpe_pipeline.embedded.training.timebox import GRACE, TimeBox
from fpe_pipeline.embedded.training.train import main, train
from fpe_pipeline.embedded.training.train_flow import main as main_flow


def _with(checkpoint, **changes):
    """A checkpoint's bytes with other entries; without those that are None."""
    saved = {**torch.load(BytesIO(checkpoint), weights_only=True), **changes}
    torch.save({name: value for name, value in saved.items() if value is not None}, file := BytesIO())
    return file.getvalue()


class TestLoop:
    @staticmethod
    def _run(path, **options):
        torch.manual_seed(0)
        module = torch.nn.Linear(4, 1)

        def draw(step, generator):
            return (torch.randn(8, 4, generator=generator),)

        def loss(network, inputs):
            return network(inputs).square().mean(), {}

        done = fit(module, draw, loss, Fit(steps=20, batch=8, ema=0.9), path, seed=1, **options)
        return bool(done), module.state_dict()

    def test_resumed_run_ends_with_the_same_weights(self, tmp_path):
        done, whole = self._run(tmp_path / "whole.pt")
        assert done
        assert self._run(tmp_path / "parts.pt", stop_after=7)[0] is False
        done, resumed = self._run(tmp_path / "parts.pt")
        assert done
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    @pytest.mark.usefixtures("answered_signals")
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    @pytest.mark.parametrize("at", [0, 7, 19])
    def test_an_interrupted_run_loses_no_step(self, tmp_path, monkeypatch, number, at):
        """The signal comes within a step, whose half would be neither in the checkpoint nor made anew."""
        _, whole = self._run(tmp_path / "whole.pt")
        publish, published = Weights.publish, []

        def interrupted(weights):
            publish(weights)
            published.append(None)
            if len(published) == at + 1:
                signal.raise_signal(number)

        monkeypatch.setattr(Weights, "publish", interrupted)
        with pytest.raises(KeyboardInterrupt), endings.orderly():
            self._run(tmp_path / "parts.pt")
        assert len(published) == at + 1
        assert torch.load(tmp_path / "parts.pt", weights_only=True)["step"] == at + 1
        done, resumed = self._run(tmp_path / "parts.pt")
        assert done and len(published) == 20 + 1  # at the load
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    def test_a_finished_training_stays_finished(self, tmp_path):
        _, whole = self._run(tmp_path / "whole.pt", deadline=time.monotonic() + 0.05)
        done, again = self._run(tmp_path / "whole.pt")
        assert done
        assert all(torch.equal(whole[name], again[name]) for name in whole)

    @pytest.mark.parametrize(
        ("damage", "said"),
        [
            (lambda whole: whole[: len(whole) // 2], "PytorchStreamReader failed"),
            (lambda whole: b"", "EOFError"),
            (lambda whole: b"hello", "101"),
            (lambda whole: _with(whole, step=None), "'step'"),
            (lambda whole: _with(whole, values=torch.zeros(1)), "expected 5 parameters, got 1"),  # which would fill all
            (lambda whole: _with(whole, values=torch.zeros(9)), "expected 5 parameters, got 9"),
        ],
    )
    def test_a_checkpoint_that_cannot_be_continued_is_named(self, damage, said, tmp_path):
        path = tmp_path / "parts.pt"
        assert self._run(path, stop_after=7)[0] is False
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(ValueError, match=r"is damaged or of another network: .*; delete it to train") as refused:
            self._run(path)
        assert str(path) in str(refused.value) and said in str(refused.value)

    def test_a_deadline_ends_a_run_with_its_learning_rate_at_the_end(self, tmp_path):
        module, rates = torch.nn.Linear(4, 1), []

        class Schedule(Fit):
            def rate(self, step, progress):
                rates.append(super().rate(step, progress))
                return rates[-1]

        def draw(step, generator):
            time.sleep(0.002)
            return (torch.randn(8, 4, generator=generator),)

        begun = time.monotonic()
        settings = Schedule(steps=10**6, batch=8, warmup=1, tail=0.5)
        done = fit(
            module, draw, lambda network, x: (network(x).square().mean(), {}), settings, None, deadline=begun + 1
        )
        assert done and done.steps < 10**6
        assert 1 <= time.monotonic() - begun < 2
        assert rates[0] == settings.learning_rate and rates[-1] < 0.1 * settings.learning_rate

    @pytest.mark.parametrize("given", [{}, {"stop_after": 40}, {"stop_after": 3}])
    def test_a_loss_that_is_lost_ends_a_training_and_keeps_the_checkpoint(self, given, tmp_path):
        """Single steps that are not finite are left out; a training of nothing else ended as if it had learnt."""
        path, broken = tmp_path / "unet.pt", set()

        def loss(network, inputs):
            return network(inputs).square().mean() * (float("nan") if next(steps) in broken else 1.0), {}

        def go_on(**options):
            module, settings = torch.nn.Linear(4, 1), Fit(steps=80, batch=8, ema=0.9)
            return fit(module, lambda step, generator: (torch.ones(8, 4),), loss, settings, path, **options)

        steps, broken = iter(range(100)), {3, 5, 6}
        assert not go_on(stop_after=10)
        before = path.read_bytes()
        steps, broken = iter(range(10, 100)), set(range(10, 100))
        with pytest.raises(FloatingPointError, match=r"unet: the loss.* since step 10, .*unet.pt' is of before"):
            go_on(**given)
        assert path.read_bytes() == before

    def test_clock_ends_a_run(self):
        settings = Fit(steps=100, batch=1, max_minutes=2.0, tail=0.5)
        assert settings.progress(10, 0.0) == 0.1
        assert settings.progress(10, 1.0) == 0.5
        assert settings.progress(10, 3.0) == 1.0
        assert settings.rate(99, 1.0) == pytest.approx(0.0)


class TestStep:
    @staticmethod
    def _network():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.SiLU(), torch.nn.Conv2d(8, 2, 3), torch.nn.Flatten(1)
        )

    @staticmethod
    def _loss(network, inputs):
        dtype = next(network.parameters()).dtype
        return 10 * (network(inputs.to(dtype)).float() - 1).square().mean(), {"mean": inputs.mean()}

    def _train(self, steps, **options):
        weights = Weights(self._network(), **options)
        optimiser = OptimiserStep(weights, self._loss, weight_decay=0.1, clip=0.5)
        losses = []
        for step in range(steps):
            inputs = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(step))
            optimiser(step, (inputs,), 0.01, 0.5)
            losses.append(optimiser.figures()["loss"])
        return weights, losses

    def test_is_that_of_torch(self):
        module, average = self._network(), None
        optimiser = torch.optim.AdamW(module.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
        for step in range(12):
            inputs = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(step))
            optimiser.zero_grad()
            self._loss(module, inputs)[0].backward()
            assert torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5) > 0.5  # clipping is at work
            optimiser.step()
            flat = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
            average = 0.5 * (self._start() if average is None else average) + 0.5 * flat
        weights, _ = self._train(12)
        assert torch.allclose(weights.values, flat, rtol=1e-4, atol=1e-6)
        assert torch.allclose(weights.average, average, rtol=1e-4, atol=1e-6)

    def _start(self):
        return torch.cat([parameter.detach().flatten() for parameter in self._network().parameters()])

    def test_a_bfloat16_copy_computes_and_float32_learns(self):
        weights, losses = self._train(60, half=True)
        exact, expected = self._train(60)
        assert {parameter.dtype for parameter in weights.network.parameters()} == {torch.bfloat16}
        assert {parameter.dtype for parameter in weights.module.parameters()} == {torch.float32}
        assert losses[-1] < 0.5 * losses[0]
        assert losses == pytest.approx(expected, rel=0.1, abs=0.01 * expected[0])
        # A convolution lies in channels-last layout in both, and in the common one in what is handed on.
        assert weights.network[0].weight.is_contiguous(memory_format=torch.channels_last)
        found, wanted = weights.averaged(), exact.averaged()
        for a, b in zip(found.parameters(), wanted.parameters(), strict=True):
            assert a.is_contiguous()
            assert torch.allclose(a, b, atol=0.1)
        assert torch.equal(weights.network[0].weight, weights.module[0].weight.to(torch.bfloat16))
        weights.finish()
        assert all(torch.equal(a, b) for a, b in zip(weights.module.parameters(), found.parameters(), strict=True))

    @pytest.mark.parametrize("half", [True, False])
    def test_a_checkpoint_goes_on_where_networks_have_another_layout(self, half):
        """Convolutions lie in channels-last layout in what a CUDA device writes, and in the common one on a CPU."""
        written, _ = self._train(3, half=half)
        read = Weights(self._network(), half=not half)
        read.load_state(
            {name: value.clone() if torch.is_tensor(value) else value for name, value in written.state().items()}
        )
        assert read.network[0].weight.dtype == (torch.float32 if half else torch.bfloat16)
        pairs = zip(written.module.parameters(), read.module.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        pairs = zip(written.averaged().parameters(), read.averaged().parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)

    def test_a_gradient_that_is_not_finite_changes_nothing_but_the_decay(self):
        weights = Weights(self._network())
        before = weights.values.clone()

        def loss(network, inputs):
            return self._loss(network, inputs)[0] * float("nan"), {}

        OptimiserStep(weights, loss, weight_decay=0.1, clip=1.0)(0, (torch.randn(2, 3, 8, 8),), 0.01, 0.5)
        assert torch.allclose(weights.values, before * (1 - 0.01 * 0.1))


class _StandInGraph:
    """What a CUDA graph does, on a CPU: a capture changes nothing, a replay computes with what the buffers hold."""

    def __init__(self):
        self.captured = None

    def replay(self):
        self.captured()


class TestGraph:
    @pytest.fixture
    def cuda(self, monkeypatch):
        """CUDA's streams and graphs without a device; whatever is computed in a capture is undone."""

        @contextmanager
        def capture(graph, stream, capture_error_mode):
            step = self.step
            kept = {name: value.clone() for name, value in vars(step._weights).items() if torch.is_tensor(value)}
            graph.captured = step._compute
            yield
            for name, value in kept.items():
                getattr(step._weights, name).copy_(value)
            if self.refuses:
                raise RuntimeError("operation not permitted when stream is capturing\nand so on")

        stream = SimpleNamespace(wait_stream=lambda other: None)
        stand_ins = {"Stream": lambda: stream, "current_stream": lambda: stream, "synchronize": lambda: None}
        stand_ins |= {"stream": lambda stream: nullcontext(), "graph": capture, "CUDAGraph": _StandInGraph}
        for name, stand_in in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        self.refuses = False

    def _train(self, half, on_cuda):
        self.step = step = OptimiserStep(Weights(TestStep._network(), half=half), TestStep._loss, 0.1, 0.5)
        if on_cuda:
            step._cuda, step._capturable, step._stream = True, True, torch.cuda.Stream()
        losses = []
        for index in range(8):
            inputs = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(index))
            step(index, (inputs,), 0.01 * (index + 1), 0.5)
            inputs.zero_()  # a graph reads buffers of its own
            losses.append(step.figures()["loss"])
        return losses, step._weights.average

    @pytest.mark.parametrize("half", [False, True])
    def test_a_graph_takes_the_same_steps(self, cuda, half):
        losses, average = self._train(half, on_cuda=False)
        graphed, found = self._train(half, on_cuda=True)
        assert self.step.graphed
        assert graphed == losses and torch.equal(found, average)

    def test_a_refused_capture_is_told_and_goes_on_without(self, cuda, caplog):
        losses, average = self._train(True, on_cuda=False)
        self.refuses = True
        with caplog.at_level(logging.WARNING):
            eager, found = self._train(True, on_cuda=True)
        assert not self.step.graphed
        assert [r.getMessage() for r in caplog.records] == [
            "no CUDA graph of the step, it runs eagerly and slower: operation not permitted when stream is capturing"
        ]
        assert eager == losses and torch.equal(found, average)


class TestTimeBox:
    def test_guard_ends_what_does_not_end(self, tmp_path):
        code = (
            "import logging, pathlib, time; from fpe_pipeline.embedded.training.timebox import TimeBox;"
            "logging.basicConfig();"
            f"TimeBox(0.005).guard(0.2, pathlib.Path({str(tmp_path)!r})); time.sleep(60)"
        )
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
        assert ended.returncode == 3 and "no model in" in ended.stderr
        (tmp_path / "model_index.json").write_text("{}")
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
        assert ended.returncode == 0 and "is whole" in ended.stderr

    @pytest.mark.slow
    def test_training_keeps_to_it_and_leaves_pictures_and_figures(self, tmp_path):
        box, report = TimeBox(0.6), tmp_path / "report"
        fits = ("autoencoder", "judge", "text", "diffusion")
        endless = {name: replace(getattr(PRESETS["smoke"], name), steps=10**6) for name in fits}
        preset = replace(PRESETS["smoke"], **endless, edits=0, shares=Shares(review=0.7))
        figures = train(preset, tmp_path, tmp_path / "model", report=report, box=box)
        assert box.left > -GRACE
        metrics = json.loads((report / "metrics.json").read_text())
        assert metrics["training"] == figures["training"] and figures["training"]["max_minutes"] == 0.6
        assert set(metrics["networks"]) == set(fits)
        assert all(metrics["networks"][name]["steps"] < 10**6 for name in fits)
        with Image.open(report / "contact_sheet.png") as sheet, Image.open(report / "samples.png") as grid:
            assert min(sheet.size) > 500 and grid.size == (5 * 64, 8 * 64)
        assert "--max-minutes 0.6`" in (tmp_path / "model" / "MODEL_CARD.md").read_text()


class TestTraining:
    @pytest.mark.slow
    def test_smoke_preset_trains_resumes_and_exports(self, tmp_path):
        from diffusers import StableDiffusionPipeline

        preset = PRESETS["smoke"]
        figures = train(preset, tmp_path / "whole", tmp_path / "whole" / "model")
        assert not (tmp_path / "whole" / "report").exists()
        assert set(figures) == {"training", "autoencoder", "judge", "generated"}
        for _ in range(8):  # each call stops in the middle of one of the three networks
            resumed = train(preset, tmp_path / "parts", tmp_path / "parts" / "model", stop_after=3)
            if resumed is not None:
                break
        assert resumed is not None
        for name in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "judge.safetensors"):
            whole, parts = (tmp_path / run / "model" / name for run in ("whole", "parts"))
            assert whole.read_bytes() == parts.read_bytes(), name
        pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "whole" / "model")
        pipe.set_progress_bar_config(disable=True)
        assert pipe("a photo of a red car on the beach", num_inference_steps=2).images[0].size == (64, 64)
        card = (tmp_path / "whole" / "model" / "MODEL_CARD.md").read_text()
        assert f"{figures['autoencoder']['psnr']:.4g}" in card
        assert "--preset smoke`.\n" in card

    @pytest.mark.parametrize("command", [main, main_flow])
    @pytest.mark.parametrize(
        ("option", "given", "expected"),
        [
            ("--max-minutes", "nan", "expected minutes above 0, got nan"),  # which set no limit
            ("--max-minutes", "0", "expected minutes above 0, got 0"),
            ("--max-minutes", "-1", "expected minutes above 0, got -1"),
            ("--seed", "-1", "expected a whole number from 0 to 4294967295, got -1"),
            ("--threads", "0", "expected a whole number above 0, got 0"),
            ("--device", "mps", "expected cpu or cuda, got mps"),
        ],
    )
    def test_refuses_on_the_command_line(self, command, option, given, expected, capsys, monkeypatch, tmp_path):
        for module in ("train", "train_flow"):
            monkeypatch.setattr(f"fpe_pipeline.embedded.training.{module}.train", lambda *_, **__: None)
        with pytest.raises(SystemExit) as left:
            command(["--preset", "smoke", "--work", str(tmp_path), f"{option}={given}"])
        assert left.value.code == 2 and f"argument {option}: {expected}" in capsys.readouterr().err

    def test_gpu_preset_without_a_gpu_says_so(self, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit):
            main(["--preset", "gpu"])
        assert "no CUDA device" in capsys.readouterr().err
