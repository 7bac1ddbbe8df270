"""What each option does to the gradient, per layer: the gradient error.

measure         the stage: warmed-up reference -> Sensitivity
reference       warmed-up weights, batches and reference gradients
preconditioner  how the optimizer weighs a gradient
tables          the two ways to the table, exact and by probes, and the choice between them
probes          the depth-free way: all layers and options from a few sign-coded probes
local           the error an option makes inside one layer
replay          a layer run again alone, on what went through it
operands        a linear's operands, their FP8 casts and their ranges
casts           what the recipes do to an operand, in plain arithmetic
delayed         delayed scaling, emulated where it is asked for
joint           the measured gradient error of a whole assignment
gemm            FP8 GEMMs on a CPU, fast
estimates       per-batch numbers -> estimates with standard errors
gap             from a gradient error to a loss gap, and back

Importing this package imports no torch: `gap` can be had without it.
"""
