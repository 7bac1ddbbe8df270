"""Watch a run and take layers out of FP8, and back, while it trains.

watch      the guard: all of the following, once a step, and which layers are suspected
signals    one step -> loss and gradient norms, the same on every rank; and what is usual for them
sampling   how much of the operands of FP8 layers FP8's range loses, looked at in few steps
holding    optimizer steps that the device itself leaves out
layers     which layers may be switched, and whose gradients are looked at
records    when to act, what a guard remembers, what it says happened
"""

from autoprec.guard.records import Action, GuardEvent, Limits
from autoprec.guard.watch import Guard
