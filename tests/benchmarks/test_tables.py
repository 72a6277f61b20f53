"""Tables and figures: what README says is what the rows say, and drawing works on the rows that are committed."""

import dataclasses

import pytest

from benchmarks import plot
from benchmarks.cases import OPS, headline_cases, kernel_cases
from benchmarks.figures import FIGURES, draw_all
from benchmarks.growth import Growth
from benchmarks.report import summary
from benchmarks.rows import ROOT, Environment, Row, read_all
from benchmarks.tables import TABLES

PAGES = [
    ROOT / name
    for name in (
        "README.md",
        "benchmarks/README.md",
        "docs/kernels.md",
        "docs/batches.md",
        "docs/recordings.md",
        "docs/studio.md",
        "fpe_pipeline/quality/README.md",
    )
] + sorted((ROOT / "docs/compat").glob("*.md"))
HERE = Environment("cpu: a processor (2 cores)", 1, {"torch": "2.13.0"}, "0123456789ab", "2026-01-01")
GPU = Environment("cuda: a device", 1, {"torch": "2.13.0"}, "0123456789ab", "2026-01-01")


def row(environment=HERE, **values):
    return Row.new(environment, **{"dtype": "float32", "status": "ok", **values})


def sample_rows(environment=HERE):
    """A little of every suite."""
    ours = "fpe-triton" if environment is GPU else "fpe-torch"
    rows = []
    for case in headline_cases():
        for provider, time in ((ours, 2.0), ("sdpa", 3.0), ("unedited", 3.5), ("dense-original", 8.0)):
            about = {"suite": "kernels", "case": case.name, "provider": provider, "flops": case.flops}
            rows.append(row(environment, **about, samples_ms=(time, 1.1 * time, time), peak_mb=1.0, limit_ms=1.0))
    rows.append(row(environment, suite="kernels", case="any", provider="xformers", status="missing", reason="not here"))
    for kind in ("matmul", "copy", "exp"):
        about = {"suite": "roofline", "case": kind, "provider": "machine"}
        rows.append(row(environment, **about, samples_ms=(1.0,), flops=10**9))
    for pixels in (256, 512):
        for editor, time, peak in (("unedited", 10, 50), ("fpe", 9, 50), ("dense-original", 30, 500)):
            about = {"suite": "edits", "case": f"tiny-{pixels}/guided-1/all/1", "provider": editor}
            rows.append(row(environment, **about, samples_ms=(float(time),), peak_mb=float(peak)))
    for tokens in (256, 1024):
        for provider, held in ((ours, tokens * 0.01), ("dense-original", tokens**2 * 1e-4)):
            case = f"length-128/{tokens}x8x64/pair-1/apply"
            rows.append(row(environment, suite="memory", case=case, provider=provider, peak_mb=held))
    return rows


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_in_the_readmes_are_those_of_the_committed_rows(page):
    if not page.exists():
        pytest.skip(f"there is no {page.name} yet")
    old = plot.stale(page, read_all(plot.RESULTS))
    assert not old, f"{', '.join(old)}: run `make figures`"


