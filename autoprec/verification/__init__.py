"""Prove a plan by training: branch and anneal, paired seeds, a sequential test.

sequential  gaps of the seeds -> interval, verdict, advice (no training)
session     what the branches of one verification share; those that are finished, on disk
branches    train from the checkpoint in a variant's precisions, evaluate in FP32
metrics     the user's own measures at the end of a branch, tested beside the loss
ladder      the gap over other lengths of training, and how it grows
workers     branches as jobs of other processes or of a cluster
evidence    the branches of a plan -> the record
gate        open a session; the loop: verify_plans
"""

from autoprec.verification.gate import keep_warm_up, verify_plans
from autoprec.verification.sequential import Terms
from autoprec.verification.session import Workers
from autoprec.verification.workers import check_room_of_branches
