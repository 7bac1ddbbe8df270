"""What a model costs on a device that is not here; no torch, and fitted to published figures.

gemm + casts        microseconds of one GEMM, of the casts around it
linear              a linear layer, forward and backward, in BF16 and FP8
parallel            sharded shapes and communication under FSDP and tensor parallelism
layers + step       every layer x option of a model, and its whole training step
predict             a captured model's profile of these; memory: whether a plan fits
family              which layers of two models of one code stand for each other
transfer + carry    a small model's sensitivity to a large one, and a plan back
registry            device profiles by name or path
measure + calibrate a GPU that is here -> a profile (not imported here: it needs torch)
tables + spelling   many linears from a CSV file (not imported here: it needs pandas)
"""

from autoprec.predict.linear import predict_linear
from autoprec.predict.parallel import Parallel, parse_parallel
from autoprec.predict.predict import predict_profile
from autoprec.predict.registry import list_device_profiles, load_device_profile
from autoprec.predict.spelling import parse_recipe
