"""The choice: tables of time and gradient error -> the plan of least time to loss.

costs       what a plan costs by the tables: step time, gradient error, bytes
keep        --keep: what the user has fixed
problem     what there is to choose, with ties and locks; the exact plan and front
solver      the exact answer, by HiGHS
space       the names under which a study shows a plan
storage     the Optuna study in its database
workers     many processes on one study: who measures which plan
correction  what measured plans say of the table, the one of its own check first
study       whole plans, each evaluated once as a trial
moves       plans as arrays: exchanges of one or two layers
explore     which whole plans to evaluate, in which order; which layers interact
stage       search_plan: all of this
planning    build_plan: a point -> the plan; reasons (of layers) and notes put it in words

Imports no torch; Optuna is imported when a search begins.
"""

from autoprec.search.planning import build_plan
from autoprec.search.stage import (
    between_notes,
    check_memory,
    default_trials,
    grad_error_budget,
    search_plan,
    sensitivity_for,
)
