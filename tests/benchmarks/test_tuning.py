"""What the tuner offers, and how a table comes of what it measured."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import astuple
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from benchmarks import hopper_tiles, sass, tune, tuned_table
from benchmarks.candidates import (
    ALL,
    BOUNDED,
    DESCRIBED,
    PLAUSIBLE,
    SPECIALISED,
    Candidate,
    Launches,
    choices,
    tuning_plan,
)
from benchmarks.cases import Case
from benchmarks.inputs import Inputs
from benchmarks.providers import Ours
from benchmarks.rows import Row, write
from benchmarks.tune import Configured
from benchmarks.workers import programs
from benchmarks.workers.programs import of_case
from fpe_kernels.backends.triton import configs, hopper, tuned
from fpe_kernels.backends.triton.experimental import boxes
from fpe_kernels.backends.triton.packing import chunks

H100 = "cuda: NVIDIA H100 80GB HBM3"
HALVES = Case("tune", 512, 4096, 10, 64, 1, "halves")
KEY = ("sm_90", 64, 128, 4096)  # of it, on Hopper
GUIDED = Case("tune", 128, 256, 8, 40, 1, "guided")
GLUON = [hopper_tiles.config_of(name) for names in hopper_tiles.TILES.values() for name in names]


@pytest.fixture(autouse=True)
def nothing_committed(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Tables are learnt from none, but for the test of the committed one."""
    if "committed_table" not in request.node.name:
        monkeypatch.setattr(tuned, "FORWARD", {})
        monkeypatch.setattr(tuned, "TOGETHER", {})
        for kept in (configs.forward_config, configs.joins):
            request.addfinalizer(kept.cache_clear)


def row(case: Case, provider: str, ms: float, device: str = H100, dtype: str = "float16") -> Row:
    return Row("tuning", case.name, provider, dtype, device, "ok", samples_ms=(ms, ms * 1.01, ms))


def fields_of(name: str) -> tuple:
    """What the table holds of a choice."""
    return astuple(Candidate.parse(name))


@pytest.mark.parametrize("candidate", [*ALL, *DESCRIBED, *SPECIALISED, *BOUNDED, *map(Candidate.of, GLUON)])
def test_a_candidate_is_read_back_from_its_name(candidate: Candidate) -> None:
    assert Candidate.parse(str(candidate)) == candidate


def test_another_name_is_no_candidate() -> None:
    assert str(Candidate(128, 64, 4, 2, True, True, 168)) == "128x64w4s2dsr168"
    with pytest.raises(ValueError, match="expected a configuration such as 128x64w8s3"):
        Candidate.parse("one-launch")


def test_the_plan_has_both_batches_at_every_length() -> None:
    plan = tuning_plan()
    assert len(plan) == len(set(plan))
    for layout in ("halves", "guided"):
        assert {case.tokens for case in plan if case.layout == layout} == set(configs.LENGTHS)
    for case in plan:
        if case.targets == 1 and case.layout in ("halves", "guided"):
            assert case.batch == 4


def test_a_mixed_batch_is_measured_as_one_launch_and_as_two() -> None:
    assert choices(GUIDED) == [Launches(True), Launches(False)]


def test_descriptors_are_offered_where_they_serve() -> None:
    for case in tuning_plan():
        for choice in choices(case, "sm_100"):
            if isinstance(choice, Candidate) and choice.descriptors:
                shape = (case.tokens, case.heads, case.head_dim)
                maps, rows = (torch.empty(n, *shape, dtype=torch.half).transpose(1, 2) for n in (case.maps, case.batch))
                for chunk in chunks(case.map_index, case.maps, case.head_dim, configs.MAX_COLUMNS[2]):
                    assert boxes.serves(maps, maps, rows, chunk, 0.1)
    assert any(getattr(choice, "descriptors", False) for choice in choices(HALVES, "sm_100"))
    assert not any(getattr(choice, "descriptors", False) for choice in choices(HALVES, "sm_80"))


def test_bounds_and_fetching_warps_are_offered_where_the_compiler_knows_them() -> None:
    offered = choices(HALVES, "sm_100")
    assert {Candidate(64, 64, 4, 2, maxnreg=168), Candidate(128, 64, 4, 2, True, True)} <= set(offered)
    assert Candidate(64, 64, 4, 2, maxnreg=128) not in offered  # the accumulators leave no registers for the rest
    for arch, specialised, bounded in (("sm_100", True, True), ("sm_80", False, True), ("gfx942", False, False)):
        found = [choice for choice in choices(HALVES, arch) if isinstance(choice, Candidate)]
        assert any(choice.specialised for choice in found) == specialised
        assert any(choice.maxnreg for choice in found) == bounded


