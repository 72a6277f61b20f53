"""What an edit is, and edits that act together."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step, StepWindow
from ..prompts.encoding import Encoding
from ..prompts.words import short_form
from .joint_products import AnyProduct
from .watchers import Watcher

__all__ = [
    "CombinedEdit",
    "Edit",
    "Features",
    "Injecting",
    "Products",
    "Prompted",
    "Remembering",
    "Watching",
    "Windows",
    "begun",
    "check_compat",
    "check_prompts",
    "check_whole",
    "encoded_edit",
    "feature_modules_of",
    "features_of",
    "merged_products",
    "parts_of",
    "prompts_of",
    "watchers_of",
]

Products = Mapping[int, AnyProduct | Sequence[AnyProduct]]
Features = Mapping[str, Mapping[int, int]]
Windows = Sequence[tuple[str, Callable[[Step], bool]]]


@dataclass(frozen=True)
class Edit(ABC):
    """An edit of a model's attention, as a pure function of site, step and roles.

    A subclass writes :meth:`products`; :meth:`select` and :meth:`active` narrow where and when it is asked. Two edits
    added to one another (``a + b``) are a :class:`CombinedEdit`. What else an edit may do are protocols, which it
    serves by having their methods: :class:`Watching`, :class:`Injecting`, :class:`Prompted` and :class:`Remembering`.
    """

    @property
    def pairs_pixels(self) -> bool:
        """Whether a target is its source's image with some pixels changed, so that both start from the same noise."""
        return True

    @abstractmethod
    def products(self, site: Site, step: Step, roles: BatchRoles) -> Products:
        """What the rows of a layer become: of a UNet's layer `Product`s, of a transformer's joint one `JointProduct`s.

        Rows left out stay as they are, and an empty mapping leaves the layer to the processor it had before.
        """

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
        return (("its `active`", self.active),)

    def _normalise(self, **values: Any) -> None:
        """Store fields as the edit understands them, so that equal edits compare equal; a window as its fractions."""
        for name, value in values.items():
            stored = (value.start, value.stop) if isinstance(value, StepWindow) else value
            object.__setattr__(self, name, stored)  # the way to do it in a frozen dataclass

    def __add__(self, other: Edit) -> CombinedEdit:
        if not isinstance(other, Edit):
            return NotImplemented
        return CombinedEdit((self, other))


@runtime_checkable
class Watching(Protocol):
    """An edit that follows the run: it reads maps, or changes latents between steps."""

    def watchers(self) -> tuple[Watcher, ...]:
        """What follows the run for it; asked once a session, of what :class:`Remembering` edits gave for it."""


@runtime_checkable
class Injecting(Protocol):
    """An edit that replaces the output of modules other than attention."""

    @property
    def feature_modules(self) -> tuple[str, ...]:
        """Paths of the modules of which :meth:`features` speaks."""

    def features(self, step: Step, roles: BatchRoles) -> Features:
        """For some of :attr:`feature_modules`, the rows whose output is another row's: ``{path: {row: source}}``."""


@runtime_checkable
class Prompted(Protocol):
    """An edit that knows the words of its prompts."""

    def written_for(self) -> tuple[str, ...]:
        """The prompts that it aligned, the source's first; the source's alone where targets may be any, () where all
        may."""

    def encoded(self, encoding: Encoding) -> Edit:
        """The edit for what the pipeline encodes, asked once a pipeline call: its words are placed here."""


@runtime_checkable
class Remembering(Protocol):
    """An edit that remembers something of a run."""

    def begin(self) -> Edit:
        """An object of its own for the length of a session's ``with`` block, so that the edit stays a description."""


_PROTOCOLS: Mapping[type, tuple[str, ...]] = {
    Injecting: ("feature_modules", "features"),
    Prompted: ("written_for", "encoded"),
}


def watchers_of(edit: Edit) -> tuple[Watcher, ...]:
    """What follows a run for an edit."""
    return edit.watchers() if isinstance(edit, Watching) else ()


def feature_modules_of(edit: Edit) -> tuple[str, ...]:
    """Paths of the modules whose output an edit replaces at some step."""
    return edit.feature_modules if isinstance(edit, Injecting) else ()


def features_of(edit: Edit, step: Step, roles: BatchRoles) -> Features:
    """The features that an edit replaces at a step."""
    return edit.features(step, roles) if isinstance(edit, Injecting) else {}


