"""What a model costs on the device at hand: each layer in each option, and whole steps.

measure     workload -> profile
layers      layers of equal shape -> rows
candidates  one layer in one option, on its own
compiling   torch.compile of what is timed
tracing     the operations that really ran
steps       whole steps, interleaved
proving     the CUDA kernels that really ran
"""

from autoprec.profiler.compiling import open_compilation
from autoprec.profiler.measure import profile_model
from autoprec.profiler.steps import time_steps

__all__ = ["open_compilation", "profile_model", "time_steps"]
