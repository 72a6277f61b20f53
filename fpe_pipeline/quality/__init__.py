"""How good edits are: scored on the embedded model, where the right answer to each edit is known.

:func:`evaluate` draws held-out sources and edits of them and has the judge compare the two; :func:`summarise` turns the
per-pair values into means with intervals. :func:`score_subject` makes one edit at a time by every
method, of generated and of real images, and :func:`compare` sums that up. ``run`` carries out
an :class:`Evaluation`, which the command line fills in.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .command import run
    from .intervals import bootstrap_interval, share_interval, summarise
    from .methods.comparison import MethodScore, score_subject
    from .methods.contenders import CONTENDERS, Contender, contenders
    from .methods.image_folder import folder_subjects
    from .methods.subjects import Subject, generated_subjects, render_subjects
    from .methods.tally import compare
    from .request import Evaluation
    from .study.conditions import Condition, standard_conditions, sweep_conditions
    from .study.pairs import EditPair, held_out_pairs
    from .study.scores import Score, evaluate

# Imported on first use: a command's help needs the request alone, and the rest takes seconds.
_HOME = {
    "CONTENDERS": "methods.contenders",
    "Condition": "study.conditions",
    "Contender": "methods.contenders",
    "EditPair": "study.pairs",
    "Evaluation": "request",
    "MethodScore": "methods.comparison",
    "Score": "study.scores",
    "Subject": "methods.subjects",
    "bootstrap_interval": "intervals",
    "compare": "methods.tally",
    "contenders": "methods.contenders",
    "evaluate": "study.scores",
    "folder_subjects": "methods.image_folder",
    "generated_subjects": "methods.subjects",
    "held_out_pairs": "study.pairs",
    "render_subjects": "methods.subjects",
    "run": "command",
    "score_subject": "methods.comparison",
    "share_interval": "intervals",
    "standard_conditions": "study.conditions",
    "summarise": "intervals",
    "sweep_conditions": "study.conditions",
}

__all__ = [
    "CONTENDERS",
    "Condition",
    "Contender",
    "EditPair",
    "Evaluation",
    "MethodScore",
    "Score",
    "Subject",
    "bootstrap_interval",
    "compare",
    "contenders",
    "evaluate",
    "folder_subjects",
    "generated_subjects",
    "held_out_pairs",
    "render_subjects",
    "run",
    "score_subject",
    "share_interval",
    "standard_conditions",
    "summarise",
    "sweep_conditions",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
