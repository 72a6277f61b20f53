"""Prompt-to-Prompt's controllers that edit: replacement, refinement, re-weighting."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from ...callers import warn
from ...errors import EditWarning, check_positive
from ..given import listed, window
from ..switch import chosen_compat
from . import seq_aligner
from .controllers import KINDS, AttentionStore
from .local_blend import LocalBlend
from .word_tokens import (
    Compat,
    WordFactors,
    cross_windows,
    get_equalizer,
    get_time_words_attention_alpha,
    required,
    tokens_of_words,
)

__all__ = [
    "AttentionControlEdit",
    "AttentionRefine",
    "AttentionReplace",
    "AttentionReweight",
    "make_controller",
]

#: By Prompt-to-Prompt: self-attention maps of more query tokens keep their own.
SELF_TOKENS = 16**2


class AttentionControlEdit(AttentionStore, abc.ABC):
    """Targets take the source's map: of a self-attention layer as a whole, of a cross-attention layer word by word.

    Args:
        prompts: the source prompt and its targets.
        num_steps: of the run.
        cross_replace_steps: a share of the steps, or begin and end; or either by word, and "default_" for the others.
        self_replace_steps: a share of the steps, or begin and end.
        local_blend: blends latents after each step.
        tokenizer: the pipeline's; default: that of the pipeline where the controller is registered.
        self_tokens: most query tokens of the self-attention layers that are replaced.
        keeps: "cross", "self" or both, as of :class:`AttentionStore`. Default: of the controllers here "cross", which
            is all that a local blend reads; both for a class of a user's own, and with ``compat="original"``.
        compat: ``"original"`` for the alignments of the authors' code, no word said of words that are in no prompt, and
            both kinds of maps kept.

    Raises:
        ValueError: fewer than two prompts, a number of steps that is none, or shares outside of 0 to 1.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        num_steps: int,
        cross_replace_steps: Any,
        self_replace_steps: Any,
        local_blend: LocalBlend | None = None,
        *,
        tokenizer: Any = None,
        self_tokens: int = SELF_TOKENS,
        keeps: Sequence[str] | None = None,
        compat: Compat = None,
    ) -> None:
        is_ours = type(self).__module__ == __name__ and chosen_compat(compat) is None
        super().__init__(keeps=keeps if keeps is not None else ("cross",) if is_ours else KINDS)
        check_positive(num_steps=num_steps)
        self.prompts, self.num_steps = listed(prompts), num_steps
        self.batch_size = len(self.prompts)
        if self.batch_size < 2:
            raise ValueError(f"expected the source prompt and at least one target, got {self.batch_size} prompt(s)")
        cross_windows(cross_replace_steps)  # refused here, not in the first layer of a run
        self.cross_replace_steps, self.local_blend = cross_replace_steps, local_blend
        self.tokenizer, self.self_tokens, self.compat = tokenizer, self_tokens, chosen_compat(compat)
        self._latents_seen = False
        replaced = window("self_replace_steps", self_replace_steps).steps(num_steps)
        self.num_self_replace = replaced.start, replaced.stop

    def prepare(self, tokenizer: Any) -> None:
        super().prepare(tokenizer)
        if self.local_blend is not None and hasattr(self.local_blend, "prepare"):
            self.local_blend.prepare(tokenizer)

    def between_steps(self) -> None:
        super().between_steps()
        # The first step's latents are handed over after its last layer, so the second one tells.
        if self.local_blend is not None and self.cur_step == 2 and not self._latents_seen:
            warn(
                "the local blend does nothing: nobody handed the controller the latents of a step, as a pipeline's own "
                "call does not; call ptp_utils.text2image_ldm_stable, or controller.step_callback(latents) after steps",
                EditWarning,
            )

    def reset(self) -> None:
        super().reset()
        self._latents_seen = False
        if self.local_blend is not None and hasattr(self.local_blend, "reset"):
            self.local_blend.reset()

    @property
    def max_num_words(self) -> int:
        """Tokens of a padded prompt."""
        return tokens_of_words(self.prompts[0], [], self.tokenizer, self.compat)[0]

    @cached_property
    def cross_replace_alpha(self) -> torch.Tensor:
        """[steps + 1, targets, 1, 1, M]: 1 where a token's column is the source's."""
        tokenizer = required(self.tokenizer)
        return get_time_words_attention_alpha(
            self.prompts, self.num_steps, self.cross_replace_steps, tokenizer, self.max_num_words, self.compat
        )

    def step_callback(self, x_t: torch.Tensor) -> torch.Tensor:
        """The latents after a step, blended where that was asked."""
        self._latents_seen = True
        return x_t if self.local_blend is None else self.local_blend(x_t, self.attention_store)

    def replace_self_attention(self, attn_base: Any, att_replace: Any) -> Any:
        """The targets' maps [targets, heads, N, N] in a replaced step, from the source's [heads, N, N]."""
        if att_replace.shape[2] > self.self_tokens:
            return att_replace
        return attn_base[None].expand(att_replace.shape[0], -1, -1, -1)

    @abc.abstractmethod
    def replace_cross_attention(self, attn_base: Any, att_replace: Any) -> Any:
        """The targets' maps [targets, heads, N, M] where all of them is replaced, from the source's [heads, N, M]."""

    def forward(self, attn: Any, is_cross: bool, place_in_unet: str) -> Any:
        """The map, edited in place and kept."""
        super().forward(attn, is_cross, place_in_unet)
        if self.rows != self.batch_size if self.rows else attn.shape[0] % self.batch_size:
            raise ValueError(
                f"the controller is made for {self.batch_size} prompts; the batch has {self.rows}: make a controller "
                "with the prompts of the call"
            )
        replaces_self = self.num_self_replace[0] <= self.cur_step < self.num_self_replace[1]
        if not is_cross and not replaces_self:
            return attn
        by_prompt = attn.reshape(self.batch_size, -1, *attn.shape[1:])
        attn_base, att_replace = by_prompt[0], by_prompt[1:]
        if not is_cross:
            by_prompt[1:] = self.replace_self_attention(attn_base, att_replace)
            return attn
        alpha = self._alpha()
        if alpha.any():
            edited = self.replace_cross_attention(attn_base, att_replace)
            # Where every token is replaced, the targets' own maps need not be computed.
            by_prompt[1:] = edited if alpha.all() else edited * alpha + (1 - alpha) * att_replace
        return attn

    def _alpha(self) -> torch.Tensor:
        if self.cur_step >= len(self.cross_replace_alpha):
            raise RuntimeError(
                f"the controller is made for {self.num_steps} steps, and this is step {self.cur_step}: call reset() "
                "before another run, or make it with the run's number of steps"
            )
        return self.cross_replace_alpha[self.cur_step]


