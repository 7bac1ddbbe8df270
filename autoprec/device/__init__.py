"""What the machine at hand can do: facts, sensors, clocks, FP8 kernels."""