def test_every_tile_that_holds_is_offered_on_hopper_beside_a_few_of_the_pointer_kernel(monkeypatch) -> None:
    if isinstance(hopper.kernels(), str):
        pytest.skip("this Triton has no Gluon")
    for case in tuning_plan():
        if case.layout == "guided":
            continue
        offered = choices(case, "sm_90")
        gluon = [candidate for candidate in offered if candidate.gluon]
        assert len(set(offered)) == len(offered)
        assert set(offered) - set(gluon) <= set(PLAUSIBLE)
        held = {hopper.most_branches(case.head_dim, case.head_dim, configs.Config(*astuple(c))) for c in gluon}
        branches = case.batch // case.maps
        assert min(held) >= branches or len(held) == 1  # all of them in one launch, or as many as any tile holds
        # One program to compile for two ways to launch it; a warpgroup alone takes no turns.
        assert len({candidate.program for candidate in gluon}) == len(gluon) / 2
        assert not any(candidate.specialised and candidate.block_m == hopper.ROWS for candidate in gluon)
    assert {candidate.block_m for candidate in choices(HALVES, "sm_90") if candidate.gluon} == set(hopper.TILE_ROWS)
    monkeypatch.setattr(hopper, "kernels", lambda: "no Gluon")
    assert {candidate.gluon for candidate in choices(HALVES, "sm_90")} == {False}
    assert any(candidate.descriptors for candidate in choices(HALVES, "sm_90"))


@pytest.mark.parametrize("choice", [Launches(True), Launches(False), Candidate(64, 32, 4, 2, True, True, 168)])
def test_a_choice_rules_inside_its_call_only(choice, monkeypatch) -> None:
    seen = []

    def record(self, inputs):
        return lambda: seen.append((configs.one_launch(None, None, (), False), configs.apply_config(1, 2, 3, 4)))

    monkeypatch.setattr(Ours, "prepare", record)
    monkeypatch.setattr(configs, "one_launch", lambda *arguments: "rule")
    monkeypatch.setattr(configs, "apply_config", lambda *arguments: "rule")
    call = Configured(choice).prepare(Inputs.make(Case("test", 64, 16, 1, 8), "cpu", torch.float32))
    assert seen == []
    call()
    launches, config = seen[0]
    assert (launches, config) == (
        (choice.together, "rule")
        if isinstance(choice, Launches)
        else ("rule", configs.Config(64, 32, 4, 2, True, True, 168))
    )
    assert configs.one_launch() == configs.apply_config() == "rule"


def test_what_is_faster_becomes_an_entry() -> None:
    rows = [row(HALVES, "fpe-triton", 1.0), row(HALVES, "fpe-triton@64x64w4s3", 0.9)]
    rows += [row(HALVES, "fpe-triton@128x64w8s2d", 0.8), row(HALVES, "sdpa-flash", 0.5)]
    rows += [row(GUIDED, f"fpe-triton@{name}", ms) for name, ms in (("one-launch", 0.5), ("two-launches", 0.6))]
    table, lines = tuned_table.learn(rows)
    assert table.forward == {KEY: fields_of("128x64w8s2d")}
    assert table.together == {("sm_90", 48, 80, 256): True}
    assert len(lines) == 2 and "1.25 × faster than before" in "\n".join(lines)


def test_rows_of_an_h200_need_no_architecture_named() -> None:
    device = "cuda: NVIDIA H200"
    rows = [row(HALVES, "fpe-triton", 1.0, device), row(HALVES, "fpe-triton@64x64w4s3", 0.5, device)]
    assert tuned_table.learn(rows)[0].forward == {
        ("sm_90", 64, 128, 4096): (64, 64, 4, 3, False, False, 0, False, False)
    }


def test_what_gains_nothing_changes_nothing(tmp_path) -> None:
    rows = [row(HALVES, "fpe-triton", 1.0), row(HALVES, "fpe-triton@64x64w4s3", 0.99)]
    rows += [row(GUIDED, f"fpe-triton@{name}", ms) for name, ms in (("one-launch", 0.5), ("two-launches", 0.505))]
    path = tmp_path / "tuned.py"
    assert "stays as it is" in tuned_table.take_over(rows, path=path)
    assert not path.exists()


def test_what_is_compiled_ahead_is_what_a_choice_launches() -> None:
    (one,) = of_case(GUIDED, Launches(True), "sm_90")
    assert len(of_case(GUIDED, Launches(False), "sm_90")) == 2
    assert one.numbers["tokens"][0] == GUIDED.tokens
    (launch,) = of_case(HALVES, Candidate(64, 32, 4, 2), "sm_90")
    assert (launch.config.block_m, launch.config.block_n, launch.config.warps) == (64, 32, 4)
    (boxed,) = of_case(HALVES, Candidate(64, 64, 4, 2, descriptors=True), "sm_90")
    assert boxed.boxes


