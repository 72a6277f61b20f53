"""Edits of transformers as people run them: offloaded, compiled, adapted, quantised, in bfloat16."""

import accelerate
import peft
import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    apply_layer_skip,
)

from fpe_pipeline import FreePromptEdit, MasaCtrlEdit, editing
from tests.support.slow_cases import few
from tests.support.tiny_aura_flow import AURA_FLOW
from tests.support.tiny_bria_fibo import FIBO
from tests.support.tiny_bria_fibo2 import FIBO2
from tests.support.tiny_chroma import draw_chroma, tiny_chroma_pipeline
from tests.support.tiny_cogvideox import draw_cogvideox, tiny_cogvideox_pipeline
from tests.support.tiny_cogview import COGVIEW
from tests.support.tiny_cosmos import draw_cosmos, tiny_cosmos_pipeline
from tests.support.tiny_cross import (
    draw_allegro,
    draw_hunyuan,
    draw_ltx,
    tiny_allegro_pipeline,
    tiny_hunyuan_pipeline,
    tiny_ltx_pipeline,
)
from tests.support.tiny_easyanimate import EASYANIMATE
from tests.support.tiny_flux3 import draw_flux3, tiny_flux3_pipeline
from tests.support.tiny_flux_kin import KIN
from tests.support.tiny_glm_image import GLM_IMAGE
from tests.support.tiny_hidream import HIDREAM
from tests.support.tiny_hunyuan_guided import HUNYUAN_IMAGE, HUNYUAN_VIDEO15
from tests.support.tiny_hunyuan_video import draw_hunyuan_video, tiny_hunyuan_video_pipeline
from tests.support.tiny_ideogram4 import IDEOGRAM4
from tests.support.tiny_joyimage import JOYIMAGE
from tests.support.tiny_kandinsky5 import draw_kandinsky5, tiny_kandinsky5_pipeline
from tests.support.tiny_kandinsky6 import draw_kandinsky6, tiny_kandinsky6_pipeline
from tests.support.tiny_krea2 import KREA2
from tests.support.tiny_ltx2 import draw_ltx2, tiny_ltx2_pipeline
from tests.support.tiny_lumina import draw_lumina, tiny_lumina_pipeline
from tests.support.tiny_mochi import MOCHI
from tests.support.tiny_motif_video import MOTIF_VIDEO
from tests.support.tiny_nucleus import NUCLEUS
from tests.support.tiny_qwen21 import draw_qwen21, tiny_qwen21_pipeline
from tests.support.tiny_transformers import (
    draw,
    draw_flux,
    draw_qwen,
    tiny_flux_pipeline,
    tiny_qwen_pipeline,
    tiny_sd3_pipeline,
)
from tests.support.tiny_wan import draw_wan, tiny_wan_pipeline

PROMPTS = ("a photo of a red car", "a big dog")
MODELS = {
    "sd3.5": (lambda pipe, dtype: tiny_sd3_pipeline(pipe, "sd3.5", dtype), draw),
    "flux": (tiny_flux_pipeline, draw_flux),
    "chroma": (tiny_chroma_pipeline, draw_chroma),
    "cogvideox": (
        lambda pipe, dtype: tiny_cogvideox_pipeline(pipe, dtype=dtype),
        lambda pipe, **options: draw_cogvideox(pipe, PROMPTS, **options),
    ),
    "hunyuan_video": (
        tiny_hunyuan_video_pipeline,
        lambda pipe, **options: draw_hunyuan_video(pipe, PROMPTS, **options),
    ),
    "qwen": (lambda pipe, dtype: tiny_qwen_pipeline(dtype), draw_qwen),
    "wan": (lambda pipe, dtype: tiny_wan_pipeline(pipe, 2, dtype), draw_wan),
    "allegro": (tiny_allegro_pipeline, draw_allegro),
    "ltx": (tiny_ltx_pipeline, draw_ltx),
    "ltx 2": (lambda pipe, dtype: tiny_ltx2_pipeline(dtype), lambda pipe: draw_ltx2(pipe)[0]),
    "flux 3": (lambda pipe, dtype: tiny_flux3_pipeline(dtype=dtype), draw_flux3),
    "hunyuan": (tiny_hunyuan_pipeline, draw_hunyuan),
    "cosmos": (tiny_cosmos_pipeline, draw_cosmos),
    "lumina": (lambda pipe, dtype: tiny_lumina_pipeline(dtype), draw_lumina),
    "kandinsky 5": (tiny_kandinsky5_pipeline, draw_kandinsky5),
    "kandinsky 6": (tiny_kandinsky6_pipeline, draw_kandinsky6),
    # Without guidance, as is its default: the model reads a layout token by token, which is long to compile.
    "qwen 2.1": (
        tiny_qwen21_pipeline,
        lambda pipe, **options: draw_qwen21(pipe, PROMPTS, steps=2, guidance=1.0, **options),
    ),
}
_NEWER = {
    **KIN,
    **COGVIEW,
    "aura flow": AURA_FLOW,
    "bria fibo": FIBO,
    "bria fibo 2": FIBO2,
    "easyanimate": EASYANIMATE,
    "glm image": GLM_IMAGE,
    "hidream": HIDREAM,
    "hunyuan video 1.5": HUNYUAN_VIDEO15,
    "hunyuan image": HUNYUAN_IMAGE,
    "ideogram 4": IDEOGRAM4,
    "joyimage": JOYIMAGE,
    "krea 2": KREA2,
    "mochi": MOCHI["Mochi"],
    "motif video": MOTIF_VIDEO,
    "nucleus": NUCLEUS,
}
MODELS |= {
    name: (model.make, lambda pipe, run=model.run, **options: run(pipe, PROMPTS, **options))
    for name, model in _NEWER.items()
}
EDIT = FreePromptEdit(0.5)
CLOSE = 2e-4  # in float32, of latents of a few units
every_model = pytest.mark.parametrize("name", few(MODELS.keys(), "sd3.5", "lumina"))
some_models = pytest.mark.parametrize("name", few(MODELS.keys(), "sd3.5"))


