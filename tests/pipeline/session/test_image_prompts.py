"""IP-Adapters: edits beside image prompts, and edits of the text's attention in layers that have them."""

import pytest
import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor2_0,
    IPAdapterAttnProcessor,
    IPAdapterAttnProcessor2_0,
)

from fpe_pipeline import FreePromptEdit, Product, PromptToPromptEdit, editing
from fpe_pipeline.edits import Edit
from fpe_pipeline.edits.products import plan_products
from fpe_pipeline.edits.selection import LayerSelection
from fpe_pipeline.models.sites import Site
from fpe_pipeline.session.layers.image_prompts import split_image_prompts
from fpe_pipeline.session.layers.instructions import Order
from fpe_pipeline.session.processors.unet import editing_processor
from tests.support.dense import dense_attention, own
from tests.support.tiny_models import EVERYWHERE, IMAGE_WIDTH, add_image_prompts, check_edit, draw, image_embeds
from tests.support.tiny_pipelines import PROMPTS, tiny_pipeline, unedited
from tests.support.tiny_transformers import draw_flux, tiny_flux_pipeline

GRID, HEADS = (3, 4), 2
SITE = Site("mid_block.attentions.0.transformer_blocks.0.attn2", "mid", "cross", 0, HEADS, 0, (), GRID)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def tiny(pipe):
    tiny = tiny_pipeline(pipe)
    add_image_prompts(tiny, adapters=2)
    return tiny


