"""The command line of :mod:`benchmarks.gpu`."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
from pathlib import Path

from . import __doc__ as description
from .session import BUDGETS, Session, collect_journals
from .stages import SESSIONS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    folder = Path(os.environ.get("OUT") or "gpu-results")
    for kind in SESSIONS:
        one = commands.add_parser(kind)
        one.add_argument("--out", type=Path, default=folder, help="result folder; default: $OUT, or gpu-results")
        one.add_argument("--budget", type=_above_0, default=BUDGETS[kind], help="seconds for everything")
        one.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
        one.add_argument("--dry-run", action="store_true", help="the same stages on tiny cases, on a CPU")
        one.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help=argparse.SUPPRESS)
        one.add_argument("--stages", default="", help="only these, joined by commas")
        if kind == "full":
            one.add_argument(
                "--take-over", action="store_true", help="write the tuner's table into the tree, and measure with it"
            )
        if kind == "train":
            one.add_argument("--models", default="embedded", help="names of models, joined by commas")
            one.add_argument("--max-mib", type=_above_0, default=16.0, help="largest file to leave, in MiB")
    collected = commands.add_parser("collect", help="make files of rows from journals")
    collected.add_argument("out", type=Path)
    ahead = commands.add_parser("programs", help="compile ahead for a chip that is not here")
    ahead.add_argument("--arch", default="sm_90")
    ahead.add_argument("--session", choices=["smoke", "full"], default="smoke")
    ahead.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    ahead.add_argument("--update", action="store_true", help="write the figure of this Triton to benchmarks/results")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if options.command == "collect":
        print("\n".join(map(str, collect_journals(options.out))) or f"no rows in {options.out}")
        return 0
    if options.command == "programs":
        return _programs(options)
    named = dict(entry.split("=", 1) for entry in options.option)
    device = "cpu" if options.dry_run else options.device
    if device == "cuda" and not _cuda():
        return 2
    only = tuple(name for name in options.stages.split(",") if name)
    unknown = set(only) - {stage.name for stage in SESSIONS[options.command]}
    if unknown:
        known = ", ".join(stage.name for stage in SESSIONS[options.command])
        parser.error(f"no such stages: {', '.join(sorted(unknown))}; {options.command} has {known}")
    if options.command == "full" and options.take_over:
        named["take-over"] = "yes"
    if options.command == "train":
        named |= {"models": options.models, "max-mib": str(options.max_mib)}
    return Session(
        options.command, options.out.resolve(), options.budget, device, dry=options.dry_run, options=named, only=only
    ).run()


def _above_0(text: str) -> float:
    """Seconds or sizes: no number would be no limit, and parts of no bytes hold nothing."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def _cuda() -> bool:
    import torch

    from fpe_kernels import backends

    if torch.cuda.is_available():
        return True
    served = [name for name, answer in backends().items() if answer == "available"]
    print(
        f"No CUDA device: PyTorch {torch.__version__} finds none. Here {' and '.join(served)} serve; "
        "`python -m benchmarks` measures them. `--dry-run` goes through the stages on tiny cases.",
        file=sys.stderr,
    )
    return False


def _programs(options: argparse.Namespace) -> int:
    from .figures import FIGURE, measure_programs

    figure, failures = measure_programs(options.arch, options.session, options.workers)
    print(json.dumps(figure))
    for name, reason in failures:
        print(f"  {name}: {reason}")
    if options.update and not failures:
        FIGURE.write(figure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
