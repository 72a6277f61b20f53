"""README tables, made of rows. Every function takes all rows and returns Markdown; `TABLES` names them.

A table whose rows are not there says so: what has not been measured is not passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from fpe_pipeline.texts import markdown_table

from .cases import LAYOUTS, MODELS, OPS, PIXELS, TARGETS, Case, headline_cases, kernel_cases
from .growth import Growth, input_bytes
from .joint_table import flow_inversion, joint_steps
from .providers import case_label
from .report import number, our_row
from .rows import Ratio, Row
from .table_parts import (
    DENSE,
    GATHERED,
    MEMORY_LIMIT,
    PLACEMENTS,
    TITLES,
    UNEDITED,
    beside,
    best_sdpa,
    grouped,
    not_yet,
    slower,
)
from .unets import COMPILED, GRAPH, WORDS, UNetCase
from .waits import first_pictures


def headline(rows: Sequence[Row], gpu: bool) -> str:
    cases = grouped(rows, "kernels", gpu)
    lines, used = [], []
    for case in headline_cases():
        providers = cases.get(case.name, {})
        ours = our_row(providers.values())
        if ours is None:
            continue
        used.append(ours)
        others = [slower(providers.get(DENSE), ours), slower(best_sdpa(providers), ours)]
        others.append(slower(providers.get(UNEDITED), ours))
        lines.append([case_label(case), number(ours.median_ms, " ms"), *others, number(ours.percent_of_limit, " %")])
    if not lines:
        return not_yet(gpu, "Kernels")
    heading = ["shared map, values of every row", "ours", "dense original ÷ ours", "best SDPA ÷ ours"]
    return markdown_table([*heading, "unedited ÷ ours", "of the machine's limit"], lines) + "\n\n" + beside(used)


def claim(rows: Sequence[Row], gpu: bool) -> str:
    """What the headline says in a sentence: the least and the most that sharing gains over unedited attention."""
    cases = grouped(rows, "kernels", gpu)
    found = []
    for case in headline_cases():
        ours, base = our_row(cases.get(case.name, {}).values()), cases.get(case.name, {}).get(UNEDITED)
        if ours is not None and base is not None and base.samples_ms:
            found.append((Ratio.of(ours, base).median, case, ours))
    if not found:
        device = "a GPU" if gpu else "a CPU"
        known = "only the work a score, the memory and what is compiled are known"
        return f"*Sharing: not measured on {device} yet; {known}.*"
    words = " and ".join(f"{ratio:.2f} × at head dim {case.head_dim}" for ratio, case, _ in found)
    name = found[0][2].device.split(": ", 1)[-1]
    least = min(ratio for ratio, _, _ in found)
    verb = "is faster than" if least > 1 else "is not faster than"
    return (
        f"On {name} ({found[0][2].dtype}) the attention of a source and a target that share one map {verb} what it "
        f"replaces, in the fastest form that PyTorch chooses there: {words}, at {found[0][1].tokens} tokens."
    )


def rivals(rows: Sequence[Row], gpu: bool) -> str:
    """Everyone in the headline cases, with the reasons of those that are missing."""
    cases = grouped(rows, "kernels", gpu)
    named = [cases.get(case.name, {}) for case in headline_cases()]
    ours = [our_row(providers.values()) for providers in named]
    if None in ours:
        return not_yet(gpu, "Rivals")
    absent = cases.get("any", {})
    lines = []
    for name in dict.fromkeys([*absent, *(name for providers in named for name in providers)]):
        found = [providers.get(name) for providers in named]
        cells = []
        for row, own in zip(found, ours, strict=True):
            measured = row is not None and row.median_ms is not None
            cells += [number(row.median_ms) if measured and row else "–", slower(row, own), _peak(row)]
        reason = next((row.reason for row in [absent.get(name), *found] if row is not None and row.reason), "")
        lines.append([f"`{name}`", *cells, reason])
    heading = ["provider"]
    for case in headline_cases():
        heading += [f"D = {case.head_dim}: ms", "÷ ours", "peak MB"]
    return markdown_table([*heading, "why not"], lines) + "\n\n" + beside(row for row in ours if row)


def _peak(row: Row | None) -> str:
    return number(row.peak_mb) if row is not None else "–"


def shapes(rows: Sequence[Row], gpu: bool) -> str:
    """Every measured shape of every model: unedited and dense against ours, for a whole guided batch."""
    cases = grouped(rows, "kernels", gpu)
    lines, used = [], []
    for case in kernel_cases(layouts=("guided",), targets=(1,)):
        providers = cases.get(case.name, {})
        ours = our_row(providers.values())
        if ours is not None:
            used.append(ours)
            others = [slower(providers.get(name), ours) for name in (UNEDITED, DENSE)]
            label = f"{case.model}, {case.pixels} px: {case.tokens} × {case.heads} × {case.head_dim}"
            lines.append([label, number(ours.median_ms), *others, number(ours.percent_of_limit, " %")])
    if not lines:
        return not_yet(gpu, "Shapes")
    heading = ["guided batch of a source and a target", "ours, ms", "unedited ÷ ours", "dense ÷ ours", "of limit"]
    return markdown_table(heading, lines) + "\n\n" + beside(used)


def grid(rows: Sequence[Row], gpu: bool) -> str:
    """Lengths against head dimensions at batch 4, the best PyTorch has against ours."""
    cases = grouped(rows, "kernels", gpu)
    lines, used = [], []
    for name, providers in cases.items():
        ours = our_row(providers.values())
        if name.startswith("grid-") and ours is not None:
            case, fused = Case.parse(name), best_sdpa(providers)
            used.append(ours)
            best = f"{slower(fused, ours)} {fused.provider.removeprefix('sdpa-')}" if fused else "–"
            size = f"{case.tokens} × {case.heads} × {case.head_dim}, {case.batch} rows on {case.maps}"
            dense = slower(providers.get(DENSE), ours)
            lines.append([size, number(ours.median_ms), best, dense, number(ours.percent_of_limit, " %")])
    if not lines:
        return not_yet(gpu, "Kernel grid")
    heading = ["tokens × heads × head dim, rows on maps", "ours, ms", "best SDPA ÷ ours", "dense ÷ ours", "of limit"]
    return markdown_table(heading, lines) + "\n\n" + beside(used)


def edits(rows: Sequence[Row], gpu: bool) -> str:
    """Whole UNet steps and edits: time and peak memory as multiples of the unedited."""
    lines, used = [], []
    for name, editors in grouped(rows, "edits", gpu).items():
        base, case = editors.get(UNEDITED), UNetCase.parse(name)
        if base is None or base.status != "ok":
            continue
        used.append(base)
        cells = [number(base.median_ms, " ms"), number(base.peak_mb, " MB")]
        for editor in ("fpe", GATHERED, DENSE):
            row = editors.get(editor)
            if row is None or row.status != "ok" or not row.peak_mb or not base.peak_mb:
                cells.append(row.status if row else "–")
            else:
                cells.append(f"{slower(row, base)} × time, {row.peak_mb / base.peak_mb:.2f} × memory")
        what = "step" if case.steps == 1 else f"edit of {case.steps} steps"
        layers = "all layers" if case.selection == "all" else "the method's layers"
        targets = f"{case.targets} target{'s' * (case.targets > 1)}"
        lines.append([f"{case.model} {what}, {case.pixels} px, {targets}, {layers}", *cells])
    if not lines:
        return not_yet(gpu, "Whole edits")
    heading = ["random weights, guided batch", "unedited", "peak", *(TITLES[e] for e in ("fpe", GATHERED, DENSE))]
    models = {UNetCase.parse(row.case).model for row in used}
    words = "; ".join(f"{model}: {WORDS[model]}" for model in WORDS if model in models)
    return markdown_table(heading, lines) + f"\n\n*{words}.*\n" + beside(used)


def graphs(rows: Sequence[Row], gpu: bool) -> str:
    """Whole UNet steps as CUDA graphs, which leave out the time that Python takes: edited beside unedited."""
    lines, used = [], []
    steps = [(*found, ending) for ending in (GRAPH, COMPILED) for found in grouped(rows, "edits", gpu).items()]
    for name, editors, ending in steps:
        base, ours, case = editors.get(f"{UNEDITED}{ending}"), editors.get(f"fpe{ending}"), UNetCase.parse(name)
        if base is None or ours is None or base.status != "ok" or ours.status != "ok":
            continue
        used.append(base)
        layers = "all layers" if case.selection == "all" else "the method's layers"
        targets = f"{case.targets} target{'s' * (case.targets > 1)}"
        how = ", torch.compile (reduce-overhead)" if ending == COMPILED else ""
        step = f"{case.model} step, {case.pixels} px, {targets}, {layers}{how}"
        lines.append([step, number(base.median_ms, " ms"), number(ours.median_ms, " ms"), slower(ours, base)])
    if not lines:
        return not_yet(gpu, "Steps as graphs")
    heading = ["random weights, guided batch", "unedited", "edited", "edited ÷ unedited"]
    return markdown_table(heading, lines) + "\n\n" + beside(used)


def busy(rows: Sequence[Row], gpu: bool) -> str:
    """Ours against PyTorch's attention by the wall clock, beside processes that keep cores busy."""
    found: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        if row.suite == "busy" and row.on_gpu == gpu and row.status == "ok":
            found.setdefault((row.case, row.threads), {})[row.provider] = row
    shapes: dict[tuple[str, str, int], dict[str, str]] = {}
    used = []
    for (name, threads), providers in found.items():
        ours, base = our_row(providers.values()), providers.get(UNEDITED)
        if ours is None or base is None:
            continue
        used.append(ours)
        shape, _, rest = name.partition("/busy-")
        level, _, told = [*rest.split("/"), ""][:3]
        shapes.setdefault((shape, told, threads), {})[level] = str(Ratio.of(ours, base)).replace("×", "")
    if not shapes:
        return not_yet(gpu, "A busy machine")
    lines = []
    for (shape, told, threads), cells in shapes.items():
        case, limited = Case.parse(shape), f", {told.upper()} only" if told else ""
        name = f"{case.tokens} × {case.heads} × {case.head_dim}{limited}"
        lines.append([name, str(threads), *(cells.get(level, "–") for level in "012")])
    heading = ["unedited ÷ ours, a source and a target", "threads", "alone", "beside one process", "beside two"]
    return markdown_table(heading, lines) + "\n\n" + beside(used)


