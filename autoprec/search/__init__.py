"""The choice: tables of time and e -> the plan of least time to loss within the constraint.

costs          what a plan costs by the tables: step time, e, bytes
keeps          --keep: what the user has fixed
problem        what there is to choose, with ties and locks; the exact front
solver         the exact answer, by HiGHS
space          the decisions of the study
judge          a whole plan -> its measured e and time to loss
storage        the Optuna study in its database
study          the study's trials
explore        which whole plans to measure, in which order
repair         which layers make a plan worse than the sum of its parts
stage          search_plan: all of this
planning       build_plan: a point -> the plan; reasons and wording put it in words

Imports no torch; Optuna is imported when a search begins.
"""

from autoprec.search.planning import build_plan
from autoprec.search.stage import grad_error_budget, search_plan
