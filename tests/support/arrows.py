"""Who imports whom: the packages' rooms, floor by floor, as text; ``python -m tests.support.arrows``.

An import counts wherever it stands: in a function, under ``TYPE_CHECKING``, or as a string in a module that calls
``import_module``. Left out are the tables of names that serve the public re-exports (:data:`TABLES`), which name what
lies above them. A room is a folder of a package, or a module beside the folders; a room's floor is one above the
highest floor that it imports.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = ["PACKAGES", "astray", "circles", "drawing", "floors", "imports", "modules", "private", "room", "rooms"]

ROOT = Path(__file__).parents[2]
PACKAGES = ("fpe_kernels", "fpe_pipeline", "benchmarks")

#: Modules that hold the public names of a package and import them on first use.
TABLES = ("fpe_pipeline",)
#: Folders inside a room that are rooms of their own.
INNER = (
    "fpe_pipeline.embedded.training",
    "fpe_pipeline.models.adapters",
    "fpe_pipeline.session.layers",
    "fpe_pipeline.session.processors",
    "fpe_kernels.backends.triton",
)
#: Modules beside the folders that share a room.
SHARED = {
    "fpe_pipeline.callers": "ground",
    "fpe_pipeline.errors": "ground",
    "fpe_pipeline.shadows": "ground",
    "fpe_pipeline.text_parts": "ground",
    "fpe_pipeline.lists": "ground",
    "fpe_pipeline.texts": "ground",
    "fpe_pipeline.extras": "ground",
    "fpe_pipeline.atomic_folder": "ground",
    "fpe_pipeline.staging": "ground",
    "fpe_pipeline.endings": "ground",
    "fpe_pipeline.cli": "app",
    "fpe_pipeline.__main__": "app",
}

Arrows = Mapping[str, frozenset[str]]


def modules(root: Path, package: str) -> dict[str, Path]:
    """By dotted name, every module of a package."""
    named = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        named[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return named


def imports(root: Path = ROOT, packages: tuple[str, ...] = PACKAGES) -> dict[str, frozenset[str]]:
    """By module, the modules of these packages that it imports."""
    every = {name: path for package in packages for name, path in modules(root, package).items()}
    return {name: frozenset(_imported(name, path, every)) - {name} for name, path in every.items()}


def astray(root: Path = ROOT, packages: tuple[str, ...] = PACKAGES) -> list[str]:
    """Imports of modules that these packages do not have, wherever they stand: those in functions fail late."""
    every = {name: path for package in packages for name, path in modules(root, package).items()}
    found = []
    for name, path in every.items():
        package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
        for node in _statements(path.read_text(encoding="utf-8"))[0]:
            targets = []
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                base = package[: len(package) - node.level + 1] if node.level else []
                targets = [".".join([*base, *filter(None, [node.module])])]
            ours = (target for target in targets if target.partition(".")[0] in packages)
            found += [f"{name} → {target}" for target in ours if target not in every]
    return found


def private(root: Path = ROOT, packages: tuple[str, ...] = PACKAGES) -> list[str]:
    """Imports of names that begin with an underscore, which are for their own module."""
    return [
        f"{name} → {alias.name}"
        for package in packages
        for name, path in modules(root, package).items()
        for node in _statements(path.read_text(encoding="utf-8"))[0]
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]


@functools.cache
def _statements(text: str) -> tuple[list[ast.Import | ast.ImportFrom], list[str]]:
    """Of a module's text, its imports wherever they stand, and its strings with a dot where it imports by name."""
    nodes = list(ast.walk(ast.parse(text)))
    strings = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    by_name = [string for string in strings if "." in string] if "import_module" in text else []
    return [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)], by_name


