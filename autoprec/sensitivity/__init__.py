"""What each option does to the gradient, per layer: the gradient error.

measure         the stage: warmed-up reference -> Sensitivity
joint           whole assignments, measured jointly
check           the table beside joint measurements; rows measured one by one where they differ
room            how much memory it may take, and in how many groups of layers it goes then
reference       warmed-up weights, batches and reference gradients
preconditioner  how the optimizer weighs a gradient
tables          the two ways to the table, exact and by probes, and the choice between them
probes          the depth-free way: all layers and options from a few sign-coded probes
moves           a pass with the weights moved along a probe's signs
choices         top-k and argmax, kept in moved passes as the reference chose
kinks           what jumps of the derivative (ReLU, max pooling) add, from two steps of a probe
linear          a linear's errors in every option, its products with a probe, its operands' ranges
local           what an error inside one layer is made of; any other layer's error in BF16
replay          a layer run again alone, on what went through it
casts           what the recipes do to an operand, in plain arithmetic
emulation       a linear in FP8 of plain arithmetic
causes          what stands out in a layer's operands, and which of it causes its error, in words
repairs         how much of a layer's error goes with each suspect operand repaired
gemm            FP8 GEMMs on a CPU, fast
gap             from a gradient error to a loss gap, and back

Importing this package imports no torch: `gap` and `causes` can be had without it.
"""
