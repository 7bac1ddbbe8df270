"""A plan in training code that a library runs. Each module imports its library only.

transformers   a Trainer
accelerate     an Accelerator
lightning      Fabric and a Trainer
plans          what these have in common
export/        the plan in the words of other frameworks
launch/        the plan in a script that does not know of it
"""
