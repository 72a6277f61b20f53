"""What a session did: which layers were replaced at which steps, what was left out, and the memory of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..models.sites import Site
from ..models.steps import Step

if TYPE_CHECKING:
    from ..edits import Edit
    from .layers.instructions import Order
    from .layers.known_rows import RecordedLayer
    from .layers.record import LayerRecord

__all__ = ["EditReport", "LayerMemory", "Replayed", "ranges", "size_in_words"]


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one call of a replaced layer.

    Args:
        held: queries, keys and values that its products are made from.
        maps: a dense map for each row of the batch, of which methods that store maps keep at least one copy.
    """

    held: int
    maps: int


@dataclass
class Replayed:
    """What a recording gave one layer or module.

    Args:
        parts: of the source's rows, in words, with the steps at which they were read.
        nbytes: read, over all steps.
        maps: bytes that the replayed maps of all steps would have taken, stored densely.
    """

    parts: dict[str, list[int]] = field(default_factory=dict)
    nbytes: int = 0
    maps: int = 0


@dataclass
class EditReport:
    """Replaced layers by step, for the latest run.

    Args:
        total: steps of the run; 0 before the first call of the model.
        layers: for each replaced layer's path, the steps at which it was replaced, in order.
        features: the same for modules whose output was replaced.
        products: for each replaced layer, what its rows became, with the steps of it.
        watched: layers that were computed only to read their maps, with the steps.
        skipped: for each layer that was to be replaced and was not, the reason and the steps of it.
        memory: for each replaced layer, the largest of its calls.
        replayed: for each layer or module that took something of a recording, what.
        idle: what was asked for and did nothing in the run, in sentences.
        noise: how rows drew their noise, in words; empty where they drew as the pipeline does.
        batch: rows of the batch; products name a recorded source's rows by the numbers after them.
        sites: the model's attention layers, of which those that were left alone are told.
    """

    total: int = 0
    layers: dict[str, list[int]] = field(default_factory=dict)
    features: dict[str, list[int]] = field(default_factory=dict)
    products: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    watched: dict[str, list[int]] = field(default_factory=dict)
    skipped: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    memory: dict[str, LayerMemory] = field(default_factory=dict)
    replayed: dict[str, Replayed] = field(default_factory=dict)
    idle: list[str] = field(default_factory=list)
    noise: str = ""
    batch: int = 0
    sites: tuple[Site, ...] = field(default=(), repr=False)
    _latest: int = field(default=-1, init=False, repr=False)
    # By layer: the order and record of its latest call, and the lists of steps that took note of it.
    _carried_out: dict[str, tuple[Any, Any, tuple[list[int], ...]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __repr__(self) -> str:
        counts = f"{len(self.layers)} layers replaced, {len(self.skipped)} left out"
        return f"{type(self).__name__}({counts} in a run of {self.total} steps; explain() says where and why)"

    def at(self, step: Step) -> EditReport:
        """The report that a call of the model at ``step`` belongs to: this one, or an empty one for a new run."""
        if step.call < self._latest or step.total != self.total:
            return EditReport(step.total, sites=self.sites, noise=self.noise)
        return self

    def add(
        self,
        step: Step,
        records: Mapping[str, tuple[Order, LayerRecord | None]],
        features: Iterable[str] = (),
        recorded: Mapping[str, RecordedLayer] | None = None,
    ) -> None:
        """Note one call of the model.

        Args:
            step: its step, for which :meth:`at` gave the report.
            records: by layer path, each order and what its processor told of it, None where it was not asked.
            features: paths of the modules whose output was replaced.
            recorded: by path, what was at hand of a recording.
        """
        self._latest = step.call
        for path, (order, record) in records.items():
            before, told, noted = self._carried_out.get(path, _NEVER)
            if before is order and told == record:
                for steps in noted:
                    if steps[-1] != step.index:
                        steps.append(step.index)
                continue
            self.batch = order.plan.rows
            if record is None or record.skipped:
                reason = "its processor was replaced or not called" if record is None else record.skipped
                _note(self.skipped.setdefault(path, {}), reason, step.index)
                continue
            if order.edited:
                self._add_edited(path, order, record, step)
            else:
                _note(self.watched, path, step.index)
            if order.recorded is not None:
                self._add_replayed(path, order.recorded, step, record.itemsize)
        for path in features:
            _note(self.features, path, step.index)
            if recorded and path in recorded:
                self._add_replayed(path, recorded[path], step, 0)

    def _add_edited(self, path: str, order: Order, record: LayerRecord, step: Step) -> None:
        _note(self.layers, path, step.index)
        _note(self.products.setdefault(path, {}), order.plan.description, step.index)
        known = self.memory.get(path, LayerMemory(0, 0))
        self.memory[path] = LayerMemory(max(record.held, known.held), max(record.maps, known.maps))
        if order.recorded is None:
            lists = self.layers[path], self.products[path][order.plan.description]
            self._carried_out[path] = order, record, lists

    def _add_replayed(self, path: str, layer: RecordedLayer, step: Step, itemsize: int) -> None:
        entry = self.replayed.setdefault(path, Replayed())
        _note(entry.parts, layer.parts, step.index)
        entry.nbytes += layer.nbytes
        entry.maps += layer.maps_nbytes(itemsize)

    def note_idle(self, name: str, edit: Edit, seen: Sequence[Step], *, blends: bool) -> None:
        """Note what of an edit did nothing in a run.

        Args:
            name: of the edit.
            edit: what was asked.
            seen: the run's steps, in order.
            blends: whether latents were blended.
        """
        windows, steps = edit.windows(), sorted({step.index for step in seen})
        made = f"the steps {steps[0]} to {steps[-1]} of {seen[0].total} that the run made"
        self.idle = [
            f"{name} did nothing by {what}, which holds none of {made}: give it another window, or the run more steps"
            for what, acts in windows
            if not any(acts(step) for step in seen)
        ]
        if windows and not (self.idle or self.layers or self.features or self.skipped or blends):
            self.idle = [f"{name} did nothing: at none of {made} did it replace anything, as its products are empty"]

    def __str__(self) -> str:
        lines = [f"{len(self.layers)} layers replaced in a run of {self.total} steps"]
        lines += [f"  {path}: steps {ranges(steps)}" for path, steps in self.layers.items()]
        lines += [f"  {path}: features, steps {ranges(steps)}" for path, steps in self.features.items()]
        return "\n".join(lines)

    def explain(self) -> str:
        """The report with what each row became, what was left out and why, and memory."""
        lines = [f"{len(self.layers)} layers replaced in a run of {self.total} steps"]
        lines += [f"noise: {self.noise}"] if self.noise else []
        lines += [f"without effect: {reason}" for reason in self.idle]
        for path, products in self.products.items():
            memory = self.memory[path]
            lines.append(f"  {path}: q, k, v {size_in_words(memory.held)}; dense maps {size_in_words(memory.maps)}")
            lines += [f"    steps {ranges(steps)}: {what}" for what, steps in products.items()]
        lines += [f"  {path}: features, steps {ranges(steps)}" for path, steps in self.features.items()]
        if self.watched:
            lines.append(f"{len(self.watched)} layers read without being replaced: heat, same output to rounding")
        for path, reasons in self.skipped.items():
            lines += [f"not replaced: {path}, steps {ranges(steps)}: {why}" for why, steps in reasons.items()]
        for kind in dict.fromkeys(site.kind for site in self.sites):
            whole = [site for site in self.sites if site.kind == kind]
            alone = [site for site in whole if site.path not in {*self.layers, *self.skipped}]
            if alone:
                levels = sorted({site.level for site in alone})
                lines.append(
                    f"left alone: {len(alone)} of {len(whole)} {kind}-attention layers (levels "
                    f"{', '.join(map(str, levels))}), which the edit does not select or never replaced"
                )
        if self.memory:
            held = max(self.memory.values(), key=lambda memory: memory.held).held
            maps = [memory.maps for memory in self.memory.values()]
            lines.append(
                f"memory: at most {size_in_words(held)} of queries, keys and values at a time; one dense map would "
                f"have taken up to {size_in_words(max(maps))}, all of a step's kept {size_in_words(sum(maps))}"
            )
        return "\n".join(lines + self._explain_replayed())

    def _explain_replayed(self) -> list[str]:
        if not self.replayed:
            return []
        read = sum(entry.nbytes for entry in self.replayed.values())
        maps = sum(entry.maps for entry in self.replayed.values())
        lines = [
            f"{len(self.replayed)} layers and modules took the source from a recording, whose rows are numbered from "
            f"{self.batch} on: {size_in_words(read)} read"
            + (f"; the maps among it would have taken {size_in_words(maps)}" if maps else "")
        ]
        for path, entry in self.replayed.items():
            would = f"; as maps {size_in_words(entry.maps)}" if entry.maps else ""
            lines.append(f"  {path}: {size_in_words(entry.nbytes)}{would}")
            lines += [f"    steps {ranges(steps)}: {what}" for what, steps in entry.parts.items()]
        return lines


_NEVER: tuple[None, None, tuple[list[int], ...]] = (None, None, ())


def _note(where: dict[str, list[int]], name: Any, step: int) -> None:
    steps = where.setdefault(name, [])
    if not steps or steps[-1] != step:
        steps.append(step)


def ranges(steps: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][1] + 1:
            runs[-1][1] = step
        else:
            runs.append([step, step])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def size_in_words(count: float) -> str:
    """``2048`` bytes as ``2 KiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"