class AttentionReplace(AttentionControlEdit):
    """Word for word, for prompts of equally many words."""

    @cached_property
    def mapper(self) -> torch.Tensor:
        """[targets, M, M]: the columns of the source's map as the targets' tokens."""
        tokenizer = required(self.tokenizer)
        return seq_aligner.get_replacement_mapper(self.prompts, tokenizer, self.max_num_words, self.compat)

    def replace_cross_attention(self, attn_base: Any, att_replace: Any) -> Any:
        return attn_base[None].mix(self.mapper[:, None])


class AttentionRefine(AttentionControlEdit):
    """For targets with more words: those that both prompts have take the source's columns, others keep their own."""

    @cached_property
    def mapper(self) -> torch.Tensor:
        """[targets, M, M]: the columns of the source's map as the targets' tokens."""
        return self._refined[0].float()

    @cached_property
    def alphas(self) -> torch.Tensor:
        """[targets, 1, 1, M]: 1 where the column is the source's."""
        return self._refined[1].float()[:, None, None]

    @cached_property
    def _refined(self) -> tuple[torch.Tensor, torch.Tensor]:
        return seq_aligner.refinement_matrices(self.prompts, required(self.tokenizer), self.compat)

    def replace_cross_attention(self, attn_base: Any, att_replace: Any) -> Any:
        return attn_base[None].mix(self.mapper[:, None] * self.alphas) + att_replace * (1 - self.alphas)


