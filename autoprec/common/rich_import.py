"""rich, imported so that the caller's random numbers go on: its styles draw from `random`."""

import importlib
import random

_before = random.getstate()
importlib.import_module("rich.console")
random.setstate(_before)
