"""Which row of a model's batch is what: unconditional or conditional, source or target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

__all__ = ["BatchRoles"]


@dataclass(frozen=True)
class BatchRoles:
    """The role of every row of a batch that a model denoises in one call.

    Most pipelines' layout comes from :meth:`from_batch`. Unusual layouts (Plug-and-Play's
    ``[source, unconditional, conditional]``, say) are written down as they are::

        BatchRoles(conditional=(True, False, True), source_of=(0, 0, 0))

    Args:
        conditional: for each row, whether it is conditioned on its prompt; False for the rows of
            classifier-free guidance that see the negative prompt.
        source_of: for each row, the row of its source. A source's source is itself.
        prompts: for each row, the number of its prompt (its conditional row's, where it is unconditional). Default:
            the rows of either half are counted.
        recorded: how many of the rows, the last ones, are not in the batch but known from a recording.
    """

    conditional: tuple[bool, ...]
    source_of: tuple[int, ...]
    prompts: tuple[int, ...] = ()
    recorded: int = 0

    def __post_init__(self) -> None:
        rows = len(self.conditional)
        if rows == 0 or len(self.source_of) != rows:
            raise ValueError(f"expected one source for each of {rows} rows (at least 1), got {len(self.source_of)}")
        if not self.prompts:
            counted = (self.conditional[:row].count(flag) for row, flag in enumerate(self.conditional))
            object.__setattr__(self, "prompts", tuple(counted))  # the way to do it in a frozen dataclass
        if len(self.prompts) != rows:
            raise ValueError(f"expected the prompt of each of {rows} rows, got {len(self.prompts)}")
        for row, source in enumerate(self.source_of):
            if not 0 <= source < rows:
                raise ValueError(f"row {row} names row {source} as its source; the batch has rows 0 to {rows - 1}")
            if self.source_of[source] != source:
                raise ValueError(
                    f"row {row} names row {source} as its source, which is a target of row {self.source_of[source]}: "
                    "a source must be its own source"
                )

    @classmethod
    def from_batch(
        cls,
        rows: int,
        *,
        classifier_free_guidance: bool,
        images_per_prompt: int = 1,
        source_of: Sequence[int] | None = None,
        prompts_first: bool = False,
    ) -> BatchRoles:
        """The layout of diffusers' pipelines: ``[unconditional rows …, conditional rows …]``, prompt by prompt.

        Args:
            rows: the batch size of the call.
            classifier_free_guidance: whether the batch holds an unconditional half.
            images_per_prompt: ``num_images_per_prompt`` of the pipeline call; image i of a target
                takes the map of image i of its source.
            source_of: for each *prompt*, the index of its source prompt; default: all from prompt 0.
            prompts_first: whether the conditional rows come before the unconditional ones (Z-Image).

        Raises:
            ValueError: where the batch does not divide into these parts.
        """
        if images_per_prompt < 1:
            raise ValueError(f"expected images_per_prompt >= 1, got {images_per_prompt}")
        halves = 2 if classifier_free_guidance else 1
        if rows < 1 or rows % (halves * images_per_prompt):
            raise ValueError(
                f"a batch of {rows} rows is not prompts × {images_per_prompt} images per prompt × {halves} "
                f"(classifier-free guidance {'on' if classifier_free_guidance else 'off'}): pass the pipeline call's "
                "num_images_per_prompt as editing(..., images_per_prompt=), whether guidance is on as "
                "classifier_free_guidance=, or the whole layout as roles="
            )
        prompts = rows // (halves * images_per_prompt)
        sources = (0,) * prompts if source_of is None else tuple(source_of)
        if len(sources) != prompts:
            raise ValueError(f"source_of names the sources of {len(sources)} prompts; the batch holds {prompts}")
        if not all(0 <= source < prompts for source in sources):
            raise ValueError(f"source_of={sources} names a prompt outside the batch's prompts 0 to {prompts - 1}")
        half = prompts * images_per_prompt
        first, second = (True,) * half, (False,) * (rows - half)
        return cls(
            conditional=first + second if prompts_first else second + first,
            source_of=tuple(
                offset + source * images_per_prompt + image
                for offset in range(0, rows, half)
                for source in sources
                for image in range(images_per_prompt)
            ),
            prompts=tuple(prompt for _ in range(halves) for prompt in range(prompts) for _ in range(images_per_prompt)),
        )

    @classmethod
    def from_recording(cls, targets: int, *, classifier_free_guidance: bool, prompts_first: bool = False) -> BatchRoles:
        """A batch of targets alone, whose source is recorded::

            [unconditional targets …, conditional targets …] and then, not in the batch, [unconditional source, source]

        Args:
            targets: how many.
            classifier_free_guidance: whether there are unconditional rows.
            prompts_first: whether the conditional rows of each part come before the unconditional ones (Z-Image).
        """
        halves = ((True, False) if prompts_first else (False, True)) if classifier_free_guidance else (True,)
        first = len(halves) * targets
        return cls(
            conditional=(*(half for half in halves for _ in range(targets)), *halves),
            source_of=(
                *(first + half for half in range(len(halves)) for _ in range(targets)),
                *range(first, first + len(halves)),
            ),
            prompts=(*(1 + target for _ in halves for target in range(targets)), *(0 for _ in halves)),
            recorded=len(halves),
        )

    @property
    def rows(self) -> int:
        """Rows in the batch and recorded ones."""
        return len(self.conditional)

    @property
    def batch(self) -> int:
        """The batch size."""
        return self.rows - self.recorded

    def prompt_of(self, row: int) -> int:
        """The number of a row's prompt in the pipeline call."""
        return self.prompts[row]

    def image_of(self, row: int) -> tuple[int, int]:
        """The image of a row, as (prompt, number among the prompt's images): rows move when guidance ends, images do
        not."""
        before = (other for other in range(row) if self.conditional[other] is self.conditional[row])
        return self.prompts[row], sum(self.prompts[other] == self.prompts[row] for other in before)

    @property
    def images(self) -> tuple[tuple[int, int], ...]:
        """The images of the conditional rows, in their order."""
        return tuple(self.image_of(row) for row in self.select(conditional=True))

    def without_guidance(self) -> BatchRoles:
        """The layout once guidance has ended: the conditional rows alone."""
        kept = self.select(conditional=True)
        return BatchRoles(
            conditional=(True,) * len(kept),
            source_of=tuple(kept.index(self.source_of[row]) for row in kept),
            prompts=tuple(self.prompts[row] for row in kept),
            recorded=sum(row >= self.batch for row in kept),
        )

    def all_unconditional(self) -> BatchRoles:
        """The same images, each row of which sees the negative prompt: a pipeline that guides in two calls."""
        return replace(self, conditional=(False,) * self.rows)

    def select(self, *, conditional: bool | None = None, source: bool | None = None) -> tuple[int, ...]:
        """The rows of a role, in batch order; a role left out is not asked for."""
        return tuple(
            row
            for row in range(self.rows)
            if (conditional is None or self.conditional[row] is conditional)
            and (source is None or (self.source_of[row] == row) is source)
        )

    @property
    def sources(self) -> tuple[int, ...]:
        """The conditional rows that are edited from."""
        return self.select(conditional=True, source=True)

    @property
    def targets(self) -> tuple[int, ...]:
        """The conditional rows that are edited."""
        return self.select(conditional=True, source=False)

    def pairs(self, *, conditional: bool | None = True) -> tuple[tuple[int, int], ...]:
        """``(source, target)`` for every target row of the conditional half, or of both (``conditional=None``).

        () where the call has no rows of that half: a pipeline that guides in two calls makes one of each.

        Raises:
            ValueError: a batch without targets, in which an edit would silently do nothing.
        """
        targets = self.select(conditional=conditional, source=False)
        if not self.select(source=False):
            raise ValueError(
                f"the batch of {self.rows} rows holds no target: pass the source prompt and at least one target prompt "
                "to the pipeline, as a list; run calls that are not to be edited in `with session.paused():`"
            )
        return tuple((self.source_of[target], target) for target in targets)