class AttentionReweight(AttentionControlEdit):
    """The source's maps, or those of another controller, with factors for words.

    Args:
        prompts, num_steps, cross_replace_steps, self_replace_steps, local_blend: as of :class:`AttentionControlEdit`.
        equalizer: [1 | targets, M], or what ``get_equalizer`` gave.
        controller: whose maps are weighted; default: the source's own.
        options: as of :class:`AttentionControlEdit`.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        num_steps: int,
        cross_replace_steps: Any,
        self_replace_steps: Any,
        equalizer: torch.Tensor | WordFactors,
        local_blend: LocalBlend | None = None,
        controller: AttentionControlEdit | None = None,
        **options: Any,
    ) -> None:
        super().__init__(prompts, num_steps, cross_replace_steps, self_replace_steps, local_blend, **options)
        self.prev_controller = controller
        self._equalizer = equalizer

    def prepare(self, tokenizer: Any) -> None:
        super().prepare(tokenizer)
        if self.prev_controller is not None:
            self.prev_controller.prepare(tokenizer)

    @cached_property
    def equalizer(self) -> torch.Tensor:
        """[1 | targets, M]: factors of the targets' tokens."""
        given = self._equalizer
        return given.tensor(required(self.tokenizer), self.compat) if isinstance(given, WordFactors) else given

    def replace_cross_attention(self, attn_base: Any, att_replace: Any) -> Any:
        if self.prev_controller is None:
            edited = attn_base[None]
        else:
            edited = self.prev_controller.replace_cross_attention(attn_base, att_replace)
        return edited * self.equalizer[:, None, None]


def make_controller(
    prompts: Sequence[str],
    is_replace_controller: bool,
    cross_replace_steps: Any,
    self_replace_steps: Any,
    blend_words: Sequence[str | Sequence[str]] | None = None,
    equilizer_params: dict[str, Any] | None = None,
    *,
    num_steps: int = 50,
    **options: Any,
) -> AttentionControlEdit:
    """The controller of a real image's edit, as the null-text notebook puts it together.

    Args:
        prompts: the image's prompt and its targets.
        is_replace_controller: :class:`AttentionReplace`, or else :class:`AttentionRefine`.
        cross_replace_steps, self_replace_steps: as of :class:`AttentionControlEdit`.
        blend_words: for each prompt a word, or several, outside of which the image stays as it is.
        equilizer_params: ``{"words": …, "values": …}``: factors of words of the first target.
        num_steps: of the run.
        options: as of :class:`AttentionControlEdit`.

    Raises:
        ValueError: ``equilizer_params`` without its two entries or with others, and what :class:`LocalBlend`,
            :func:`get_equalizer` and :class:`AttentionControlEdit` refuse.
    """
    compat, tokenizer = options.get("compat"), options.get("tokenizer")
    blend = None
    if blend_words is not None:
        blend = LocalBlend(
            prompts, blend_words, start_blend=0.2, num_steps=num_steps, tokenizer=tokenizer, compat=compat
        )
    kind = AttentionReplace if is_replace_controller else AttentionRefine
    arguments = (prompts, num_steps, cross_replace_steps, self_replace_steps)
    controller = kind(*arguments, blend, **options)
    if equilizer_params is None:
        return controller
    if not isinstance(equilizer_params, Mapping) or set(equilizer_params) != {"words", "values"}:
        raise ValueError(
            f'equilizer_params: expected {{"words": …, "values": …}}, words of the first target and a factor for each, '
            f"got {equilizer_params!r}"
        )
    factors = get_equalizer(prompts[1], equilizer_params["words"], equilizer_params["values"], tokenizer, compat)
    return AttentionReweight(*arguments, factors, blend, controller, **options)
