"""What ConsistEdit's scripts say of a run, in a class that all pipelines share."""

from __future__ import annotations

from typing import Any

from ...texts import did_you_mean
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


#: What the original counts there itself: scripts may set it, and nothing comes of it.
_COUNTED = ("CUR_ATT_LAYER", "CUR_ATT_2_LAYER", "ORDER", "MAP_SAVER", "attn_controller")


class _Checked(type):
    """Refuses settings that would be passed over."""

    def __setattr__(cls, name: str, value: Any) -> None:
        if name in _LEFT_OUT:
            if hasattr(value, "shape") or value:  # of a tensor Python cannot ask whether it is anything
                raise AttributeError(f"GlobalVars.{name} is not served: {_LEFT_OUT[name]}")
        elif name not in vars(cls) and name not in _COUNTED and not name.startswith("_"):
            known = sorted(known for known in vars(cls) if known.isupper())
            raise AttributeError(
                f"GlobalVars has no {name!r}, and nothing would come of it: {did_you_mean([name], known)}it has "
                f"{', '.join(known)}"
            )
        super().__setattr__(name, _steps(value) if name == "TEST_QK_STEP" else value)


def _steps(value: Any) -> float:
    """A number of steps as it is compared with theirs; ValueError for what is none."""
    plain = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(plain, bool) or not isinstance(plain, int | float) or not plain >= 0:  # NaN fails too
        raise ValueError(f"expected TEST_QK_STEP to be a number of steps from 0 on, int(steps * alpha), got {value!r}")
    return plain


class GlobalVars(metaclass=_Checked):
    """The state of ConsistEdit's runs, as its scripts set it.

    Attributes:
        TEST_QK_STEP: the first so many steps are edited: ``int(steps * alpha)``.
        TEXT_LENGTH, WIDTH, HEIGHT: read from the call here; what is set makes no difference.
        CUR_STEP, TOTAL_STEPS, IS_INVERSE: of the latest ``denoise``.
        NUM_ATT_LAYERS, NUM_ATT_2_LAYERS: layers that an editor was registered on, and those of dual blocks of FLUX.1.

    Raises:
        AttributeError: where another name is set, one that would make a mask, or an attribute of an instance.
        ValueError: where ``TEST_QK_STEP`` is set to what is no number from 0 on.
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

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"runs read the class, not an instance of it: write GlobalVars.{name} = {value!r}")

    @classmethod
    def reset_global_vars(cls) -> None:
        """Forget the latest run; ``TEST_QK_STEP`` stays."""
        cls.CUR_STEP, cls.TOTAL_STEPS, cls.IS_INVERSE = 0, 0, False