class TestLayer:
    """One layer with two adapters, of one and of two images, in float64."""

    TEXT, IMAGES = random(4, 5, 8, seed=2), [random(4, 1, 3, 8, seed=3), random(4, 2, 3, 8, seed=4)]
    HIDDEN = random(4, 12, 16, seed=1)
    MASKS = (
        torch.rand(1, 1, 6, 8, generator=torch.Generator().manual_seed(6)),
        torch.rand(1, 2, 6, 8, generator=torch.Generator().manual_seed(7)),
    )

    @staticmethod
    def layer(kind=IPAdapterAttnProcessor2_0, scale=(0.5, 2.0)):
        torch.manual_seed(0)
        processor = kind(16, cross_attention_dim=8, num_tokens=(3, 3), scale=list(scale))
        attn = Attention(16, heads=HEADS, dim_head=8, cross_attention_dim=8, bias=True, processor=processor)
        return attn.to(torch.float64).eval()

    def run(self, attn, products=None, **kwargs):
        inner = attn.processor
        if products is not None:
            attn.set_processor(editing_processor(inner))
            attn.processor.order = Order(SITE, plan_products(products, 4), "torch")
        try:
            with torch.no_grad():
                return attn(self.HIDDEN, encoder_hidden_states=(self.TEXT, self.IMAGES), **kwargs)
        finally:
            attn.set_processor(inner)

    @pytest.mark.parametrize("kind", [IPAdapterAttnProcessor, IPAdapterAttnProcessor2_0])
    @pytest.mark.parametrize(
        ("scale", "masks"),
        [((0.5, 2.0), False), ((0.0, 1.0), False), ((0.0, 0.0), False), ((0.5, 2.0), True), ((0.5, [2.0, 0.0]), True)],
    )
    def test_each_row_its_own_map_is_what_diffusers_computes(self, kind, scale, masks):
        attn = self.layer(kind, scale)
        kwargs = {"ip_adapter_masks": list(self.MASKS)} if masks else {}
        expected = self.run(attn, **kwargs)
        actual = self.run(attn, {0: Product(0, (0,), (0,))}, **kwargs)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)

    def test_masks_of_pictures(self):
        """As `IPAdapterMaskProcessor` makes them, in one tensor for two adapters of an image each."""
        attn = self.layer()
        masks = IPAdapterMaskProcessor().preprocess([torch.rand(1, 24, 32), torch.rand(1, 24, 32)], 24, 32)
        images = [self.IMAGES[0], self.IMAGES[0]]
        layout = {"encoder_hidden_states": (self.TEXT, images), "ip_adapter_masks": masks}
        with torch.no_grad():
            expected = attn(self.HIDDEN, **layout)
            attn.set_processor(editing_processor(attn.processor))
            attn.processor.order = Order(SITE, plan_products({}, 4), "torch")
            torch.testing.assert_close(attn(self.HIDDEN, **layout), expected, rtol=0, atol=1e-10)

    def test_the_edit_is_of_the_text_and_the_images_stay(self):
        """A target with the source's map of the text asks for its image prompts with its own queries still."""
        attn = self.layer()
        products = {3: Product(2, (2,), (3,)), 2: Product(2, (2,), (2,))}
        dense = [[own(0)], [own(1)], [own(2)], [(2, (2,), (3,), 1.0, None)]]
        edited, plain = self.run(attn, products), self.run(attn)
        with torch.no_grad():
            text = dense_attention(attn, self.HIDDEN, dense, context=self.TEXT)
            text_before = dense_attention(attn, self.HIDDEN, [[own(row)] for row in range(4)], context=self.TEXT)
        torch.testing.assert_close(edited, plain - text_before + text, rtol=0, atol=1e-10)
        assert (text - text_before)[3].abs().max() > 1e-2

    @pytest.mark.parametrize(
        ("scale", "kwargs", "message"),
        [
            ((0.5, [1.0, 2.0]), {}, "a scale for each of its images.*no masks"),
            ((0.5, 2.0), {"ip_adapter_masks": [None]}, "each of 2 IP-Adapters, got 1"),
            ((0.5, 2.0), {"ip_adapter_masks": [MASKS[0], MASKS[0]]}, r"\[1, 2, height, width\].*got \(1, 1, 6, 8\)"),
            ((0.5, [1.0]), {"ip_adapter_masks": list(MASKS)}, "1 scales for 2 images"),
        ],
    )
    def test_masks_and_scales_that_do_not_fit(self, scale, kwargs, message):
        with pytest.raises(ValueError, match=message):
            self.run(self.layer(scale=scale), {}, **kwargs)

    def test_adapters_and_images_have_to_belong_together(self):
        adapter = self.layer().processor
        with pytest.raises(ValueError, match=r"got no image prompts.*unload_ip_adapter"):
            split_image_prompts("attn2", adapter, self.TEXT)
        with pytest.raises(ValueError, match=r"AttnProcessor2_0 is none of IPAdapterAttnProcessor"):
            split_image_prompts("attn2", AttnProcessor2_0(), (self.TEXT, self.IMAGES))
        with pytest.raises(ValueError, match="2 IP-Adapters and got image prompts of 1"):
            split_image_prompts("attn2", adapter, (self.TEXT, self.IMAGES[:1]))

    def test_images_of_another_batch(self):
        attn = self.layer()
        attn.set_processor(editing_processor(attn.processor))
        attn.processor.order = Order(SITE, plan_products({}, 4), "torch")
        with pytest.raises(ValueError, match=r"batch of 4 rows and got \[4, 4, 3, 3\]"):
            attn(self.HIDDEN, encoder_hidden_states=(self.TEXT, [given[:3] for given in self.IMAGES]))

    def test_weights_stay_in_reach(self):
        """Under their names, and wherever the layer goes: offloading moves a UNet in the middle of a session."""
        attn = self.layer()
        names = list(attn.state_dict())
        attn.set_processor(editing_processor(attn.processor))
        assert list(attn.state_dict()) == names
        attn.half()
        assert {weight.dtype for weight in attn.processor.inner.parameters()} == {torch.float16}
        attn.set_processor(attn.processor.inner)
        assert list(attn.state_dict()) == names
        assert "processor.to_k_ip.0.weight" in names


EMBEDS = {"ip_adapter_image_embeds": image_embeds(1, 2), "steps": 2}


