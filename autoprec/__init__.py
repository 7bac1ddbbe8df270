"""autoprec: which layers of this model should train in FP8, BF16 or FP32, measured and proven."""

__version__ = "0.1.0"
