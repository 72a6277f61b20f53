"""The dependency rules: the pipeline stands on the public names of fpe_kernels, and costs nothing to import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fpe_pipeline

PACKAGE = Path(fpe_pipeline.__file__).parent


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_module_reaches_behind_the_public_names(path):
    for name in imports(path):
        assert name.split(".")[0] != "triton"
        assert not name.startswith("fpe_kernels.")


def test_every_public_name_resolves():
    for name in fpe_pipeline.__all__:
        value = getattr(fpe_pipeline, name)
        assert getattr(value, "__module__", "fpe_pipeline.").startswith("fpe_pipeline.")  # tables have no module
    assert set(fpe_pipeline.__all__) <= set(dir(fpe_pipeline))
    with pytest.raises(AttributeError, match="no attribute 'edit_everything'"):
        fpe_pipeline.edit_everything  # noqa: B018


def test_importing_the_package_imports_neither_torch_nor_diffusers():
    code = "import fpe_pipeline, sys; assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PACKAGE.parent)
