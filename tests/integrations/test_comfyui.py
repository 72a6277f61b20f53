"""The ComfyUI nodes for UNets, against a stand-in of the protocol that its models and samplers follow."""

import sys
import types

import pytest
import torch

from tests.support.comfyui import FOLDER, SIGMAS, Clip, Flux, Patcher, UNet, dense, loaded, prepared_noise


@pytest.fixture(scope="module")
def package():
    return loaded()


@pytest.fixture
def ordinary(monkeypatch):
    """ComfyUI's own attention; the calls that it was given."""
    calls = []

    def optimized_attention(query, key, value, heads):
        calls.append(query.shape)
        return dense(query, key, value, heads, range(len(query))).to(query)

    for name in ("comfy", "comfy.ldm", "comfy.ldm.modules"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = types.ModuleType("comfy.ldm.modules.attention")
    module.optimized_attention = optimized_attention
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


@pytest.fixture
def patched(package):
    torch.manual_seed(0)
    model = Patcher(UNet().requires_grad_(False))
    node = package.NODE_CLASS_MAPPINGS["FreePromptModel"]()

    def made(start=0.0, stop=0.8, strength=1.0, least_level=1):
        return model, node.edited(model, start, stop, strength, least_level)[0]

    return made


def test_nodes_are_described_as_comfyui_asks(package):
    assert set(package.NODE_CLASS_MAPPINGS) == set(package.NODE_DISPLAY_NAME_MAPPINGS)
    for node in package.NODE_CLASS_MAPPINGS.values():
        inputs = {**node.INPUT_TYPES()["required"], **node.INPUT_TYPES().get("optional", {})}
        method = getattr(node, node.FUNCTION)
        assert list(inputs) == list(method.__code__.co_varnames[1 : method.__code__.co_argcount])
        assert all(isinstance(kind[0], str) for kind in inputs.values()) and node.CATEGORY and node.DESCRIPTION
        assert all(o[1]["default"] >= 0 for o in inputs.values() if len(o) > 1 and "default" in o[1])


@pytest.mark.parametrize("chunks", [[1, 0], [0, 1], [0], [1], [0, 0, 1]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_targets_have_the_sources_map(package, ordinary, chunks, dtype):
    maps = sys.modules["custom_nodes_fpe.attention"]
    images, heads = 3, 4
    rows = images * len(chunks)
    query, key, value = torch.randn(3, rows, 64, 40, dtype=dtype)
    options = {
        "n_heads": heads,
        "cond_or_uncond": chunks,
        "original_shape": [rows, 4, 16, 16],
        "sigmas": SIGMAS[:1],
        "sample_sigmas": SIGMAS,
    }
    expected = [
        row - row % images if kind == 0 else row
        for chunk, kind in enumerate(chunks)
        for row in range(chunk * images, (chunk + 1) * images)
    ]
    assert maps.maps_of_rows(rows, chunks) == expected
    whole = maps.SharedMaps()(query, key, value, options)
    torch.testing.assert_close(whole.double(), dense(query, key, value, heads, expected), rtol=1e-5, atol=1e-6)
    half = maps.SharedMaps(strength=0.25)(query, key, value, options)
    own = dense(query, key, value, heads, range(rows))
    wanted = 0.75 * own + 0.25 * dense(query, key, value, heads, expected)
    torch.testing.assert_close(half.double(), wanted, rtol=1e-5, atol=1e-6)
    assert len(ordinary) == (2 if chunks == [1] else 0), "rows of the negative prompt alone are ComfyUI's"


def test_maps_are_computed_once_by_our_kernels(package, monkeypatch):
    maps = sys.modules["custom_nodes_fpe.attention"]
    asked, shared = [], maps.shared_attention

    def watched(query, key, value, **options):
        asked.append((len(query), len(value), options["map_index"]))
        return shared(query, key, value, **options)

    monkeypatch.setattr(maps, "shared_attention", watched)
    options = {"n_heads": 2, "cond_or_uncond": [1, 0], "original_shape": [6, 4, 8, 8]}
    options |= {"sigmas": SIGMAS[:1], "sample_sigmas": SIGMAS}
    maps.SharedMaps()(*torch.randn(3, 6, 16, 16), options)
    assert asked == [(4, 6, [0, 1, 2, 3, 3, 3])], "three maps of the unconditional rows, one of the conditional ones"


def test_in_a_run_the_window_and_the_level_are_kept(patched, ordinary, package):
    model, edited = patched(stop=0.6)
    assert "patches_replace" not in model.model_options["transformer_options"], "the node's input was changed"
    latent = {"samples": torch.zeros(3, 4, 8, 8), "batch_index": [0, 0, 0]}
    edited.sample(latent, seed=1)
    fine, coarse = torch.Size([6, 64, 4]), torch.Size([6, 16, 4])
    steps = len(SIGMAS) - 1
    assert ordinary.count(fine) == steps, "the finest layer is not edited"
    assert ordinary.count(coarse) == steps - int(steps * 0.6)


def test_a_run_is_that_of_dense_maps(patched, ordinary):
    model, edited = patched(stop=0.8, least_level=0)
    latent = {"samples": torch.zeros(3, 4, 8, 8)}
    ours, plain = edited.sample(latent, seed=1), model.sample(latent, seed=1)

    def written_out(query, key, value, options):
        step = int((SIGMAS[:-1] >= options["sigmas"][0]).sum()) - 1
        maps = [0, 1, 2, 3, 3, 3] if step < 4 else range(6)
        return dense(query, key, value, options["n_heads"], maps).to(query)

    reference = model.clone()
    for block in (("input", 1), ("middle", 0)):
        reference.set_model_attn1_replace(written_out, *block)
    theirs = reference.sample(latent, seed=1)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-4, atol=1e-4)  # the source is what it was
    assert (ours[1:] - plain[1:]).abs().max() > 1e-3


def test_steps_between_steps_belong_to_the_earlier(package):
    step_of = sys.modules["custom_nodes_fpe.attention"].step_of
    for sigma, index in ((14.6, 0), (14.0, 0), (7.0, 1), (6.99999, 1), (0.3, 4), (0.1, 4), (20.0, 0)):
        assert step_of({"sigmas": torch.tensor([sigma]), "sample_sigmas": SIGMAS}) == (index, 5), sigma


def test_prompts_and_latents_of_a_batch(package):
    node = package.NODE_CLASS_MAPPINGS["FreePromptBatch"]()
    ((words, known),), latent = node.batch(Clip(), " a cat ", "a dog\n\na long fox\n", 96, 64)
    assert words.shape == (3, 154, 8) and known["pooled_output"].shape == (3, 6)
    torch.testing.assert_close(words[0, :77], words[0, 77:])  # as often as the longest
    assert latent["samples"].shape == (3, 4, 8, 12) and not latent["samples"].any()
    noise = prepared_noise(latent["samples"], 7, latent["batch_index"])
    assert torch.equal(noise[0], noise[1]) and torch.equal(noise[0], noise[2])
    with pytest.raises(ValueError, match="a target prompt a line"):
        node.batch(Clip(), "a cat", " \n", 64, 64)


def test_refusals(patched, package, ordinary):
    _, edited = patched()
    with pytest.raises(ValueError, match="another node has replaced"):
        package.NODE_CLASS_MAPPINGS["FreePromptModel"]().edited(edited, 0.0, 0.8, 1.0, 1)
    with pytest.raises(ValueError, match="start below stop"):
        patched(start=0.8)
    with pytest.raises(ValueError, match=r"expected a UNet, got Flux.*Free-Prompt-Editing \(transformers"):
        package.NODE_CLASS_MAPPINGS["FreePromptModel"]().edited(Patcher(Flux()), 0.0, 0.8, 1.0, 1)
    with pytest.raises(ValueError, match="a source and its targets, got one image"):
        edited.sample({"samples": torch.zeros(1, 4, 8, 8)}, seed=0)
    with pytest.raises(ValueError, match="sample_sigmas"):
        sys.modules["custom_nodes_fpe.attention"].step_of({"sigmas": SIGMAS})


def test_it_needs_no_diffusers(package):
    import ast

    names = set()
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.partition(".")[0])
            elif isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
    assert names <= {"__future__", "collections", "comfy", "dataclasses", "fpe_kernels", "math", "torch", "typing"}
