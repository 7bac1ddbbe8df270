"""What each option does to the gradient, per layer: the gradient perturbation e.

measure         the stage: workload -> Sensitivity
tables          the two ways to the table of e, and the choice between them
layerwise       the exact way: one layer x option at a time
probes, rows    the depth-free way: all layers and options from a few sign-coded probes
local           the error an option makes inside one layer
replay          what went through a layer, and the layer run again on it
operands        a linear's operands, their FP8 casts and their ranges
casts           what the recipes do to an operand, in plain arithmetic
history         the amax history of delayed scaling
joint           the measured e of a whole assignment
reference       warmed-up weights, batches and reference gradients
preconditioner  how the optimizer weighs a gradient
gemm            FP8 GEMMs on a CPU, fast
estimates       per-batch numbers -> estimates with standard errors
gap             from a gradient error to a loss gap, and back

Importing this package imports no torch: `gap` can be had without it.
"""
