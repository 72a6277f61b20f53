"""Edits: which product each row of each attention layer gets, at each step."""

from .base import CombinedEdit, Edit
from .free_prompt import FreePromptEdit
from .local_blend import LocalBlend
from .masactrl import MasaCtrlEdit
from .masks import WordMask
from .plug_and_play import PlugAndPlayEdit
from .prompt_to_prompt import PromptToPromptEdit
from .self_attention import SelfAttentionEdit
from .style_aligned import StyleAlignedEdit
from .value_injection import ValueInjectionEdit

__all__ = [
    "CombinedEdit",
    "Edit",
    "FreePromptEdit",
    "LocalBlend",
    "MasaCtrlEdit",
    "PlugAndPlayEdit",
    "PromptToPromptEdit",
    "SelfAttentionEdit",
    "StyleAlignedEdit",
    "ValueInjectionEdit",
    "WordMask",
]