def holdings(rows: Sequence[Row], gpu: bool) -> dict[str, list[tuple[Case, float]]]:
    """Provider to (case, bytes held, inputs included), by length."""
    found: dict[str, list[tuple[Case, float]]] = {}
    for name, providers in grouped(rows, "memory", gpu).items():
        case = Case.parse(name)
        for provider, row in providers.items():
            if row.peak_mb is not None:
                itemsize = {"float64": 8, "float32": 4}.get(row.dtype, 2)
                found.setdefault(provider, []).append((case, row.peak_mb * 1e6 + input_bytes(case, itemsize)))
    return {provider: sorted(points, key=lambda p: p[0].tokens) for provider, points in found.items()}


def law(points: Sequence[tuple[Case, float]]) -> Growth:
    return Growth.fit([(case.tokens, held) for case, held in points])


def memory(rows: Sequence[Row], gpu: bool) -> str:
    held = {name: points for name, points in holdings(rows, gpu).items() if len(points) > 1}
    ours = next((name for name in ("fpe-triton", "fpe-torch") if name in held), None)
    if ours is None or DENSE not in held:
        return not_yet(gpu, "Memory")
    measured = {name: {case.tokens: size for case, size in points} for name, points in held.items()}
    lines = []
    for tokens in sorted(measured[ours]):
        cells = []
        for name in (ours, DENSE):
            known = tokens in measured[name]
            size = measured[name][tokens] if known else law(held[name]).bytes(tokens)
            cells.append(number(size / 1e6, " MB") + ("" if known else " (computed)"))
        lines.append([f"{tokens}", *cells])
    longest = [f"{law(held[name]).longest(MEMORY_LIMIT):,} tokens" for name in (ours, DENSE)]
    lines.append(["longest in 24 GiB (computed)", *longest])
    case = held[ours][0][0]
    heading = [f"tokens; {case.heads} heads of {case.head_dim}, a source and a target", TITLES[ours], TITLES[DENSE]]
    used = [row for row in rows if row.suite == "memory" and row.on_gpu == gpu and row.provider == ours]
    return markdown_table(heading, lines) + "\n\n" + beside(used)


