"""The layout for Hugging Face's kernel hub: it is loaded from a folder, beside the installed package."""

import ast
import json
import runpy
from pathlib import Path

import pytest
import torch

import fpe_kernels
from integrations.kernels_hub.__main__ import assemble


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return assemble(tmp_path_factory.mktemp("hub") / "kernel")


def test_the_layout(folder):
    variants = sorted(path.name for path in (folder / "build").iterdir())
    assert variants == ["torch-cpu", "torch-cuda", "torch-rocm"]
    identities = set()
    for name in variants:
        metadata = json.loads((folder / "build" / name / "metadata.json").read_text(encoding="utf-8"))
        assert metadata["name"] == "fpe-kernels" and f"torch-{metadata['backend']['type']}" == name
        identities.add(metadata["id"])
    assert len(identities) == len(variants)
    assert (folder / "torch-ext" / "fpe_kernels" / "__init__.py").exists() and (folder / "build.toml").exists()


def test_nothing_of_it_needs_the_installed_package(folder):
    """Imports of its own are relative, and its operators have a namespace of their own."""
    for path in (folder / "build" / "torch-cpu").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "torch.ops.fpe_kernels." not in text and '"fpe_kernels::' not in text and 'Library("fpe_' not in text
        for node in ast.walk(ast.parse(text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not [name for name in names if name.partition(".")[0] == "fpe_kernels"], path


def test_a_folder_that_holds_something_is_left_alone(folder):
    with pytest.raises(FileExistsError, match="name another"):
        assemble(folder)


def test_an_option_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["kernels_hub", "--help"])
    with pytest.raises(SystemExit, match="usage"):
        runpy.run_module("integrations.kernels_hub.__main__", run_name="__main__")
    assert not list(tmp_path.iterdir())


def test_kernels_loads_it_beside_the_installed_one(folder, monkeypatch):
    kernels = pytest.importorskip("kernels")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    loaded = kernels.get_local_kernel(Path(folder), backend="cpu")
    assert loaded is not fpe_kernels and Path(loaded.__file__).is_relative_to(folder)
    assert set(loaded.__all__) == set(fpe_kernels.__all__)
    query, key, value = (torch.randn(2, 2, 63, 24, dtype=torch.float64, requires_grad=True) for _ in range(3))
    dense = torch.softmax(query @ key.transpose(-1, -2) / 24**0.5, dim=-1)
    for backend in ("torch", "reference"):
        torch.testing.assert_close(loaded.AttentionMap(query, key, backend=backend) @ value, dense @ value)
    shared = loaded.shared_attention(query[:1], key[:1], value, map_index=[0, 0])
    torch.testing.assert_close(shared, dense[:1] @ value)
    ours, theirs = (
        torch.autograd.grad((package.AttentionMap(query, key) @ value).square().sum(), (query, key, value))
        for package in (fpe_kernels, loaded)
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