class Model:
    def __init__(self, pipe, name, dtype=torch.float32):
        make, self.draw = MODELS[name]
        self.pipe = make(pipe, dtype)

    @property
    def transformers(self):
        found = (
            getattr(self.pipe, name, None) for name in ("transformer", "transformer_2", "unconditional_transformer")
        )
        return [model for model in found if model is not None]

    def run(self, edit=EDIT):
        with editing(self.pipe, edit) as session:
            out = self.draw(self.pipe)
        assert session.report().layers and not session.report().skipped
        return out

    def attentions(self):
        return [m for model in self.transformers for m in model.modules() if hasattr(m, "processor")]


@some_models
def test_model_offloading(pipe, name):
    """diffusers' ``enable_model_cpu_offload`` with the CPU as the accelerator: the same hooks, no second device."""
    model = Model(pipe, name)
    expected = model.run()
    for transformer in model.transformers:
        accelerate.cpu_offload_with_hook(transformer, "cpu")
    assert torch.equal(model.run(), expected)


@some_models
def test_sequential_offloading(pipe, name):
    """As ``enable_sequential_cpu_offload``: a weight is nowhere but while its own module runs."""
    if name == "hunyuan":
        pytest.skip("diffusers' HunyuanDiT reads weights of modules that it does not call, with or without an edit")
    model = Model(pipe, name)
    expected = model.run()
    for transformer in model.transformers:
        accelerate.cpu_offload(transformer, execution_device="cpu", offload_buffers=False)
        assert any(parameter.is_meta for parameter in transformer.parameters())
    assert torch.equal(model.run(), expected)


@some_models
def test_group_offloading(pipe, name):
    model = Model(pipe, name)
    expected = model.run()
    cpu = torch.device("cpu")
    for transformer in model.transformers:
        if not getattr(transformer, "_supports_group_offloading", True):
            pytest.skip(f"{type(transformer).__name__} has no group offloading")
        transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert torch.equal(model.run(), expected)


class Packed(torch.nn.Module):
    """A linear layer whose weight is no matrix: eight bits a number and a scale a row, as quantisers keep it."""

    def __init__(self, linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8).flatten())
        self.register_buffer("scale", scale)
        self.shift = linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def forward(self, given):
        weight = self.packed.view(self.out_features, -1).to(given.dtype) * self.scale.to(given.dtype)
        return torch.nn.functional.linear(given, weight, self.shift)


@every_model
def test_quantised_linears_are_called(pipe, name):
    """They have no weight to be sliced; the edit is that of the model with the weights that they stand for."""
    model = Model(pipe, name, torch.float64)
    for attention in model.attentions():
        for key, linear in list(attention.named_modules()):
            if isinstance(linear, torch.nn.Linear):
                parent = attention.get_submodule(key.rpartition(".")[0])
                setattr(parent, key.rpartition(".")[2], Packed(linear))
    actual = model.run()
    for attention in model.attentions():
        for key, packed in list(attention.named_modules()):
            if isinstance(packed, Packed):
                linear = torch.nn.Linear(packed.in_features, packed.out_features, packed.shift is not None).double()
                linear.weight.data = packed.packed.view(packed.out_features, -1).double() * packed.scale
                linear.bias = packed.shift
                setattr(attention.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2], linear)
    assert (actual - model.run()).abs().max() <= 1e-5


@some_models
def test_adapters(pipe, name):
    """LoRA in every projection: edits are those of the adapted weights, apart and fused."""
    model = Model(pipe, name, torch.float64)
    before = model.run()
    projections = ["to_q", "to_k", "to_v", "to_out.0", "to_query", "to_key", "to_value", "img_attn_qkv", "txt_attn_qkv"]
    config = peft.LoraConfig(r=2, target_modules=projections, init_lora_weights=False)
    adapted = []
    for transformer in model.transformers:
        torch.manual_seed(3)
        adapted.append(peft.inject_adapter_in_model(config, transformer))
    apart = model.run()
    for transformer in adapted:
        for module in transformer.modules():
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                module.merge()
    fused = model.run()
    assert (apart - fused).abs().max() <= 1e-5 and (apart - before).abs().max() > 1e-3