def operations(rows: Sequence[Row], gpu: bool) -> str:
    """What else is measured on the headline's shapes: the other batches and the other products."""
    cases = grouped(rows, "kernels", gpu)
    lines, used = [], []
    for case in headline_cases():
        variants = [replace(case, layout=layout) for layout in LAYOUTS if layout != case.layout]
        for variant in [*variants, *(replace(case, op=op) for op in OPS if op != case.op)]:
            providers = cases.get(variant.name, {})
            ours = our_row(providers.values())
            if ours is not None:
                used.append(ours)
                what = LAYOUTS[variant.layout] if variant.layout != case.layout else OPS[variant.op]
                others = [slower(best_sdpa(providers), ours), slower(providers.get(DENSE), ours)]
                label = f"{case.tokens} × {case.heads} × {case.head_dim}: {what}"
                lines.append([label, number(ours.median_ms), *others, number(ours.percent_of_limit, " %")])
    if not lines:
        return not_yet(gpu, "Other products")
    heading = ["a source and a target", "ours, ms", "best SDPA ÷ ours", "dense ÷ ours", "of limit"]
    return markdown_table(heading, lines) + "\n\n" + beside(used)


def targets(rows: Sequence[Row], gpu: bool) -> str:
    """What the unedited attention takes against ours, by the number of targets, where all rows share one map."""
    cases = grouped(rows, "kernels", gpu)
    lines, used = [], []
    for case in kernel_cases(layouts=("pair",), targets=(1,)):
        cells = []
        for count in TARGETS:
            providers = cases.get(replace(case, targets=count).name, {})
            ours = our_row(providers.values())
            used += [ours] if ours else []
            cells.append(slower(providers.get(UNEDITED), ours))
        if set(cells) != {"–"}:
            lines.append([f"{case.model}, {case.pixels} px: {case.tokens} × {case.heads} × {case.head_dim}", *cells])
    if not lines:
        return not_yet(gpu, "Numbers of targets")
    heading = ["unedited ÷ ours", *(f"{count} target{'s' * (count > 1)}" for count in TARGETS)]
    return markdown_table(heading, lines) + "\n\n" + beside(used)


