"""The user's own training script -> run with a plan, or recorded for tuning; the file untouched.

script      runs a script or module as `python` would
patches     wraps torch's functions for a while and puts them back
watch       waits for the plan's model in a running script, and applies it
running     the script with that watch, and what it spawns: `run_with_plan`
guarding    a Guard in a script that does not know of it
tape        the operations between a model's output and its loss, recorded and replayed
alive       what contains what, and by which variables a script has it
calls       a model's calls, as they are seen and as they are kept
recorder    follows a script's first steps: model calls, backward, optimizer steps
sharded     a model that FSDP has sharded, whole again
optimizers  what an optimizer trains, and how it is copied to another copy of its model
weights     what a model's weights and gradients are
recorded    what was recorded -> a Workload: `record_workload`
"""

from autoprec.integrations.launch.recorded import record_workload
from autoprec.integrations.launch.running import run_with_plan
from autoprec.integrations.launch.script import Script
