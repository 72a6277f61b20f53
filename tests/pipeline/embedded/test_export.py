"""An export: all of it, or what was there before."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from fpe_pipeline.embedded.judge import Judge
from fpe_pipeline.embedded.training import export as exporting
from fpe_pipeline.embedded.training.autoencoder import build_autoencoder
from fpe_pipeline.embedded.training.diffusion import Denoiser, build_text_encoder, build_unet
from fpe_pipeline.embedded.training.tokenizer import build_tokenizer
from fpe_pipeline.embedded.training.whole_model import INDEX, whole_model

_RECORD = {
    "preset": "smoke", "scenes": 1, "latents": 1, "autoencoder_steps": 1, "diffusion_steps": 1, "diffusion_batch": 1,
    "autoencoder_renders": [{"pixels": 64, "steps": 1}],
}  # fmt: skip


def _export(folder, tokenizer, seed):
    torch.manual_seed(seed)
    networks = {
        "vae": build_autoencoder(64, (8, 8, 8)),
        "denoiser": Denoiser(build_unet(16, (32,)), build_text_encoder(tokenizer, 32, 1)),
        "judge": Judge(64, (8, 8)),
    }
    return exporting.export(folder, tokenizer=tokenizer, measurements={"training": _RECORD}, **networks)


def _content(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestExport:
    @pytest.fixture
    def tokenizer(self, tmp_path):
        return build_tokenizer(tmp_path / "tokenizer")

    def test_one_that_is_interrupted_leaves_the_model_before_it(self, tmp_path, tokenizer, monkeypatch):
        folder = tmp_path / "model"
        _export(folder, tokenizer, 0)
        (folder / "notes.txt").write_text("mine")
        before = _content(folder)

        def interrupt(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(exporting, "save_judge", interrupt)
            _export(folder, tokenizer, 1)
        assert _content(folder) == before
        with monkeypatch.context() as patched, pytest.raises(ValueError, match=r"would take [\d,]+ bytes, more than"):
            patched.setattr(exporting, "SIZE_LIMIT", 1000)
            _export(folder, tokenizer, 1)
        assert _content(folder) == before
        _export(folder, tokenizer, 1)
        after = _content(folder)
        assert after.keys() == before.keys()
        assert {str(name) for name in after if "safetensors" in name.suffix and after[name] == before[name]} == set()

    def test_the_first_has_no_index_before_it_has_everything(self, tmp_path, tokenizer, monkeypatch):
        """By which the end of a time box tells whether there is a model."""
        seen = []
        monkeypatch.setattr(exporting, "save_judge", lambda *_: seen.append((tmp_path / "model" / INDEX).exists()))
        _export(tmp_path / "model", tokenizer, 0)
        assert seen == [False] and (tmp_path / "model" / INDEX).is_file()

    def test_what_a_process_that_was_killed_left_is_cleared(self, tmp_path):
        code = (
            "import os, pathlib; from fpe_pipeline.embedded.training.whole_model import whole_model\n"
            f"with whole_model(pathlib.Path({str(tmp_path)!r})) as folder:\n"
            "    (folder / 'half').write_text('of it'); os._exit(9)"
        )
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
        assert not (tmp_path / "half").exists() and list(tmp_path.iterdir())
        with whole_model(tmp_path) as folder:
            (folder / "unet").mkdir()
            (folder / "unet" / "weights").write_text("all of it")
        assert [path.name for path in tmp_path.iterdir()] == ["unet"]