@pytest.mark.parametrize(
    ("loop", "reason"),
    [
        (sass.Loop(("HGMMA", "WARPGROUP.DEPBAR.LE gsb0, 0x0") * 4), "waits for every product: refused"),
        (sass.Loop(("HGMMA", "HGMMA", "WARPGROUP.DEPBAR.LE gsb0, 0x0")), r"spills \(3 instructions\): refused"),
    ],
)
def test_a_candidate_whose_program_stalls_is_refused(loop, reason, monkeypatch) -> None:
    candidate = Candidate(64, 32, 4, 2)
    spills = 0 if loop.serialised else 3
    monkeypatch.setattr(programs, "compiled", lambda launch, arch: SimpleNamespace(asm={"cubin": b""}))
    monkeypatch.setattr(sass, "disassemble", lambda cubin: "")
    monkeypatch.setattr(sass, "read", lambda text: sass.Program((loop,), spills))
    with pytest.raises(ValueError, match=f"{candidate} {reason}"):
        programs.compile_choice(HALVES, candidate, "sm_90")
    programs.compile_choice(HALVES, candidate, "sm_80")  # where nothing of the kind is read
    programs.compile_choice(HALVES, None, "sm_90")  # the committed configuration is no candidate
    monkeypatch.setattr(sass, "read", lambda text: sass.Program((sass.Loop(loop.instructions[:2]),), 0))
    programs.compile_choice(HALVES, candidate, "sm_90")


def test_luck_is_no_gain() -> None:
    lucky = Row(
        "tuning", HALVES.name, "fpe-triton@64x64w4s3", "float16", H100, "ok", samples_ms=(0.99, 0.9, 0.9, 1.0, 0.9)
    )
    committed = Row("tuning", HALVES.name, "fpe-triton", "float16", H100, "ok", samples_ms=(1.0,) * 5)
    assert tuned_table.learn([committed, lucky])[1] == []
    steady = Row("tuning", HALVES.name, "fpe-triton@64x64w4s3", "float16", H100, "ok", samples_ms=(0.9,) * 5)
    assert len(tuned_table.learn([committed, steady])[1]) == 1


def test_a_choice_must_be_best_over_all_cases_of_its_entry() -> None:
    other = Case("tune", 512, 4096, 20, 64, 1, "halves")
    rows = [row(case, "fpe-triton", 1.0) for case in (HALVES, other)]
    rows += [row(HALVES, "fpe-triton@64x64w4s3", 0.5), row(other, "fpe-triton@64x64w4s3", 1.9)]
    rows += [row(case, "fpe-triton@128x32w8s3", 0.9) for case in (HALVES, other)]
    assert tuned_table.learn(rows)[0].forward == {
        ("sm_90", 64, 128, 4096): (128, 32, 8, 3, False, False, 0, False, False)
    }


def test_a_written_table_is_a_module_of_the_same_format(tmp_path) -> None:
    rows = [row(HALVES, "fpe-triton", 1.0), row(HALVES, "fpe-triton@64x64w4s2r168", 0.5)]
    rows += [row(GUIDED, "fpe-triton@one-launch", 0.7), row(GUIDED, "fpe-triton@two-launches", 0.5)]
    path = tmp_path / "tuned.py"
    assert "benchmarks.offline --update" in tuned_table.take_over(rows, path=path)
    written: dict = {}
    exec(path.read_text(), written)
    assert written["FORWARD"] == {KEY: fields_of("64x64w4s2r168")}
    assert written["TOGETHER"] == {("sm_90", 48, 80, 256): False}
    pytest.importorskip("ruff", reason="formatting is checked where ruff is installed")
    ruff = [sys.executable, "-m", "ruff", "format", "--check", "--line-length", "120", str(path)]
    assert subprocess.run(ruff, capture_output=True).returncode == 0


def test_the_committed_table_is_what_the_tuner_would_write() -> None:
    assert tuned_table.Table().text() == tuned_table.TABLE.read_text()
    for (arch, *_), fields in tuned.FORWARD.items():
        assert arch in configs.SHARED_MEMORY and configs.Config(*fields)


def test_rows_of_an_unknown_chip_ask_for_its_architecture() -> None:
    rows = [row(HALVES, name, 1.0, "cuda: NVIDIA RTX 9999") for name in ("fpe-triton", "fpe-triton@64x64w4s3")]
    with pytest.raises(ValueError, match="Say it with --arch, one of sm_80"):
        tuned_table.learn(rows)
    assert tuned_table.learn(rows, "sm_120")[1] == []
    with pytest.raises(ValueError, match="arch must be one of"):
        tuned_table.learn(rows, "sm_75")


@pytest.mark.parametrize(("device", "dtype"), [("cpu: a processor", "float16"), (H100, "float32")])
def test_rows_that_say_nothing_are_refused(device: str, dtype: str) -> None:
    with pytest.raises(ValueError, match="no times of suite 'tuning'"):
        tuned_table.learn([row(HALVES, "fpe-triton", 1.0, device, dtype)])


def test_the_command_says_what_is_wrong_with_its_rows(tmp_path, capsys) -> None:
    write(tmp_path / "rows.json", [row(HALVES, "fpe-triton", 1.0, "cpu: a processor")])
    for name, words in (("rows.json", "no times of suite 'tuning'"), ("none.json", "No such file")):
        with pytest.raises(SystemExit):
            tune.main(["--apply", str(tmp_path / name)])
        assert words in capsys.readouterr().err
