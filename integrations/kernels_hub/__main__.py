"""Lays `fpe_kernels` out as Hugging Face's kernel hub asks: ``python -m integrations.kernels_hub FOLDER``.

A kernel of the hub is loaded from any path, beside other versions of itself. It may import itself relatively only, and
its operators need a namespace that no other version has. Both hold here without a second set of sources: they are
copied from the package, with the namespace of `torch.library` made of their own digest.

The folder holds what `kernel-builder` builds from (``build.toml``, ``torch-ext/``) and what it would build of it, a
variant for each backend (``build/torch-cpu``, …), which `kernels.get_local_kernel` loads and `hf upload` publishes.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import fpe_kernels

__all__ = ["assemble"]

_HERE, _PACKAGE = Path(__file__).parent, Path(fpe_kernels.__file__).parent
#: Where the sources name the namespace of their operators.
_NAMESPACE = re.compile(r'(torch\.ops\.|Library\("|(?<=["`]))fpe_kernels(?=\.[a-z_]+\(|::|", "DEF")')
#: Helpers of tests are no part of a kernel.
_LEFT_OUT = ("__pycache__", "testing", "py.typed")


def assemble(folder: Path) -> Path:
    """Write the layout into an empty or absent folder, and return it.

    Raises:
        FileExistsError: there is something in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"expected an empty folder, '{folder}' holds something: name another")
    shutil.copyfile(_HERE / "build.toml", folder / "build.toml")
    general = _general((folder / "build.toml").read_text(encoding="utf-8"))
    name = general["name"].replace("-", "_")
    sources = _sources()
    digest = hashlib.sha256("".join(f"{path}\n{text}" for path, text in sources.items()).encode()).hexdigest()[:8]
    _write(folder / "torch-ext" / name, sources, f"_{name}_{digest}")
    for backend in general["backends"]:
        identity, variant = f"_{name}_{backend}_{digest}", folder / "build" / f"torch-{backend}"
        _write(variant, sources, identity)
        metadata = {
            "name": general["name"],
            "id": identity,
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return folder


def _general(text: str) -> dict[str, Any]:
    """The values of a `build.toml`, which are texts, numbers and lists of these, as JSON has them too."""
    return {name: json.loads(value) for name, value in re.findall(r"^([\w-]+) = (.+)$", text, re.MULTILINE)}


def _sources() -> dict[str, str]:
    """By path, the package's sources."""
    paths = sorted(path.relative_to(_PACKAGE) for path in _PACKAGE.rglob("*.py"))
    kept = [path for path in paths if not set(path.parts) & set(_LEFT_OUT)]
    return {path.as_posix(): (_PACKAGE / path).read_text(encoding="utf-8") for path in kept}


def _write(folder: Path, sources: dict[str, str], namespace: str) -> None:
    for path, text in sources.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        renamed = _NAMESPACE.sub(lambda found: f"{found[1]}{namespace}", text)
        (folder / path).write_text(renamed, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        raise SystemExit("usage: python -m integrations.kernels_hub FOLDER")
    print(assemble(Path(sys.argv[1])))
