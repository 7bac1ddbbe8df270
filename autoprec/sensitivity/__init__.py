"""What each option does to the gradient, per layer: the gradient error.

measure         the stage: warmed-up reference -> Sensitivity

    what it is measured against
reference       warmed-up weights, batches and reference gradients
warm_up         a training to where it is measured, or what a file has of one
preconditioner  how the optimizer weighs a gradient: read from its state (moments), or from its
                steps (response); hooks says what a gradient's own hooks leave of an error
real            complex parameters as real numbers
room            how much memory it may take, and in how many groups of layers it goes then
parked          tensors that wait away from the device

    the table
tables          the two ways to it, exact and by probes, and the choice between them
estimates       an error over batches, and how sure it is
doubts          which rows of the probes are measured by themselves after them
probes          the depth-free way: all layers and options from a few sign-coded probes
moves           a pass with the weights moved along a probe's signs
choices         top-k and argmax, kept in moved passes as the reference chose
kinks           what jumps of the derivative (ReLU, max pooling) add, from two steps of a probe
linear          a linear's errors in every option, its products with a probe, its operands' ranges
local           what an error inside one layer is made of; any other layer's error in BF16
replay          a layer run again alone, on what went through it
casts           what the recipes do to an operand, in plain arithmetic
emulation       a linear in FP8 of that arithmetic; gemm has FP8 GEMMs on a CPU, fast

    what it says
joint           whole assignments, measured jointly
islands         where BF16 itself is too coarse
check           the table beside joint measurements; rows measured one by one where they differ
batching        what larger batches do to an error
causes          what stands out in a layer's operands, and which of it causes its error, in words
repairs         how much of a layer's error goes with each suspect operand repaired
gap             from a gradient error to a loss gap, and back

Importing this package imports no torch: `gap` and `causes` can be had without it.
"""
