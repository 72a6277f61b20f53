"""What ConsistEdit's scripts say of a run, in a class that all pipelines share."""

from __future__ import annotations

from typing import Any

from ..names import unknown_name

__all__ = ["GlobalVars"]

__getattr__ = unknown_name(__name__, "consistEdit.global_var", __all__)

_FOR_MASKS = "masks are made by ConsistEdit(mask=WordMask(prompt, word, tokenizer)) with fpe_pipeline.editing"
_LEFT_OUT = {
    **dict.fromkeys(
        ("GENERATE_MASK", "MASK", "TOKEN_IDS", "MASK_OUTPUT_PATH", "REGENERATE_MASK", "SAVE_MASK_TRIGGER"), _FOR_MASKS
    ),
    **dict.fromkeys(("TEST_V_STEP", "NO_V"), "values are the source's only where a mask says it, and " + _FOR_MASKS),
}


class _Checked(type):
    """Refuses settings that would be passed over."""

    def __setattr__(cls, name: str, value: Any) -> None:
        if name in _LEFT_OUT and value:
            raise AttributeError(f"GlobalVars.{name} is not served: {_LEFT_OUT[name]}")
        super().__setattr__(name, value)


class GlobalVars(metaclass=_Checked):
    """The state of ConsistEdit's runs, as its scripts set it.

    Attributes:
        TEST_QK_STEP: the first so many steps are edited: ``int(steps * alpha)``.
        TEXT_LENGTH, WIDTH, HEIGHT: read from the call here; what is set makes no difference.
        CUR_STEP, TOTAL_STEPS, IS_INVERSE: of the latest ``denoise``.
        NUM_ATT_LAYERS, NUM_ATT_2_LAYERS: layers that an editor was registered on, and those of dual blocks of FLUX.1.
    """

    TEST_QK_STEP = 0
    TEXT_LENGTH = 333
    WIDTH = 64
    HEIGHT = 64
    CUR_STEP = 0
    TOTAL_STEPS = 0
    IS_INVERSE = False
    NUM_ATT_LAYERS = 0
    NUM_ATT_2_LAYERS = 0

    @classmethod
    def reset_global_vars(cls) -> None:
        """Forget the latest run; ``TEST_QK_STEP`` stays."""
        cls.CUR_STEP, cls.TOTAL_STEPS, cls.IS_INVERSE = 0, 0, False
