"""Import modules where torch cannot be: `python tests/torch_watch.py MODULE...` names who asks."""

import importlib
import json
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import FrameType, ModuleType


class NoTorch(MetaPathFinder):
    """A finder that refuses torch and notes which module of ours asked for it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> None:
        """Find no module, and refuse torch."""
        if name != "torch":
            return
        frame: FrameType | None = sys._getframe()
        while frame and not frame.f_globals["__name__"].startswith("autoprec"):
            frame = frame.f_back
        self.asked.append(frame.f_globals["__name__"] if frame else "another package")
        raise ModuleNotFoundError("this module shall do without torch", name="torch")


def torch_users(modules: Sequence[str]) -> dict[str, list[str]]:
    """Return the modules whose import asks for torch, each with those that asked."""
    finder = NoTorch()
    sys.meta_path.insert(0, finder)
    users = {}
    for module in modules:
        finder.asked.clear()
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name != "torch":
                raise
        if finder.asked:
            users[module] = list(finder.asked)
    return users


if __name__ == "__main__":
    sys.stdout.write(json.dumps(torch_users(sys.argv[1:])))
