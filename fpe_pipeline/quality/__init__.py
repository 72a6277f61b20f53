"""How good edits are: scored on the embedded model, where the right answer to each edit is known.

:func:`evaluate` draws held-out sources and edits of them and has the judge compare the two; :func:`summarise` turns the
per-pair values into means with paired bootstrap intervals. ``add_arguments`` and ``run`` are the command line's.
"""

from __future__ import annotations

from .command import add_arguments, run
from .conditions import Condition, standard_conditions, sweep_conditions
from .pairs import EditPair, held_out_pairs
from .scores import Score, evaluate
from .statistics import bootstrap_interval, summarise

__all__ = [
    "Condition",
    "EditPair",
    "Score",
    "add_arguments",
    "bootstrap_interval",
    "evaluate",
    "held_out_pairs",
    "run",
    "standard_conditions",
    "summarise",
    "sweep_conditions",
]
