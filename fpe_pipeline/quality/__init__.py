"""How good edits are: scored on the embedded model, where the right answer to each edit is known.

:func:`evaluate` draws held-out sources and edits of them and has the judge compare the two; :func:`summarise` turns the
per-pair values into means with intervals. :func:`score_subject` makes one edit at a time by every
method, of generated and of real images, and :func:`compare` sums that up. ``add_arguments`` and ``run`` are the command
line's.
"""

from __future__ import annotations

from .command import add_arguments, run
from .intervals import bootstrap_interval, share_interval, summarise
from .methods.comparison import MethodScore, score_subject
from .methods.contenders import CONTENDERS, Contender, contenders
from .methods.image_folder import folder_subjects
from .methods.subjects import Subject, generated_subjects, render_subjects
from .methods.tally import compare
from .study.conditions import Condition, standard_conditions, sweep_conditions
from .study.pairs import EditPair, held_out_pairs
from .study.scores import Score, evaluate

__all__ = [
    "CONTENDERS",
    "Condition",
    "Contender",
    "EditPair",
    "MethodScore",
    "Score",
    "Subject",
    "add_arguments",
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
