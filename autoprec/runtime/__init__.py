"""A plan in a running model: installed in place, trained with FP32 masters, proven, undone.

apply      a plan in and out of a model and its optimizer
fit        whether plan and model fit, and a plan without a search
install    options per layer -> a model that runs them
activations what happens between layers: casts
classes    the classes that modules get
shards     options where fully_shard came first: what FSDP2 gathers
gathers    FP8 weights through FSDP2's all-gather, and whole_weights what arrives
masters    the FP32 masters of BF16 parameters
attach     an optimizer that trains them; stepping: its lists and buffers, made once
averages   averages of weights (EMA) that follow them
ranks      the same plan on every rank, or one error on all
proof      what really ran, against the plan
finite     whether the first step of a plan stays finite
checkpoint model, optimizer and guard in one file, and back; sharded_state on many ranks
"""

from autoprec.runtime.apply import apply, master_view, undo
from autoprec.runtime.attach import attach_optimizer
from autoprec.runtime.fit import check_fit, uniform_plan
from autoprec.runtime.install import install_options
from autoprec.runtime.proof import check_applied, trace_step, verify_applied