def models(rows: Sequence[Row], gpu: bool) -> str:
    """All self-attention layers of a model added up, for one guided step on one source and one target.

    A ratio of sums is the mean of the layers' ratios, each with the weight of our time in it; so are its percentiles.
    """
    cases, lines, used = grouped(rows, "kernels", gpu), [], []
    for model in MODELS:
        for pixels in PIXELS[model]:
            levels = kernel_cases(models=(model,), layouts=("guided",), targets=(1,))
            found = [(case, cases.get(case.name, {})) for case in levels if case.pixels == pixels]
            ours = [our_row(providers.values()) for _, providers in found]
            if not all(ours):
                continue
            weights = [case.layers * (row.median_ms or 0.0) for (case, _), row in zip(found, ours, strict=True) if row]
            cells = [
                _mean_ratio(weights, [providers.get(name) for _, providers in found], ours)
                for name in (UNEDITED, "sdpa", DENSE)
            ]
            lines.append([f"{model}, {pixels} px", number(sum(weights)), *cells])
            used += [row for row in ours if row]
    if not lines:
        return not_yet(gpu, "Models")
    heading = ["all self-attention layers of a guided step", "ours, ms", "unedited ÷ ours", "SDPA ÷ ours"]
    return markdown_table([*heading, "dense ÷ ours"], lines) + "\n\n" + beside(used)


def _mean_ratio(weights: Sequence[float], others: Sequence[Row | None], ours: Sequence[Row | None]) -> str:
    ratios = []
    for other, own in zip(others, ours, strict=True):
        if other is None or own is None or not other.samples_ms or len(other.samples_ms) != len(own.samples_ms):
            return "–"
        ratios.append(Ratio.of(own, other))
    total = sum(weights)
    median, low, high = (
        sum(weight * getattr(ratio, part) for weight, ratio in zip(weights, ratios, strict=True)) / total
        for part in ("median", "low", "high")
    )
    return f"{median:.2f} ({low:.2f}–{high:.2f})"


def recordings(rows: Sequence[Row], gpu: bool) -> str:
    """A second edit, from a recording of its source in every placement, as a share of the full edit's time."""
    lines, used = [], []
    for name, providers in grouped(rows, "recordings", gpu).items():
        full = providers.get("full")
        if full is not None and full.status == "ok":
            used.append(full)
            lines.append([name, number(full.median_ms, " ms"), *(slower(providers.get(p), full) for p in PLACEMENTS)])
    if not lines:
        return not_yet(gpu, "Recordings")
    heading = ["edit", "source and target together", *PLACEMENTS.values()]
    return markdown_table(heading, lines) + "\n\n" + beside(used)


def batches(rows: Sequence[Row], gpu: bool) -> str:
    """Targets of one source by a batch, and how many times faster that is than single edits."""
    lines, used = [], []
    for name, providers in grouped(rows, "batches", gpu).items():
        single, batch = (providers.get(provider) for provider in ("single-edits", "batch"))
        if single is not None and single.status == "ok" and batch is not None and batch.status == "ok":
            used.append(batch)
            ratio = str(Ratio.of(batch, single))
            lines.append([name, number(single.median_ms, " ms"), number(batch.median_ms, " ms"), ratio])
    if not lines:
        return not_yet(gpu, "Batches")
    heading = ["edits", "one by one", "as a batch", "faster"]
    return markdown_table(heading, lines) + "\n\n" + beside(used)


_BY_DEVICE: tuple[Callable[..., str], ...] = (claim, headline, rivals, operations, shapes, targets, models, grid)
_BY_DEVICE += (edits, graphs, joint_steps, flow_inversion, busy, recordings, batches, memory)

TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    f"{table.__name__.replace('_', '-')}-{device}": partial(table, gpu=device == "gpu")
    for table in _BY_DEVICE
    for device in ("cpu", "gpu")
}
TABLES["first-picture"] = first_pictures
