"""Tiny pipelines of every family as folders, as the command, batches and the page load them."""

import functools

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

from fpe_pipeline.models.served_families import FAMILIES
from tests.support.tiny_transformers import tiny_flux_pipeline, tiny_sd3_pipeline, tiny_vae

#: Families of transformers whose pipelines this diffusers has, and can be saved as small as the tests make them.
SAVED = [
    name
    for name, served in FAMILIES.items()
    if not served.is_unet and name != "qwen21" and hasattr(diffusers, served.classes[0])
]
_F32 = torch.float32


def _made(pipe, family):
    """The pipeline of a family; modules of newer classes are imported here, which older diffusers lack."""
    if family in ("sd3", "flux"):
        return {"sd3": tiny_sd3_pipeline, "flux": tiny_flux_pipeline}[family](pipe, dtype=_F32)
    if family == "chroma":
        from tests.support.tiny_chroma import tiny_chroma_pipeline

        return tiny_chroma_pipeline(pipe, dtype=_F32)
    if family in ("qwen", "lumina2"):
        from tests.support.tiny_language import tiny_lumina_that_reads, tiny_qwen_that_reads

        return {"qwen": tiny_qwen_that_reads, "lumina2": tiny_lumina_that_reads}[family](dtype=_F32)
    if family == "z_image":
        from tests.support.tiny_z_image import tiny_z_image_that_reads

        return tiny_z_image_that_reads(dtype=_F32, vae=tiny_vae())
    if family in ("ovis", "longcat", "bria"):
        from tests.support import tiny_flux_kin

        kinds = {"ovis": tiny_flux_kin.OVIS, "longcat": tiny_flux_kin.LONGCAT, "bria": tiny_flux_kin.BRIA}
        return kinds[family].make(pipe, dtype=_F32)
    if family in ("cogview4", "aura_flow", "krea2"):
        from tests.support.tiny_aura_flow import tiny_aura_flow_that_encodes
        from tests.support.tiny_cogview import tiny_cogview4_that_reads

        if family == "krea2":
            from tests.support.tiny_krea2 import tiny_krea2_pipeline

            return tiny_krea2_pipeline(dtype=_F32)
        made = tiny_cogview4_that_reads() if family == "cogview4" else tiny_aura_flow_that_encodes(pipe)
        return made.to(_F32)
    if family == "nucleus":
        from tests.support.tiny_nucleus import tiny_nucleus_pipeline

        return tiny_nucleus_pipeline(dtype=_F32, saves=True)
    if family == "cogview3":
        from tests.support.tiny_cogview import tiny_cogview3_that_decodes

        return tiny_cogview3_that_decodes(pipe, _F32)
    if family == "bria_fibo":
        from tests.support.tiny_bria_fibo import tiny_fibo_pipeline

        return tiny_fibo_pipeline(dtype=_F32, decodes=True)
    if family == "kandinsky5":
        from tests.support.tiny_kandinsky5 import tiny_kandinsky5_pipeline, with_a_plain_tokenizer

        return with_a_plain_tokenizer(tiny_kandinsky5_pipeline(pipe, _F32, decodes=True))
    if family == "hunyuan_image":
        from tests.support.tiny_hunyuan_guided import tiny_hunyuan_image_pipeline

        return tiny_hunyuan_image_pipeline(dtype=_F32, decodes=True)
    if family == "ideogram4":
        from tests.support.tiny_ideogram4 import tiny_ideogram4_pipeline

        return tiny_ideogram4_pipeline(dtype=_F32)
    if family.startswith("pixart"):
        from tests.support.tiny_pixart import tiny_pixart_pipeline

        tiny = tiny_pixart_pipeline(pipe, family.removeprefix("pixart_"), dtype=_F32)
        tiny.vae.register_to_config(shift_factor=None)  # which its pipeline would not take off
        return tiny
    from tests.support.tiny_flux2 import tiny_flux2_that_encodes, with_a_plain_tokenizer

    tiny = tiny_flux2_that_encodes(FAMILIES[family].classes[0], dtype=_F32)
    return with_a_plain_tokenizer(tiny) if family == "flux2" else tiny


def saved_transformer(pipe, family, folder, **config):
    """Save a pipeline of a family with a scheduler that diffusers loads; its folder.

    Args:
        config: of the pipeline, such as ``is_distilled``.
    """
    stock = _made(pipe, family)
    stock.register_to_config(**config)
    if FAMILIES[family].is_flow:
        stock.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock.save_pretrained(folder)
    return folder


def make_flux_small(monkeypatch):
    """FLUX.1's pipeline makes images of 1024 px by default, whatever its transformer says; here of 64."""
    _make_small(monkeypatch, FluxPipeline, "default_sample_size", 8)


def make_kandinsky_small(monkeypatch):
    """Kandinsky 5's pipeline makes images of some sizes around 1024 px; here of one, (width, height)."""
    kind = getattr(diffusers, "Kandinsky5T2IPipeline", None)
    if kind is not None:
        _make_small(monkeypatch, kind, "resolutions", [(48, 64)])


def _make_small(monkeypatch, kind, name, value):
    make = kind.__init__

    @functools.wraps(make)  # diffusers reads the components off the signature
    def smaller(self, *arguments, **options):
        make(self, *arguments, **options)
        setattr(self, name, value)

    monkeypatch.setattr(kind, "__init__", smaller)
