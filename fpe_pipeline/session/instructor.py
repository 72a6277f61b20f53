"""Who gives the instructions of a call: the layers that an edit and its watchers select, and what each is to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from ..edits import Edit
from ..edits.base import parts_of
from ..edits.watchers import Watcher
from ..models.adapters.adapter import ModelCall
from ..models.roles import BatchRoles
from ..models.sites import Site
from ..models.steps import Step
from .layers.captions import check_captions, products_of_a_run
from .layers.device_copies import Place, Placement
from .layers.instructions import Order, StandingOrders, make_orders
from .layers.kept_texts import check_kept
from .layers.known_rows import RecordedLayer
from .selected_sites import SelectedSites

__all__ = ["Instructor"]


class Instructor:
    """Orders of a session's calls, and what is kept from one to the next for them.

    Args:
        sites: of the model, of no size.
        check: raises for sites that cannot be computed.
        backend: of the attention.
    """

    #: Text tokens of recorded rows, of those that see their prompts (True) and of the others.
    recorded_lengths: Mapping[bool, int] = MappingProxyType({})

    def __init__(self, sites: tuple[Site, ...], check: Callable[[tuple[Site, ...]], None], backend: str) -> None:
        self.selected = SelectedSites(sites, check)
        self.backend = backend
        self._placement = Placement()
        self._standing = StandingOrders()

    def begin(self) -> None:
        """Ask everyone anew."""
        self.selected.clear()
        self._standing = StandingOrders()

    def forget(self, *who: Edit) -> None:
        """Give no order any more that was made for them; those that follow them are asked themselves."""
        self.selected.forget(*who)
        self._standing = StandingOrders()

    def orders(
        self,
        edit: Edit | None,
        watchers: Sequence[Watcher],
        call: ModelCall,
        step: Step,
        roles: BatchRoles,
        recorded: Mapping[str, RecordedLayer] | None,
    ) -> dict[str, Order]:
        """What the layers are to do in a call, by path; layers without an order are left as they are.

        Args:
            edit: None where it is not active.
            watchers: all of them.
            call, step, roles: the call, its step, and what its rows are.
            recorded: by layer path, where the roles have recorded rows.
        """
        sample = call.sample

        def made() -> dict[str, Order]:
            place = Place(self._placement, sample.device, sample.dtype)
            edited = [] if edit is None else [(part, self._computed(part, call)) for part in parts_of(edit)]
            watched = [(watcher, self._computed(watcher, call)) for watcher in watchers]
            context = (step, roles, self.backend, place, recorded, call.text_lengths, call.references, call.shown)
            return make_orders(edited, watched, *context)

        if watchers or recorded is not None or edit is None:
            return made()
        circumstances = (
            roles,
            call.size,
            call.left_out,
            call.text_lengths,
            call.references,
            call.shown,
            sample.device,
            sample.dtype,
        )
        return self._standing.orders(edit.phase(step), circumstances, made)

    def check(self, edit: Edit, call: ModelCall, step: Step, roles: BatchRoles) -> None:
        """Refuse what the edit would ask of texts at any step of the run that begins.

        Raises:
            ValueError: something that a model whose images are turned by their captions cannot compute, or one whose
                texts are computed once.
        """
        parts = [(part, self._computed(part, call)) for part in parts_of(edit)]
        if call.keeps_texts:
            for given in products_of_a_run(parts, step, roles):
                check_kept((row, term) for row, terms in given.items() for term in terms)
        elif call.text_lengths is not None:
            beside = (self.recorded_lengths.get(half, 0) for half in roles.conditional[roles.batch :])
            check_captions(parts, step, roles, (*call.text_lengths, *beside), not call.attends_to_padding)

    def _computed(self, who: Edit | Watcher, call: ModelCall) -> tuple[Site, ...]:
        sites = self.selected.of(who, call.size)
        return tuple(site for site in sites if call.computes(site.path)) if call.left_out else sites
