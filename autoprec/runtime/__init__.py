"""A plan in a running model: installed in place, trained with FP32 masters, proven, undone.

install   options per layer -> a model that runs them
flow      what happens between layers
classes   the classes that modules get
casting   casts of whatever flows
"""

from autoprec.runtime.install import Installed, install_options

__all__ = ["Installed", "install_options"]
