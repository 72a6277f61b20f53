"""The processors that a session puts onto a model's attention layers, and takes off again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ..callers import warn
from ..models.adapters.adapter import ModelAdapter, is_compiled
from ..models.sites import Site
from ..shadows import Shadows
from .layers.around import ProcessorAround
from .layers.instructions import Order
from .layers.joint_processor import EditJointProcessor, unsupported_joint_reasons
from .layers.record import LayerRecord
from .processors.allegro import EditAllegroProcessor
from .processors.aura_flow import EditAuraFlowProcessor
from .processors.bria_fibo import EditBriaFiboProcessor
from .processors.bria_fibo2 import EditBriaFibo2Processor
from .processors.chroma import EditChromaProcessor
from .processors.cogvideox import EditCogVideoXProcessor, EditCogView4Processor, EditGlmImageProcessor
from .processors.cosmos import EditCosmosProcessor
from .processors.flux import EditFluxProcessor
from .processors.flux2 import flux2_processor, unsupported_flux2_reasons
from .processors.flux3 import EditFlux3Processor
from .processors.hidream import EditHiDreamProcessor
from .processors.hunyuan_video import EditHunyuanVideoProcessor
from .processors.ideogram4 import EditIdeogram4Processor
from .processors.joyimage import EditJoyImageProcessor
from .processors.kandinsky5 import EditKandinsky5Processor
from .processors.kandinsky6 import EditKandinsky6Processor
from .processors.krea2 import EditKrea2Processor
from .processors.ltx import EditLTXProcessor
from .processors.ltx2 import EditLTX2Processor
from .processors.lumina2 import EditLumina2Processor
from .processors.mochi import EditMochiProcessor
from .processors.motif_video import EditMotifVideoProcessor
from .processors.nucleus import EditNucleusProcessor
from .processors.qwen import EditQwenProcessor
from .processors.qwen21 import EditQwen21Processor, qwen21_processor
from .processors.sana import EditSanaProcessor
from .processors.straight import straighten, unstraighten
from .processors.unet import SLICED, editing_processor, is_sliced, unsupported_reasons
from .processors.wan import EditWanProcessor
from .processors.z_image import EditZImageProcessor

__all__ = ["NO_ORDERS", "LayerProcessors"]

#: For a call in which no layer has anything to do.
NO_ORDERS: Mapping[str, Order] = MappingProxyType({})

_Reasons = Callable[[Any, Any, tuple[type, ...]], list[str]]

#: By family of models, what is put around a layer's processor, and why it cannot be.
_PROCESSORS: dict[str, tuple[Callable[[Any], ProcessorAround], _Reasons]] = {
    "unet": (editing_processor, unsupported_reasons),
    "sd3": (EditJointProcessor, unsupported_joint_reasons),
    "flux": (EditFluxProcessor, EditFluxProcessor.unsupported_reasons),
    "flux_kin": (EditFluxProcessor, EditFluxProcessor.unsupported_reasons),
    "flux2": (flux2_processor, unsupported_flux2_reasons),
    "flux3": (EditFlux3Processor, EditFlux3Processor.unsupported_reasons),
    "chroma": (EditChromaProcessor, EditChromaProcessor.unsupported_reasons),
    "allegro": (EditAllegroProcessor, EditAllegroProcessor.unsupported_reasons),
    "aura_flow": (EditAuraFlowProcessor, EditAuraFlowProcessor.unsupported_reasons),
    "bria_fibo": (EditBriaFiboProcessor, EditBriaFiboProcessor.unsupported_reasons),
    "bria_fibo2": (EditBriaFibo2Processor, EditBriaFibo2Processor.unsupported_reasons),
    "cogvideox": (EditCogVideoXProcessor, EditCogVideoXProcessor.unsupported_reasons),
    "cogview4": (EditCogView4Processor, EditCogView4Processor.unsupported_reasons),
    "cosmos": (EditCosmosProcessor, EditCosmosProcessor.unsupported_reasons),
    "easyanimate": (EditHunyuanVideoProcessor, EditHunyuanVideoProcessor.unsupported_reasons),
    "glm_image": (EditGlmImageProcessor, EditGlmImageProcessor.unsupported_reasons),
    "hidream": (EditHiDreamProcessor, EditHiDreamProcessor.unsupported_reasons),
    "hunyuan_video": (EditHunyuanVideoProcessor, EditHunyuanVideoProcessor.unsupported_reasons),
    "ideogram4": (EditIdeogram4Processor, EditIdeogram4Processor.unsupported_reasons),
    "joyimage": (EditJoyImageProcessor, EditJoyImageProcessor.unsupported_reasons),
    "kandinsky5": (EditKandinsky5Processor, EditKandinsky5Processor.unsupported_reasons),
    "kandinsky6": (EditKandinsky6Processor, EditKandinsky6Processor.unsupported_reasons),
    "krea2": (EditKrea2Processor, EditKrea2Processor.unsupported_reasons),
    "motif_video": (EditMotifVideoProcessor, EditMotifVideoProcessor.unsupported_reasons),
    "nucleus": (EditNucleusProcessor, EditNucleusProcessor.unsupported_reasons),
    "qwen": (EditQwenProcessor, EditQwenProcessor.unsupported_reasons),
    "qwen21": (qwen21_processor, EditQwen21Processor.unsupported_reasons),
    "lumina2": (EditLumina2Processor, EditLumina2Processor.unsupported_reasons),
    "mochi": (EditMochiProcessor, EditMochiProcessor.unsupported_reasons),
    "ltx": (EditLTXProcessor, EditLTXProcessor.unsupported_reasons),
    "ltx2": (EditLTX2Processor, EditLTX2Processor.unsupported_reasons),
    "sana": (EditSanaProcessor, EditSanaProcessor.unsupported_reasons),
    "wan": (EditWanProcessor, EditWanProcessor.unsupported_reasons),
    "z_image": (EditZImageProcessor, EditZImageProcessor.unsupported_reasons),
}


class LayerProcessors:
    """Editing processors around the processors of some layers, until :meth:`restore`.

    Args:
        adapter: of the model whose layers they are.
        changed: is told that layers have other processors than they had, which may not be of those that can be edited.

    Attributes:
        orders: of the latest call.
    """

    def __init__(self, adapter: ModelAdapter, changed: Callable[[], None]) -> None:
        self._adapter, self._changed = adapter, changed
        self._family = adapter.family
        self._installed: dict[str, ProcessorAround] = {}
        self._found: dict[str, Any] = {}  # the layers themselves, of those installed
        self.orders: Mapping[str, Order] = NO_ORDERS
        self._working: list[tuple[str, ProcessorAround, Any]] = []  # paths, processors and layers that have an order
        self._straight: dict[str, Any] = {}  # layers that nobody edits, which are computed in less of the host's time
        self._shadows: Shadows | None = None

    def wrap(self, sites: Sequence[Site]) -> None:
        """Put editing processors around those of the sites' layers; layers that have one keep it.

        Raises:
            RuntimeError: layers that somebody else computes.
        """
        around, _ = _PROCESSORS[self._family]
        layers = {site.path: self._layer(site.path) for site in sites if site.path not in self._installed}
        for layer in layers.values():
            while isinstance(layer.processor, ProcessorAround) and layer.processor.is_over:
                _put(layer, layer.processor.inner)
            unstraighten(layer)
        taken = [path for path, layer in layers.items() if isinstance(layer.processor, ProcessorAround)]
        if taken:
            raise RuntimeError(
                f"another tool or session computes {taken[0]} and {len(taken) - 1} more layers of this model already: "
                "restore that first (what registered it gives back something with .restore())"
            )
        for path, layer in layers.items():
            self._installed[path] = around(layer.processor)
            _put(layer, self._installed[path])
        if self._shadows is None:
            self._shadows = Shadows(self._adapter.pipe)
            for name in ("load_ip_adapter", "unload_ip_adapter"):
                self._shadows.cover(name, self._stand_aside)
            self._straighten()
        self.give(NO_ORDERS)

    def _straighten(self) -> None:
        """Have the layers beside those in less of the host's time; those of a compiled UNet take none of it."""
        if self._family != "unet" or is_compiled(self._adapter.model):
            return
        beside = {site.path: self._layer(site.path) for site in self._adapter.sites if site.path not in self._installed}
        self._straight = {path: layer for path, layer in beside.items() if straighten(layer)}

    def _stand_aside(self, change: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Put an image prompt's adapter on or take it off, which makes every layer a processor of its present one's
        class: of its own, and of ours none, which stand around the new ones afterwards."""
        around, _ = _PROCESSORS[self._family]
        ours = {path: own for path, own in self._installed.items() if self._layer(path).processor is own}
        for path, own in ours.items():
            _put(self._layer(path), own.inner)
        try:
            return change(*args, **kwargs)
        finally:
            for path, own in ours.items():
                layer = self._layer(path)
                self._installed[path] = own if layer.processor is own.inner else around(layer.processor)
                _put(layer, self._installed[path])
            self.give(NO_ORDERS)
            self._changed()

    def check(self, sites: Iterable[Site], override: tuple[type, ...]) -> None:
        """Raise ValueError, with the reasons, where layers cannot be edited."""
        _, reasons_of = _PROCESSORS[self._family]
        reasons = {
            site.path: reasons_of(self._layer(site.path), self._installed[site.path].inner, override) for site in sites
        }
        _refuse({path: "; ".join(given) for path, given in reasons.items() if given})

    def give(self, orders: Mapping[str, Order]) -> None:
        """Tell each processor what to do in the next call of the model: its order, or nothing.

        Raises:
            ValueError: attention slicing was switched on since, and has taken the place of one that has an order.
        """
        if orders is not self.orders:  # most calls of a run have those of the call before
            self.orders = orders
            self._working = []
            for path, processor in self._installed.items():
                processor.order = orders.get(path)
                if processor.order is not None:
                    self._working.append((path, processor, self._layer(path)))
        sliced = []
        for path, processor, layer in self._working:
            processor.record = None
            if layer.processor is not processor and is_sliced(layer.processor):
                sliced.append(path)
        if sliced:
            # The layers stay as the user has set them, which needs no word at the end beside this error.
            self._installed = {
                path: own for path, own in self._installed.items() if not is_sliced(self._layer(path).processor)
            }
            self._working = [each for each in self._working if each[0] in self._installed]
            _refuse(dict.fromkeys(sliced, SLICED))

    @property
    def ordered(self) -> dict[str, ProcessorAround]:
        """By layer path, the processors that have an order."""
        return {path: processor for path, processor, _ in self._working}

    @property
    def records(self) -> dict[str, tuple[Order, LayerRecord | None]]:
        """By layer path, each order of the call and what its processor told of it; None where it was not asked."""
        return {path: (self.orders[path], processor.record) for path, processor, _ in self._working}

    def warn_of_bypassed(self) -> None:
        """Warn of layers that had an order in the call that has ended and did not carry it out."""
        bypassed = [path for path, own, _ in self._working if own.record is None or own.record.skipped]
        if bypassed:
            warn(
                "layers that this step was to edit were computed without their editing processor, which was replaced "
                "or skipped: " + ", ".join(bypassed),
                RuntimeWarning,
            )

    def restore(self) -> None:
        """Give the layers back the processors that they had; warn of those that somebody else has replaced since."""
        self.give(NO_ORDERS)  # whoever still holds one of ours now holds one that calls the original
        self._found = {}  # a layer may be another one by now
        foreign = []
        for path, processor in self._installed.items():
            layer = self._layer(path)
            processor.is_over = True
            if layer.processor is processor:
                _put(layer, processor.inner)
            elif layer.processor is not processor.inner:
                foreign.append(f"{path} ({type(layer.processor).__name__})")
        for layer in self._straight.values():
            unstraighten(layer)
        self._installed, self._found, self._straight = {}, {}, {}
        if self._shadows is not None:
            self._shadows.remove()
            self._shadows = None
        if foreign:
            warn(
                "these layers' processors were replaced during the editing session and are left as they are: "
                + ", ".join(foreign),
                RuntimeWarning,
            )

    def _layer(self, path: str) -> Any:
        if path not in self._found:  # by name takes a microsecond for each of its parts
            self._found[path] = self._adapter.layer(path)
        return self._found[path]


def _put(layer: Any, processor: Any) -> None:
    """Give a layer a processor; Mochi's have no method for it."""
    if hasattr(layer, "set_processor"):
        layer.set_processor(processor)
    else:
        layer.processor = processor


def _refuse(reasons: Mapping[str, str]) -> None:
    if reasons:
        raise ValueError(
            "these layers cannot be edited:\n" + "\n".join(f"  {path}: {why}" for path, why in reasons.items())
        )