@some_models
def test_bfloat16(pipe, name):
    """Of the order of what bfloat16 does to the unedited run, and finite."""
    exact, half = (Model(pipe, name, dtype) for dtype in (torch.float32, torch.bfloat16))
    edited = (half.run().float() - exact.run().float()).abs().max()
    plain = (half.draw(half.pipe).float() - exact.draw(exact.pipe).float()).abs().max()
    assert edited <= 4 * plain


@pytest.mark.slow
@every_model
def test_compiled_blocks(pipe, name):
    """`compile_repeated_blocks` with the session's processors in place: one graph a kind of block and of order."""
    model = Model(pipe, name)
    expected = model.run()
    torch.compiler.reset()
    try:
        for transformer in model.transformers:
            if not getattr(transformer, "_repeated_blocks", None):
                transformer._repeated_blocks = [type(next(iter(_blocks(transformer)))).__name__]
            transformer.compile_repeated_blocks(backend="eager")
        assert (model.run() - expected).abs().max() <= CLOSE
        assert (model.run(MasaCtrlEdit(1, **_layers(name))) - expected).abs().max() > CLOSE
    finally:
        torch.compiler.reset()


def _blocks(transformer):
    return next(
        getattr(transformer, name)
        for name in (
            "transformer_blocks",
            "visual_transformer_blocks",
            "blocks",
            "layers",
            "joint_transformer_blocks",
            "double_stream_blocks",
        )
        if hasattr(transformer, name)
    )


def _layers(name):
    apart = ("wan", "allegro", "ltx", "hunyuan", "kandinsky 5", "kandinsky 6")
    return {"start_layer": 0} if name in apart else {"layers": range(2)}


@pytest.mark.slow
@every_model
def test_compiled_whole(pipe, name):
    model = Model(pipe, name)
    expected = model.run()
    torch.compiler.reset()
    try:
        if name == "flux 3":  # whose blocks read the signature of its forward, which a wrapper has not
            model.pipe.transformer.compile(backend="eager")
        else:
            model.pipe.transformer = torch.compile(model.pipe.transformer, backend="eager")
        assert (model.run() - expected).abs().max() <= CLOSE
    finally:
        torch.compiler.reset()


CACHES = {
    "FirstBlockCache": FirstBlockCacheConfig(threshold=0.1),
    "FasterCache": FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: 500,
        tensor_format="BCHW",
    ),
    "pyramid attention broadcast": PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: 500,
    ),
    "TaylorSeer": TaylorSeerCacheConfig(),
    "MagCache": MagCacheConfig(num_inference_steps=4, mag_ratios=torch.ones(4)),
}


class TestRefusals:
    @pytest.mark.parametrize("cache", few(CACHES.keys(), "FirstBlockCache", "TaylorSeer"))
    def test_caches(self, pipe, cache):
        model = Model(pipe, "flux")
        model.pipe.transformer.enable_cache(CACHES[cache])
        with pytest.raises(ValueError, match=f"{cache} is on in"):
            editing(model.pipe, EDIT)
        model.pipe.transformer.disable_cache()
        model.run()

    def test_layer_skipping(self, pipe):
        model = Model(pipe, "flux")
        apply_layer_skip(model.pipe.transformer, LayerSkipConfig(indices=[1], fqn="transformer_blocks"))
        with pytest.raises(ValueError, match="layer skipping is on in"):
            editing(model.pipe, EDIT)

    def test_nunchaku(self, pipe):
        model = Model(pipe, "flux")
        kind = type(model.pipe.transformer)
        model.pipe.transformer.__class__ = type("NunchakuFluxTransformer2dModel", (kind,), {})
        with pytest.raises(ValueError, match="is nunchaku's: its kernels compute projections"):
            editing(model.pipe, EDIT)
        model.pipe.transformer.__class__ = type("Finer", (kind,), {})
        model.run()

    @pytest.mark.parametrize("name", few(["flux", "chroma", "qwen", "wan", "ltx"], "wan"))
    def test_settings_of_the_dispatcher(self, pipe, name):
        """The backend of unedited calls stays the user's; context parallelism is refused with the reason."""
        model = Model(pipe, name)
        expected = model.run()
        model.pipe.transformer.set_attention_backend("native")
        inside = []

        class Watched(FreePromptEdit):
            def products(self, site, step, roles):
                inside.extend(attention.processor._attention_backend for attention in model.attentions())
                return super().products(site, step, roles)

        assert torch.equal(model.run(Watched(0.5)), expected)
        assert inside and {str(getattr(backend, "value", backend)) for backend in inside} <= {"native", "None"}
        model.attentions()[0].processor._parallel_config = object()
        with pytest.raises(ValueError, match="context parallelism is on"):
            model.run(FreePromptEdit(0.5))