def adapter_file(unet, tokens=4):
    """What the file of an IP-Adapter for a UNet of Stable Diffusion's kind holds; layers are counted by odd numbers."""
    width, weights = unet.config.cross_attention_dim, {}
    layers = [unet.get_submodule(name.removesuffix(".processor")) for name in unet.attn_processors]
    for place, layer in enumerate(layer for layer in layers if layer.is_cross_attention):
        for seed, name in enumerate(("to_k_ip", "to_v_ip")):
            weight = random(layer.inner_dim, width, seed=2 * place + seed)
            weights[f"{2 * place + 1}.{name}.weight"] = weight.float() / 4
    projection = {
        "proj.weight": random(tokens * width, IMAGE_WIDTH).float(),
        "proj.bias": torch.zeros(tokens * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": projection, "ip_adapter": weights}


class TestPipeline:
    def test_self_attention_beside_image_prompts(self, tiny):
        edited = check_edit(tiny, **EMBEDS)
        with editing(tiny, EVERYWHERE):
            other = draw(tiny, ip_adapter_image_embeds=image_embeds(1, 2, seed=9), steps=2)
        assert (other - edited).abs().max() > 1e-3

    def test_cross_attention_of_the_text(self, pipe, tiny):
        """Prompt-to-Prompt in layers whose processors carry an adapter: only the target changes."""
        before = tiny.unet.attn_processors
        plain = draw(tiny, 2, **EMBEDS)
        edit = PromptToPromptEdit(PROMPTS[:2], pipe.tokenizer, self_replace_steps=0)
        with editing(tiny, edit) as session:
            edited = draw(tiny, 2, **EMBEDS)
        assert tiny.unet.attn_processors == before
        assert len(session.report().layers) == len(LayerSelection.parse("cross").match(session.sites))
        change = (edited - plain).abs().amax((1, 2, 3))
        assert change[0] <= 1e-4 and change[1] > 1e-4

    def test_scales_set_in_a_session(self, pipe, tiny):
        """From the next step on they are those of a session that began with them, and they outlast it."""
        edit, scales = PromptToPromptEdit(PROMPTS[:2], pipe.tokenizer, self_replace_steps=0), [0.2, {"up": 1.5}]

        def change(pipe, step, timestep, tensors):
            pipe.set_ip_adapter_scale(scales)
            return {}

        def read():
            adapters = [p for p in tiny.unet.attn_processors.values() if isinstance(p, IPAdapterAttnProcessor2_0)]
            return [list(adapter.scale) for adapter in adapters]

        given = read()
        try:
            with editing(tiny, edit):
                tiny.set_ip_adapter_scale(scales)
                within = draw(tiny, 2, **EMBEDS)
                assert read() != given
            changed = read()
            with editing(tiny, edit) as session:
                assert torch.equal(draw(tiny, 2, **EMBEDS), within)
                tiny.set_ip_adapter_scale([0.7, 0.7])
                first = draw(tiny, 2, **EMBEDS)
                between = draw(tiny, 2, callback_on_step_end=change, **EMBEDS)
            assert len(session.report().layers) == len(changed) > 0
            assert read() == changed
            assert (within - first).abs().max() > 1e-3
            assert min((between - other).abs().max() for other in (first, within)) > 1e-4
        finally:
            tiny.set_ip_adapter_scale([0.7, 0.7])
        assert read() == given

    def test_a_whole_step_with_each_row_its_own_map(self, tiny):
        """Every cross-attention layer computed by the edit's way is the unedited pipeline."""

        class Own(Edit):
            def select(self, sites):
                return LayerSelection.parse("cross").match(sites)

            def products(self, site, step, roles):
                return {row: Product(row, (row,), (row,)) for row in range(roles.rows)}

        plain = draw(tiny, **EMBEDS)
        with editing(tiny, Own()) as session:
            torch.testing.assert_close(draw(tiny, **EMBEDS), plain, rtol=0, atol=1e-4)
        assert session.report().layers

    def test_the_adapter_is_loaded_and_taken_off_around_sessions(self, pipe):
        tiny = tiny_pipeline(pipe)
        with editing(tiny, FreePromptEdit()):
            without = draw(tiny)
        add_image_prompts(tiny)
        with editing(tiny, FreePromptEdit()):
            tiny_with = draw(tiny, ip_adapter_image_embeds=image_embeds(1))
        tiny.unload_ip_adapter()
        with editing(tiny, FreePromptEdit()):
            assert torch.equal(draw(tiny), without)
        assert (tiny_with - without).abs().max() > 1e-3

    def test_the_adapter_is_taken_off_inside_a_session(self, pipe):
        """diffusers makes every layer a processor of its present one's class, which the session's can't be."""
        tiny, edit = tiny_pipeline(pipe), FreePromptEdit()
        with editing(tiny, edit):
            without = draw(tiny)
        add_image_prompts(tiny)
        with editing(tiny, edit) as session:
            draw(tiny, ip_adapter_image_embeds=image_embeds(1))
            tiny.unload_ip_adapter()
            assert torch.equal(draw(tiny), without)
        assert set(session.report().layers) == {site.path for site in edit.select(session.sites)}
        assert unedited(tiny.unet)
        assert {type(processor) for processor in tiny.unet.attn_processors.values()} == {AttnProcessor2_0}
        assert "unload_ip_adapter" not in vars(tiny)

    @pytest.mark.parametrize("of_words", [False, True])
    def test_an_adapter_is_loaded_inside_a_session(self, pipe, of_words):
        """Of a file's weights: layers that are edited and layers beside them, of which diffusers asks the class."""
        tiny = tiny_pipeline(pipe)
        edit = PromptToPromptEdit(PROMPTS[:3], pipe.tokenizer, align="refine") if of_words else FreePromptEdit()
        weights, embeds = adapter_file(tiny.unet), {"ip_adapter_image_embeds": image_embeds(1)}
        file = {"subfolder": "", "weight_name": "", "image_encoder_folder": None}
        with editing(tiny, edit):
            without = draw(tiny)
            tiny.load_ip_adapter(weights, **file)
            within = draw(tiny, **embeds)
        assert unedited(tiny.unet)
        kinds = [type(own) for own in tiny.unet.attn_processors.values()]
        assert set(kinds) == {AttnProcessor2_0, IPAdapterAttnProcessor2_0}
        with editing(tiny, edit) as session:
            assert torch.equal(draw(tiny, **embeds), within)
            with pytest.raises(KeyError, match="to_k_ip"):  # in the middle, with the layers' processors at hand
                tiny.load_ip_adapter({**weights, "ip_adapter": {}}, **file)
            tiny.load_ip_adapter(weights, **file)
            assert torch.equal(draw(tiny, **embeds), within)
        assert session.report().layers
        assert (within - without).abs().max() > 1e-3
        assert not {"load_ip_adapter", "unload_ip_adapter"} & set(vars(tiny))

    def test_an_adapter_that_no_edit_describes_is_loaded_inside_a_session(self, pipe):
        """FLUX's, whose layers were edited before: they are refused as they are where it was loaded before."""
        tiny = tiny_flux_pipeline(pipe, torch.float32)
        config, width, weights = tiny.transformer.config, tiny.transformer.config.joint_attention_dim, {}
        for block in range(config.num_layers):
            for name in ("to_k_ip", "to_v_ip"):
                weights[f"{block}.{name}.weight"] = random(tiny.transformer.inner_dim, width).float()
                weights[f"{block}.{name}.bias"] = torch.zeros(tiny.transformer.inner_dim)
        projection = {"proj.weight": random(4 * width, IMAGE_WIDTH).float(), "proj.bias": torch.zeros(4 * width)}
        projection |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
        with editing(tiny, FreePromptEdit(1.0)):
            edited = draw_flux(tiny, steps=1)
            tiny.load_ip_adapter(
                {"image_proj": projection, "ip_adapter": weights},
                weight_name="",
                subfolder="",
                image_encoder_pretrained_model_name_or_path=None,
            )
            with pytest.raises(ValueError, match="FluxIPAdapterAttnProcessor"):
                draw_flux(tiny, steps=1)
            tiny.unload_ip_adapter()
            assert torch.equal(draw_flux(tiny, steps=1), edited)
