"""Prove a plan by training: branch and anneal, paired seeds, a sequential test.

sequential  gaps of the seeds -> interval, verdict, advice (no training)
branches    one branch: train from the checkpoint in a variant's precisions, evaluate in FP32
state       finished branches on disk
session     open what the plans of one verification share; train their branches
evidence    the branches of a plan -> the record
gate        the loop: verify_plans
"""

from autoprec.verification.gate import verify_plans
from autoprec.verification.sequential import Terms
