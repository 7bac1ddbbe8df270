"""What a model costs on the device at hand: each layer in each option, and whole steps.

measure     context + spec -> profile
kept        the rows that are timed so far, in a file
groups      layers of equal shape, and the inputs and gradients of a real step
candidates  one layer in one option, on its own; FP8 that is too slow to be timed
surrounded  a layer between its neighbours, as a compiler fuses them
layers      a group -> rows of times and bytes, whole and in parts
compiling   torch.compile of what is timed
steps       whole steps, in turns
parking     the state of a step that waits for its turn
proving     the CUDA kernels that really ran
"""

from autoprec.profiler.compiling import open_compilation
from autoprec.profiler.kept import KeptRows, without_ended
from autoprec.profiler.measure import profile_model
from autoprec.profiler.proving import UNNAMED, name_kernels
from autoprec.profiler.steps import Planned, time_steps, written_variants
