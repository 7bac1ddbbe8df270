"""Prove a plan by training: branch and anneal, paired seeds, a sequential test.

sequential  gaps of the seeds -> interval, verdict, advice (no training)
branches    one branch: train from the checkpoint in an arm's precisions, evaluate in FP32
state       finished branches on disk
session     what the plans of one verification share
evidence    the branches of a plan -> the record
steps       the measured step time of the plan beside the baselines
gate        the loop: verify_plan, verify_front
"""

from autoprec.verification.gate import verify_front, verify_plan

__all__ = ["verify_front", "verify_plan"]
