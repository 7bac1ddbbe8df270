"""A plan in training code that a library runs. Each module imports its library, and only its own.

transformers   a Trainer
accelerate     an Accelerator
lightning      Fabric and a Trainer
"""