def prompts_of(edit: Edit) -> tuple[str, ...]:
    """The prompts that an edit is written for, the source's first; () where it serves any."""
    return edit.written_for() if isinstance(edit, Prompted) else ()


def encoded_edit(edit: Edit, encoding: Encoding) -> Edit:
    """An edit for what the pipeline encodes."""
    return edit.encoded(encoding) if isinstance(edit, Prompted) else edit


def begun(edit: Edit) -> Edit:
    """What a session asks for the length of its ``with`` block."""
    return edit.begin() if isinstance(edit, Remembering) else edit


def parts_of(edit: Edit) -> tuple[Edit, ...]:
    """The edits of a combination, or the edit alone: each selects its own layers."""
    return tuple(edit.edits) if isinstance(edit, CombinedEdit) else (edit,)


def check_whole(edit: Edit) -> None:
    """Raise TypeError for an edit that serves half of a protocol, which would be passed over in silence."""
    for part in parts_of(edit):
        for protocol, names in _PROTOCOLS.items():
            missing = [name for name in names if not hasattr(part, name)]
            if 0 < len(missing) < len(names):
                raise TypeError(
                    f"{type(part).__name__} has {', '.join(n for n in names if n not in missing)} and no "
                    f"{', '.join(missing)}: an edit that is {protocol.__name__} has both (see fpe_pipeline.edits.base)"
                )


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
        self._normalise(edits=tuple(edits))

    def begin(self) -> Edit:
        """What a session asks for the length of its ``with`` block."""
        return self._of(begun(edit) for edit in self.edits)

    def encoded(self, encoding: Encoding) -> Edit:
        """The edit for what the pipeline encodes."""
        return self._of(encoded_edit(edit, encoding) for edit in self.edits)

    def _of(self, edits: Iterable[Edit]) -> Edit:
        edits = tuple(edits)
        return self if all(map(operator.is_, edits, self.edits)) else replace(self, edits=edits)

    def watchers(self) -> tuple[Watcher, ...]:
        """What follows the run for it."""
        return tuple(watcher for edit in self.edits for watcher in watchers_of(edit))

    def select(self, sites: tuple[Site, ...]) -> tuple[Site, ...]:
        """The sites of any of the edits; a session asks each for its own."""
        chosen = {site for edit in self.edits for site in edit.select(sites)}
        return tuple(site for site in sites if site in chosen)

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
        given = {prompts_of(edit) for edit in self.edits}
        most = max(given, key=len)
        if any(prompts != most[: len(prompts)] or len(prompts) not in (0, 1, len(most)) for prompts in given):
            raise ValueError(f"the combined edits are written for different prompts: {sorted(given - {()})}")
        return most

    def products(self, site: Site, step: Step, roles: BatchRoles) -> Products:
        """The products of all edits at a site, were it selected by all of them."""
        return merged_products(self.edits, site, step, roles)

    @property
    def feature_modules(self) -> tuple[str, ...]:
        """Paths of the modules whose output is replaced."""
        return tuple(dict.fromkeys(path for edit in self.edits for path in feature_modules_of(edit)))

    def features(self, step: Step, roles: BatchRoles) -> Features:
        """The rows whose output is another row's, by module."""
        out: dict[str, dict[int, int]] = {}
        for edit in self.edits:
            for path, rows in features_of(edit, step, roles).items() if edit.active(step) else ():
                given = out.setdefault(path, {})
                if given.keys() & rows.keys():
                    raise ValueError(f"two of the combined edits replace features of the same rows in {path}")
                given.update(rows)
        return out


def merged_products(edits: Iterable[Edit], site: Site, step: Step, roles: BatchRoles) -> Products:
    """What edits make of a site together, of those that are active.

    Raises:
        ValueError: two of them replace the same row.
    """
    out: dict[int, Any] = {}
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
    written = prompts_of(edit)
    given = [short_form(prompt, tokenizer) for prompt in prompts] if written else []
    begins_so = all(own == other for own, other in zip(written, given, strict=False))
    if not begins_so or (len(written) > 1 and len(prompts) not in (1, len(written))):
        raise ValueError(
            f"{type(edit).__name__} is written for the prompts {list(written)}, got {list(prompts)}: write it "
            "for the source and the targets of the call, in their order"
        )
