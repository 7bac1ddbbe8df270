"""Watch a run and take layers out of FP8, and back, while it trains.

bands      what is usual for a number -> whether the next one is
ranges     one operand of a layer -> how much of it FP8 loses
sampling   which layers' operands are looked at, and when
signals    one step -> loss and gradient norms, the same on every rank
switches   FP8 layers on and off in place
snapshots  model and optimizer, to go back to
limits     when to act, and how
state      what a guard remembers
events     what happened, for people and for programs
watch      the guard: all of these, once a step
"""

from autoprec.guard.events import GuardEvent
from autoprec.guard.limits import Action, Limits
from autoprec.guard.watch import Guard

__all__ = ["Action", "Guard", "GuardEvent", "Limits"]
