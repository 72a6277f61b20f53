"""What an edit is, and edits that act together."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step
from ..prompts.encoding import Encoding
from ..prompts.words import short_form
from .products import Product
from .selection import LayerSelection
from .watchers import Watcher

__all__ = ["CombinedEdit", "Edit", "SelfAttentionEdit", "Windows", "check_compat", "check_prompts"]

Products = Mapping[int, Product | Sequence[Product]]
Windows = Sequence[tuple[str, Callable[[Step], bool]]]


@dataclass(frozen=True)
class Edit(ABC):
    """An edit of a UNet's attention, as a pure function of site, step and roles.

    A subclass writes :meth:`products`; :meth:`select` and :meth:`active` narrow where and when it is asked. Two edits
    added to one another (``a + b``) are a :class:`CombinedEdit`.
    """

    @property
    def pairs_pixels(self) -> bool:
        """Whether a target is its source's image with some pixels changed, so that both start from the same noise."""
        return True

    @abstractmethod
    def products(self, site: Site, step: Step, roles: BatchRoles) -> Products:
        """What the rows of a layer become; rows left out stay as they are, and an empty mapping leaves the
        layer to the processor it had before."""

    def select(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """The sites that the edit is asked about. It raises where none is left.

        A session calls it once without sizes (``site.grid`` is None) and again for every size of latent.
        """
        return sites

    def active(self, step: Step) -> bool:
        """Whether the edit is asked at this step; elsewhere the batch may have any layout."""
        return True

    def phase(self, step: Step) -> Hashable:
        """What of a step :meth:`products` and :meth:`features` follow from, where the edit is active.

        At steps of equal phases a site and roles get the same products, and a session asks for them once. None, the
        default, is a phase of its own for every step: for products that follow from the step itself or from the run.
        A subclass that writes :meth:`products` anew starts from the default.
        """
        return None

    def phases(self, total: int) -> tuple[range, ...]:
        """The runs of steps in a schedule of ``total`` in which a UNet call does the same work.

        One graph, compiled or captured, serves all steps of a run::

            >>> from fpe_pipeline import FreePromptEdit
            >>> FreePromptEdit(0.8).phases(50)
            (range(0, 40), range(40, 50))
        """
        runs: list[range] = []
        latest: Hashable = None
        for step in (Step(index, total) for index in range(total)):
            phase = ("active", self.phase(step)) if self.active(step) else ("left alone",)
            if runs and phase == latest and phase != ("active", None):
                runs[-1] = range(runs[-1].start, step.index + 1)
            else:
                runs.append(range(step.index, step.index + 1))
            latest = phase
        return tuple(runs)

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "products" in vars(cls) and "phase" not in vars(cls):
            setattr(cls, "phase", Edit.phase)  # noqa: B010  what it inherits speaks of other products

    def windows(self) -> Windows:
        """The parts of the edit, each as the words that say when it acts and whether it does at a step.

        A session warns of a part that acted at no step of a run. What is asked to do nothing, such as a window of no
        width, is left out: () is an edit that leaves everything as it is, and is meant to.
        """
        return (("its active steps", self.active),)

    def begin(self) -> Edit:
        """What a session asks for the length of its ``with`` block: an edit that remembers anything of a run
        gives an object of its own, so that the edit itself stays a description."""
        return self

    def encoded(self, encoding: Encoding) -> Edit:
        """The edit for what the pipeline encodes, asked once a pipeline call; one that knows words places them here."""
        return self

    def watchers(self) -> tuple[Watcher, ...]:
        """What follows the run for the edit; asked once a session, of what :meth:`begin` gave."""
        return ()

    @property
    def feature_modules(self) -> tuple[str, ...]:
        """Paths of the modules of which :meth:`features` speaks."""
        return ()

    def features(self, step: Step, roles: BatchRoles) -> Mapping[str, Mapping[int, int]]:
        """For some of :attr:`feature_modules`, the rows whose output is another row's: ``{path: {row: source}}``."""
        return {}

    def written_for(self) -> tuple[str, ...]:
        """The prompts that it aligned, the source's first; the source's alone where targets may be any, () where all
        may."""
        return ()

    def __add__(self, other: Edit) -> CombinedEdit:
        if not isinstance(other, Edit):
            return NotImplemented
        return CombinedEdit((self, other))


@dataclass(frozen=True)
class SelfAttentionEdit(Edit):
    """An edit of self-attention layers, which at most one of three arguments selects.

    Args:
        levels: how often the edited layers' input is downsampled from the latent: an int or several.
        max_tokens: edit layers of at most so many tokens, at any image size; 0 for no layer.
        layers: module paths, beginnings of paths, or indices among the self-attention layers.
    """

    levels: int | Iterable[int] | None = field(default=None, kw_only=True)
    max_tokens: int | None = field(default=None, kw_only=True)
    layers: str | int | Iterable[str | int] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        selection = self._selection()
        self._normalise(levels=selection.levels, max_tokens=selection.max_tokens, layers=selection.layers)

    def select(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        if all(value is None for value in (self.levels, self.max_tokens, self.layers)):
            return self.default_sites(sites)
        return self._selection().match(sites)

    def default_sites(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """The layers that are edited where none of the three arguments is given: all of self-attention."""
        return self._selection().match(sites, by_default=True)

    def _selection(self) -> LayerSelection:
        return LayerSelection.parse("self", levels=self.levels, max_tokens=self.max_tokens, layers=self.layers)

    def _normalise(self, **values: Any) -> None:
        """Store fields as the edit understands them, so that equal edits compare equal."""
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the way to do it in a frozen dataclass


@dataclass(frozen=True)
class CombinedEdit(Edit):
    """Several edits at once, such as ``FreePromptEdit() + PromptToPromptEdit(…, self_replace_steps=0)``.

    Each edit keeps its own layers and steps. Where two of them would say what one row of one layer becomes, neither
    can be right alone, and the session raises.

    Args:
        edits: at least one; combined edits among them count as their parts.
    """

    edits: Sequence[Edit]

    def __post_init__(self) -> None:
        edits: list[Edit] = []
        for edit in self.edits:
            if not isinstance(edit, Edit):
                raise TypeError(f"expected edits to combine, got {type(edit).__name__}")
            edits += edit.edits if isinstance(edit, CombinedEdit) else [edit]
        if not edits:
            raise ValueError("expected at least one edit to combine")
        object.__setattr__(self, "edits", tuple(edits))

    def begin(self) -> Edit:
        return _RunningCombination(tuple(edit.begin() for edit in self.edits))

    def encoded(self, encoding: Encoding) -> Edit:
        edits = tuple(edit.encoded(encoding) for edit in self.edits)
        return self if all(map(operator.is_, edits, self.edits)) else replace(self, edits=edits)

    def select(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        return self.begin().select(sites)

    def active(self, step: Step) -> bool:
        return any(edit.active(step) for edit in self.edits)

    def phase(self, step: Step) -> Hashable:
        phases = tuple(edit.phase(step) if edit.active(step) else () for edit in self.edits)
        return None if None in phases else (phases, tuple(edit.active(step) for edit in self.edits))

    @property
    def pairs_pixels(self) -> bool:
        return any(edit.pairs_pixels for edit in self.edits)

    def windows(self) -> Windows:
        return tuple((f"{type(edit).__name__}'s {what}", acts) for edit in self.edits for what, acts in edit.windows())

    def written_for(self) -> tuple[str, ...]:
        """Raises ValueError where two of the edits aligned other prompts."""
        given = {edit.written_for() for edit in self.edits}
        most = max(given, key=len)
        if any(prompts != most[: len(prompts)] or len(prompts) not in (0, 1, len(most)) for prompts in given):
            raise ValueError(f"the combined edits are written for different prompts: {sorted(given - {()})}")
        return most

    def products(self, site: Site, step: Step, roles: BatchRoles) -> Products:
        """The products of all edits at a site, were it selected by all of them."""
        return _merged(self.edits, site, step, roles)

    @property
    def feature_modules(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(path for edit in self.edits for path in edit.feature_modules))

    def features(self, step: Step, roles: BatchRoles) -> Mapping[str, Mapping[int, int]]:
        out: dict[str, dict[int, int]] = {}
        for edit in self.edits:
            for path, rows in edit.features(step, roles).items() if edit.active(step) else ():
                given = out.setdefault(path, {})
                if given.keys() & rows.keys():
                    raise ValueError(f"two of the combined edits replace features of the same rows in {path}")
                given.update(rows)
        return out


@dataclass(frozen=True)
class _RunningCombination(CombinedEdit):
    """A combination in a session: it remembers which of its edits selected which layers."""

    _owners: dict[Site, set[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def begin(self) -> Edit:
        return self

    def select(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        for number, edit in enumerate(self.edits):
            for site in edit.select(sites):
                self._owners.setdefault(site, set()).add(number)
        return tuple(site for site in sites if site in self._owners)

    phase = CombinedEdit.phase

    def products(self, site: Site, step: Step, roles: BatchRoles) -> Products:
        owners = self._owners.get(site, ())
        return _merged([edit for number, edit in enumerate(self.edits) if number in owners], site, step, roles)

    def watchers(self) -> tuple[Watcher, ...]:
        return tuple(watcher for edit in self.edits for watcher in edit.watchers())


def _merged(edits: Iterable[Edit], site: Site, step: Step, roles: BatchRoles) -> Products:
    out: dict[int, Product | Sequence[Product]] = {}
    said: dict[int, Edit] = {}
    for edit in edits:
        for row, given in edit.products(site, step, roles).items() if edit.active(step) else ():
            if row in said:
                raise ValueError(
                    f"{type(said[row]).__name__} and {type(edit).__name__} both replace row {row} of {site.path} at "
                    f"step {step.index}: give them different layers (levels=, max_tokens=, layers=) or different steps"
                )
            out[row], said[row] = given, edit
    return out


def check_compat(compat: Any) -> None:
    """Raise ValueError for anything but None and "original"."""
    if compat not in (None, "original"):
        raise ValueError(f'expected compat to be None or "original", got {compat!r}')


def check_prompts(edit: Edit, prompts: Sequence[str], tokenizer: Any = None) -> None:
    """Raise ValueError for an edit that is written for other prompts than these.

    Args:
        edit: any.
        prompts: those of the call, the source's first; the source's alone where its targets are not known yet.
        tokenizer: the pipeline's, which knows the tokens of several vectors.
    """
    written = edit.written_for()
    given = [short_form(prompt, tokenizer) for prompt in prompts] if written else []
    begins_so = all(own == other for own, other in zip(written, given, strict=False))
    if not begins_so or (len(written) > 1 and len(prompts) not in (1, len(written))):
        raise ValueError(
            f"{type(edit).__name__} is written for the prompts {list(written)}, got {list(prompts)}: write it "
            "for the source and the targets of the call, in their order"
        )