def test_a_readme_that_differs_from_its_rows_is_noticed(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- table: headline-cpu -->\n<!-- end table -->\nafter\n")
    rows = sample_rows()
    page.write_text(plot.rewritten(page.read_text(), rows))
    assert plot.stale(page, rows) == []
    faster = [dataclasses.replace(r, samples_ms=tuple(t / 2 for t in r.samples_ms)) for r in rows]
    assert plot.stale(page, faster) == ["headline-cpu"]
    page.write_text(page.read_text().replace("2.00", "1.00", 1))
    assert plot.stale(page, rows) == ["headline-cpu"]
    assert page.read_text().startswith("before\n") and page.read_text().endswith("\nafter\n")


def test_an_unknown_table_is_an_error():
    with pytest.raises(ValueError, match="no table 'speed'"):
        plot.rewritten("<!-- table: speed -->\n<!-- end table -->", [])


@pytest.mark.parametrize("name", TABLES)
def test_a_table_without_rows_says_that_it_is_not_measured(name):
    assert "not measured on a" in TABLES[name]([])


def test_a_table_states_its_machine_and_pairs_its_rounds():
    table = TABLES["headline-cpu"](sample_rows())
    assert "a processor" in table and "commit 0123456789ab" in table
    assert "| 4.00 (4.00–4.00) | 1.50 (1.50–1.50) | 1.75 (1.75–1.75) |" in table
    assert "not measured on a GPU" in TABLES["headline-gpu"](sample_rows())
    assert "a device" in TABLES["headline-gpu"](sample_rows(GPU))


def test_the_best_of_pytorch_may_have_queries_and_keys_of_every_rows_own():
    faster = [dataclasses.replace(r, samples_ms=(2.5,) * 3) if r.provider == "unedited" else r for r in sample_rows()]
    assert TABLES["headline-cpu"](faster).count("| 1.25 (1.18–1.25) | 1.25 (1.18–1.25) |") == 2


def test_a_graph_of_a_rivals_step_is_not_held_against_our_step_from_python():
    about = {"suite": "edits", "case": "sd15-512/guided-1/default/1"}
    times = {"unedited": 10.0, "fpe": 10.0, "sdpa-gathered": 11.0, "sdpa-gathered-graph": 2.0, "unedited-graph": 2.0}
    told = summary([row(**about, provider=name, samples_ms=(time,)) for name, time in times.items()])
    assert "1.10×" in told and "0.20×" not in told


@pytest.mark.parametrize("other", [{"device": "cuda: another"}, {"dtype": "bfloat16"}, {"threads": 2}], ids=str)
def test_rows_of_different_conditions_are_no_ratio(other):
    rows = sample_rows(GPU)
    slower = [dataclasses.replace(r, samples_ms=tuple(100 * ms for ms in r.samples_ms), **other) for r in rows]
    again = [r for r in rows if r.provider in ("fpe-triton", "unedited")]
    (line, _) = [line for line in TABLES["headline-gpu"]([*slower, *again]).splitlines() if line.startswith("| 4096")]
    assert line.count("1.75 (") == 2 and " | – | 1.75 (" in line  # of the dense original nothing


def test_missing_rivals_stand_in_the_table_with_the_reason():
    line = next(line for line in TABLES["rivals-cpu"](sample_rows()).splitlines() if "xformers" in line)
    assert "not here" in line


@pytest.mark.slow
def test_figures_are_drawn_from_rows(tmp_path):
    drawn = [path.name for path in draw_all([*sample_rows(), *sample_rows(GPU)], tmp_path)]
    assert drawn == [f"{name}-{d}.{kind}" for name in FIGURES for d in ("cpu", "gpu") for kind in ("svg", "png")]
    assert all((tmp_path / name).stat().st_size > 1000 for name in drawn)


@pytest.mark.slow
def test_figures_are_drawn_from_the_committed_rows(tmp_path):
    rows = read_all(plot.RESULTS)
    drawn = list(draw_all(rows, tmp_path))
    assert bool(drawn) == any(r.status == "ok" for r in rows)


def test_growth_is_a_square_law_or_a_line():
    dense = Growth.fit([(n, 3.0 * n**2 + 5.0 * n) for n in (256, 1024, 4096)])
    assert dense.bytes(16384) == pytest.approx(3.0 * 16384**2 + 5.0 * 16384)
    assert dense.longest(dense.bytes(10_000)) == pytest.approx(10_000, abs=1)
    line = Growth.fit([(1024, 7.0 * 1024), (4096, 7.0 * 4096)])
    assert line.longest(7.0e6) == 1_000_000


def test_a_model_is_the_sum_of_its_layers():
    """Ratios weigh as much as our time in their layers, and a model with a shape missing has none."""
    rows = []
    shapes = kernel_cases(models=("sdxl",), layouts=("guided",), targets=(1,))
    for case, own, other in zip([c for c in shapes if c.pixels == 1024], (4.0, 1.0), (8.0, 1.0), strict=True):
        for provider, time in (("fpe-torch", own), ("unedited", other)):
            rows.append(row(suite="kernels", case=case.name, provider=provider, samples_ms=(time, time)))
    # 10 layers of 4 ms at twice the speed and 60 layers of 1 ms at the same.
    assert "| sdxl, 1024 px | 100 | 1.40 (1.40–1.40) | – | – |" in TABLES["models-cpu"](rows)
    assert "not measured" in TABLES["models-cpu"](rows[:2])


def test_other_products_targets_and_recordings_have_their_tables():
    (case, _), rows = headline_cases(), []
    for name in (dataclasses.replace(case, op="replay").name, dataclasses.replace(case, targets=4).name):
        for provider, time in (("fpe-torch", 2.0), ("unedited", 3.0), ("sdpa", 5.0)):
            rows.append(row(suite="kernels", case=name, provider=provider, samples_ms=(time,)))
    for provider, time in (("full", 4.0), ("recorded-device", 2.0), ("recorded-folder", 3.0)):
        rows.append(row(suite="recordings", case="80x80", provider=provider, samples_ms=(time,)))
    assert f"{OPS['replay']} | 2.00 | 1.50 (1.50–1.50) | – |" in TABLES["operations-cpu"](rows)
    assert "| – | – | 1.50 (1.50–1.50) | – |" in TABLES["targets-cpu"](rows)
    assert "| 80x80 | 4.00 ms | – | 0.50 (0.50–0.50) | – | 0.75 (0.75–0.75) |" in TABLES["recordings-cpu"](rows)
