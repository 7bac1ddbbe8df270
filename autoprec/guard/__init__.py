"""Watch a run and take layers out of FP8, and back, while it trains.

watch      the guard: all of the following, once a step
checks     one step -> what is wrong with it, and which layers are suspected
bands      what is usual for a number -> whether the next one is
signals    one step -> loss and gradient norms, the same on every rank
sampling   which layers' operands are looked at, and when
ranges     one operand of a layer -> how much of it FP8 loses
switches   FP8 layers on and off in place
limits     when to act, how, and what a guard remembers
events     what happened, for people and for programs
"""

from autoprec.guard.events import GuardEvent
from autoprec.guard.limits import Action, Limits
from autoprec.guard.watch import Guard
