"""Edits: which product each row of each attention layer gets, at each step."""

from .base import CombinedEdit, Edit
from .consist_edit import ConsistEdit
from .free_prompt import FreePromptEdit
from .image_memory import FreeFluxEdit, StableFlowEdit
from .kv_edit import KVEdit
from .local_blend import LocalBlend
from .masactrl import MasaCtrlEdit
from .masks import WordMask
from .plug_and_play import PlugAndPlayEdit
from .prompt_to_prompt import PromptToPromptEdit
from .reflex import ReFlexEdit
from .self_attention import SelfAttentionEdit
from .style_aligned import StyleAlignedEdit
from .value_injection import ValueInjectionEdit

__all__ = [
    "CombinedEdit",
    "ConsistEdit",
    "Edit",
    "FreeFluxEdit",
    "FreePromptEdit",
    "KVEdit",
    "LocalBlend",
    "MasaCtrlEdit",
    "PlugAndPlayEdit",
    "PromptToPromptEdit",
    "ReFlexEdit",
    "SelfAttentionEdit",
    "StableFlowEdit",
    "StyleAlignedEdit",
    "ValueInjectionEdit",
    "WordMask",
]
