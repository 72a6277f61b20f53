"""`fpe doctor`: what works here, why something does not, and what to install.

Packages are imported and kernels run in processes of their own: one that crashes is named, and the rest goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Annotated, Any

from .. import extras
from ..texts import print_text
from .options import flag
from .setting_options import JSON, QUIET, TRACEBACK

__all__ = ["EXAMPLES", "Finding", "doctor", "findings"]

EXAMPLES = """Examples:

fpe doctor

fpe doctor --no-self-test --json"""

OK, ABSENT, BROKEN = "ok", "not here", "broken"
#: Seconds that the self-test takes, at most; and that imports take.
SELF_TEST, IMPORTS = 60.0, 120.0
_DISTRIBUTIONS = {"PIL": "pillow"}
_IMPORTS = """
import json, sys
for name in sys.argv[1:]:
    try:
        __import__(name)
        print(json.dumps([name, ""]), flush=True)
    except BaseException as error:
        print(json.dumps([name, f"{type(error).__name__}: {' '.join(str(error).split())}"]), flush=True)
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        about: "packages", "devices", "backends" or "self-test".
        name: of the thing.
        state: "ok", "not here", which hinders nothing that is installed, or "broken".
        detail: its version, or what is the matter.
        remedy: what to do about it.
    """

    about: str
    name: str
    state: str
    detail: str = ""
    remedy: str = ""


def doctor(
    no_self_test: Annotated[
        bool, flag("--no-self-test", panel="Options", text="do not run kernels and edits, which takes up to a minute")
    ] = False,
    as_json: Annotated[bool, JSON] = False,
    quiet: Annotated[bool, QUIET] = False,
    traceback: Annotated[bool, TRACEBACK] = False,
) -> Callable[[], int]:
    """Say what works here, why something does not, and what to install.

    Packages are imported, and kernels and edits are held against float64, in a minute at most. With --quiet what is in
    order is not said. The exit code is 1 where something is broken; what is not installed is not.
    """
    return lambda: _run(not no_self_test, as_json, quiet)


def findings(self_test: bool = True) -> Iterator[Finding]:
    """Everything that `fpe doctor` looks at, as it is found."""
    yield from _packages()
    yield from _devices()
    yield from _backends()
    if self_test:
        yield from _self_tests()


def _run(self_test: bool, as_json: bool, quiet: bool) -> int:
    found: list[Finding] = []
    about = ""
    for finding in findings(self_test):
        found.append(finding)
        if as_json or (quiet and finding.state == OK):
            continue
        if finding.about != about:
            about = finding.about
            print_text(about)
        remedy = f"; {finding.remedy}" if finding.remedy else ""
        detail = f"{': ' if finding.detail else ''}{finding.detail}"
        print_text(f"  {finding.state:<9} {finding.name}{detail}{remedy}", flush=True)
    broken = [finding.name for finding in found if finding.state == BROKEN]
    if as_json:
        print_text(json.dumps({"ok": not broken, "findings": [asdict(finding) for finding in found]}, indent=2))
    else:
        print_text(f"broken: {', '.join(broken)}" if broken else "what is installed works")
    return 1 if broken else 0


def _packages() -> Iterator[Finding]:
    """Of every extra, which packages there are, and whether they can be imported."""
    needs = {"": extras.KERNELS, "pipeline": extras.PIPELINE, "app": extras.APP, **extras.OTHERS}
    deadline = time.monotonic() + IMPORTS
    for extra, modules in needs.items():
        absent = extras.missing(modules)
        remedy = f"pip install 'fpe-kernels[{extra}]'" if extra else "pip install fpe-kernels"
        present = [name for name in modules if name not in absent]
        for name in absent:
            yield Finding("packages", name, ABSENT if extra or name == "triton" else BROKEN, "", remedy)
        unseen = dict.fromkeys(present)
        for name, reason in _lines_of(["-c", _IMPORTS, *present], present, deadline):
            unseen.pop(name, None)
            version = _version(name)
            wrong = reason or _other_version(name, extra, version)
            again = f"install it anew: pip install --force-reinstall {_distribution(name)}" if reason else remedy
            yield Finding("packages", name, BROKEN if wrong else OK, wrong or version, again if wrong else "")
        for name in unseen:
            detail = "not looked at: an import before it crashed, or imports took too long"
            yield Finding("packages", name, ABSENT, detail, "run fpe doctor again when less is running")


def _devices() -> Iterator[Finding]:
    if extras.missing(("torch",)):
        return
    import torch

    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    yield Finding("devices", "cpu", OK, f"{threads} thread{'s' * (threads > 1)}, {capability}")
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        detail = f"{about.name}, {about.total_memory / 1e9:.0f} GB, compute capability {about.major}.{about.minor}"
        yield Finding("devices", f"cuda:{index}", OK, detail)
    if not torch.cuda.is_available() and shutil.which("nvidia-smi"):
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        yield Finding(
            "devices", "cuda", BROKEN, f"there is a driver, and torch {torch.__version__} {built} and sees no GPU",
            "install torch for the driver's CUDA as https://pytorch.org says",
        )  # fmt: skip


def _backends() -> Iterator[Finding]:
    if extras.missing(("torch",)):
        return
    from fpe_kernels import backends

    for name, state in backends().items():
        serves = state.startswith("available")
        yield Finding(
            "backends", name, OK if serves else ABSENT, state, "" if serves else "the torch backend serves in its place"
        )


def _self_tests() -> Iterator[Finding]:
    """Kernels on every device, then edits, until a minute is spent; without a GPU triton by its interpreter."""
    if extras.missing(("torch",)):
        return
    import torch

    deadline = time.monotonic() + SELF_TEST
    gpu = torch.cuda.is_available()
    tests = [("torch", "cpu", False), *([("torch", "cuda", False)] if gpu else [])]
    if not extras.missing(("triton",)):
        tests.append(("triton", "cuda" if gpu else "cpu", not gpu))
    for backend, device, interpreted in tests:
        name = f"{backend} on {device}{' (interpreter)' if interpreted else ''}"
        command = ["-m", "fpe_kernels.testing.self_test", backend, device, "--seconds", f"{SELF_TEST / 4:g}"]
        environment = {"TRITON_INTERPRET": "1" if interpreted else "0"}
        yield _judged(name, list(_lines_of(command, (), deadline, environment)), "cases agree with float64")
    if not extras.missing(extras.PIPELINE):
        lines = list(_lines_of(["-m", "fpe_pipeline.app.self_test"], (), deadline))
        yield _judged("edits", lines, "checks pass")


def _judged(name: str, lines: list[tuple[str, str]], passed: str) -> Finding:
    failed = [f"{case}: {reason}" for case, reason in lines if reason]
    if failed:
        return Finding("self-test", name, BROKEN, "; ".join(failed), "report it with what `fpe doctor --json` prints")
    if not lines:
        again = "run fpe doctor again when less is running"
        return Finding("self-test", name, ABSENT, "nothing was done in time", again)
    return Finding("self-test", name, OK, f"{len(lines)} {passed}")


def _lines_of(
    command: list[str], expected: Any, deadline: float, environment: dict[str, str] | None = None
) -> Iterator[tuple[str, str]]:
    """The lines that a process of Python prints, as (name, reason); one that ends early names what it was at."""
    here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    surroundings = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **(environment or {})}
    timed_out = False
    if expected == [] or deadline - time.monotonic() <= 0:
        return
    with subprocess.Popen(
        [sys.executable, *command], env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            out, err = process.communicate(timeout=deadline - time.monotonic())
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            timed_out = True
        except BaseException:  # interrupted: what else it finds nobody reads
            process.kill()
            raise
    lines = [tuple(json.loads(line)) for line in out.splitlines() if line.startswith("[")]
    yield from lines
    if timed_out:
        return
    told = {name for name, _ in lines}
    missing = [name for name in expected if name not in told]
    if missing or process.returncode not in (0, 1) or (process.returncode == 1 and not any(r for _, r in lines)):
        last = err.strip().splitlines()[-1:] or ["it said nothing"]
        yield (missing or ["the process"])[0], f"ended with status {process.returncode}: {last[0]}"


def _distribution(module: str) -> str:
    return _DISTRIBUTIONS.get(module, module)


def _version(module: str) -> str:
    try:
        return metadata.version(_distribution(module))
    except metadata.PackageNotFoundError:
        return "of unknown version"


def _other_version(module: str, extra: str, version: str) -> str:
    """What this package asks of a version where the one installed is another; empty where it is not known."""
    try:
        from packaging.requirements import Requirement

        asked = [Requirement(line) for line in metadata.requires("fpe-kernels") or ()]
    except (ImportError, metadata.PackageNotFoundError):  # a source tree says nothing of versions
        return ""
    for one in asked:
        applies = one.marker is None or one.marker.evaluate({"extra": extra})
        if one.name == _distribution(module) and applies and not one.specifier.contains(version, prereleases=True):
            return f"{version}, and {one.specifier} is needed"
    return ""