def _imported(name: str, path: Path, every: Mapping[str, Path]) -> Iterator[str]:
    imports, strings = _statements(path.read_text(encoding="utf-8"))
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in imports:
        if isinstance(node, ast.Import):
            yield from (found for alias in node.names if (found := _longest(alias.name, every)))
        else:
            base = package[: len(package) - node.level + 1] if node.level else []
            whole = ".".join([*base, *filter(None, [node.module])])
            if whole in PACKAGES and whole != package[0]:
                yield whole  # a public name of it, whatever modules it has
                continue
            for alias in node.names:
                found = _longest(f"{whole}.{alias.name}", every)
                if found and not (name in TABLES and found.startswith(f"{name}.")):
                    yield found
    if name not in TABLES:
        for text in strings:
            whole = ".".join([*package, text.lstrip(".")]) if text.startswith(".") else text
            if whole in every:
                yield whole


def _longest(dotted: str, every: Mapping[str, Path]) -> str:
    """The module that a dotted name is, or is in; "" for another package's."""
    while dotted and dotted not in every:
        dotted = dotted.rpartition(".")[0]
    return dotted


def room(module: str) -> str:
    """The room of a module, as ``package.room``; the package itself for its ``__init__``."""
    package, _, rest = module.partition(".")
    for inner in INNER:
        if module == inner or module.startswith(f"{inner}."):
            return inner
    return f"{package}.{SHARED.get(module, rest.partition('.')[0])}" if rest else package


def rooms(arrows: Arrows) -> dict[str, frozenset[str]]:
    """The arrows between rooms; those inside a room are left out."""
    between: dict[str, set[str]] = {}
    for module, targets in arrows.items():
        here = room(module)
        between.setdefault(here, set()).update(there for target in targets if (there := room(target)) != here)
    return {name: frozenset(targets) for name, targets in between.items()}


def circles(arrows: Arrows) -> list[list[str]]:
    """Groups of two or more that reach one another, each sorted (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for target in sorted(arrows.get(name, ())):
            if target not in index:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], index[target])
        if low[name] == index[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(arrows):
        if name not in index:
            visit(name)
    return sorted(found)


def floors(arrows: Arrows) -> dict[str, int]:
    """By name, how many lie below it in the longest chain of arrows, itself included.

    Raises:
        ValueError: a circle, which has no lowest floor.
    """
    around = circles(arrows)
    if around:
        raise ValueError(f"these import one another: {'; '.join(', '.join(group) for group in around)}")
    height: dict[str, int] = {}

    def floor(name: str) -> int:
        if name not in height:
            height[name] = 1 + max((floor(target) for target in arrows.get(name, ())), default=0)
        return height[name]

    for name in arrows:
        floor(name)
    return height


def inside(arrows: Arrows, package: str) -> dict[str, frozenset[str]]:
    """The arrows that begin and end in one package."""
    own = {
        name: targets for name, targets in arrows.items() if name.partition(".")[0] == package and name not in TABLES
    }
    return {name: frozenset(target for target in targets if target in own) for name, targets in own.items()}


def drawing(arrows: Arrows, package: str) -> str:
    """One package: its rooms by floor, the highest first, each with the rooms that it imports."""
    own = inside(arrows, package)
    between = inside(rooms(arrows), package)
    around, around_rooms = circles(own), circles(between)
    head = f"{package}: {len(own)} modules, {len(around)} circles of modules, {len(around_rooms)} circles of rooms"
    lines = [*(f"  circle: {', '.join(group)}" for group in around + around_rooms)]
    if around_rooms:
        return "\n".join([head, *lines])
    height = floors(between)
    lines.insert(0, f"{head}, {max(height.values())} floors")
    for level in range(max(height.values()), 0, -1):
        for name in sorted(name for name in between if height[name] == level):
            targets = sorted(between[name], key=lambda target: (-height[target], target))
            shown = ", ".join(_short(target, package) for target in targets)
            lines.append(f"  {level:>2}  {_short(name, package)}" + (f" → {shown}" if shown else ""))
    return "\n".join(lines)


def _short(name: str, package: str) -> str:
    return name.removeprefix(f"{package}.")


def main() -> int:
    arrows = imports()
    print("\n\n".join(drawing(arrows, package) for package in PACKAGES))
    return 1 if circles(arrows) or circles(rooms(arrows)) else 0


if __name__ == "__main__":
    sys.exit(main())
