"""Backends answer with reasons, nothing falls back silently, and the packages keep to their layers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fpe_kernels import AttentionMap, backends, dispatch, shared_attention

ROOT = Path(__file__).parents[2]
Q = torch.randn(1, 1, 4, 8)


def in_a_fresh_process(code: str, **environment: str) -> str:
    """Run ``code`` without this process's imports and without TRITON_INTERPRET."""
    import os

    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**inherited, **environment}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_auto_on_a_cpu_is_torch_never_the_interpreter() -> None:
    assert dispatch.select("auto", Q) == "torch"
    assert dispatch.select("auto", Q.double()) == "torch"


def test_every_backend_is_listed() -> None:
    assert list(backends()) == ["triton", "torch", "reference"]
    assert backends()["torch"] == backends()["reference"] == "available"


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        (Q.double(), "takes float16, bfloat16 and float32, not torch.float64"),
        (torch.randn(1, 1, 4, 257), "head dims up to 256, not 257"),
    ],
)
def test_a_named_backend_raises_with_the_reason(query: torch.Tensor, reason: str) -> None:
    pytest.importorskip("triton")
    for call in (
        lambda: AttentionMap(query, query, backend="triton"),
        lambda: shared_attention(query, query, query, [0], backend="triton"),
    ):
        with pytest.raises(ValueError, match=f"backend 'triton' cannot serve this call: .*{reason}.*backend='torch'"):
            call()


def test_every_reason_is_told() -> None:
    pytest.importorskip("triton")
    query = torch.randn(1, 1, 4, 257, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"not torch\.float64; .*not 257"):
        dispatch.select("triton", query)


def test_without_the_interpreter_a_cpu_tensor_is_refused() -> None:
    pytest.importorskip("triton")
    code = """
import torch, fpe_kernels
q = torch.randn(1, 1, 4, 8)
try:
    fpe_kernels.AttentionMap(q, q, backend="triton")
except ValueError as error:
    print(error)
"""
    assert "it needs a CUDA device (or TRITON_INTERPRET=1" in in_a_fresh_process(code, CUDA_VISIBLE_DEVICES="")


def test_importing_needs_torch_only() -> None:
    code = """
import sys, fpe_kernels, torch
q = torch.randn(1, 1, 4, 8)
fpe_kernels.AttentionMap(q, q) @ q
print(sorted(name for name in ("diffusers", "transformers", "fpe_pipeline") if name in sys.modules))
print([name for name in sys.modules if name.startswith("fpe_kernels.backends.triton")])
"""
    assert in_a_fresh_process(code, CUDA_VISIBLE_DEVICES="").splitlines() == ["[]", "[]"]


def test_everything_but_its_backend_works_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch, fpe_kernels
q = torch.randn(1, 1, 4, 8, requires_grad=True)
for backend in ("auto", "torch", "reference"):
    A = fpe_kernels.AttentionMap(q, q, backend=backend)
    (A @ q + A.T @ q).sum().backward()
print(fpe_kernels.backends()["triton"])
try:
    fpe_kernels.AttentionMap(q, q, backend="triton")
except ValueError as error:
    print(error)
"""
    listed, refused = in_a_fresh_process(code).splitlines()
    assert listed.startswith("triton cannot be imported") and "pip install triton" in listed
    assert listed in refused


def imports_of(path: Path) -> set[str]:
    """Absolute names of everything that ``path`` imports, at any depth of its code."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def offenders(folder: str, forbidden: tuple[str, ...], spared: str = "") -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        if not (spared and path.is_relative_to(ROOT / spared))
        for name in imports_of(path)
        if any(name == banned or name.startswith(banned + ".") for banned in forbidden)
    ]


def test_kernels_know_nothing_of_diffusers_or_the_pipeline() -> None:
    assert offenders("fpe_kernels", ("diffusers", "transformers", "fpe_pipeline", "benchmarks")) == []


def test_only_its_backend_imports_triton() -> None:
    triton = "fpe_kernels/backends/triton"
    found = offenders("fpe_kernels", ("triton", "fpe_kernels.backends.triton"), spared=triton)
    assert [line for line in found if not line.startswith("fpe_kernels/dispatch.py ")] == []  # which chooses it
    assert any("triton" in imports_of(path) for path in (ROOT / triton).glob("*.py"))


@pytest.mark.slow
def test_the_pipeline_knows_no_backend() -> None:
    # `from fpe_kernels import backends` is the function; what lies below that name is not for the pipeline.
    found = offenders("fpe_pipeline", ("triton", "fpe_kernels.backends"))
    assert [line for line in found if not line.endswith(" fpe_kernels.backends")] == []


def test_backends_do_not_import_one_another() -> None:
    modules = {"reference": "reference.py", "chunked": "chunked.py", "triton": "triton"}
    for name, location in modules.items():
        others = tuple(f"fpe_kernels.backends.{other}" for other in modules if other != name)
        path = ROOT / "fpe_kernels" / "backends" / location
        sources = [path] if path.is_file() else sorted(path.glob("*.py"))
        assert sources
        for source in sources:
            assert not [found for found in imports_of(source) if found.startswith(others)], source


@pytest.mark.slow
def test_the_import_costs_little_more_than_torch() -> None:
    """The compiler and triton are imported by what needs them: each takes as long as torch itself."""
    code = "import sys, torch; before = set(sys.modules); import fpe_kernels; print(*sorted(set(sys.modules) - before))"
    imported = in_a_fresh_process(code).split()
    foreign = {name.partition(".")[0] for name in imported} - set(sys.stdlib_module_names) - {"fpe_kernels"}
    assert foreign <= {"torch"} and not any(name.startswith("torch._dynamo") for name in imported)


def test_the_mark_is_that_of_the_compiler() -> None:
    def function() -> None:
        pass

    torch.compiler.assume_constant_result(function)
    assert vars(function).items() <= vars(dispatch.unsupported_reasons).items() and vars(function)
