"""The user's file: five plain functions, found by name, checked on every call.

    def build_model() -> nn.Module
    def train_batches(seed: int) -> Iterator[Any]        # same seed, same batches
    def loss_fn(model, batch) -> Tensor                  # scalar
    def build_optimizer(model) -> torch.optim.Optimizer  # optional; default AdamW
    def eval_batches() -> Iterable[Any]                  # optional; default: a reserved seed

`train_batches` may be endless or finite. `model.py:name` is an object of that file with the same
functions as methods. Whatever goes wrong in the user's code becomes one `WorkloadError` line that
names the function, what it must return and what it returned; the original exception is its cause.
"""

import hashlib
import importlib.util
import itertools
import math
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ContextDecorator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from autoprec.errors import AutoprecError, WorkloadError
from autoprec.workload.hf_config import META_ALONE, config_file

EVAL_SEED = 2**31 - 1  # reserved: no stage trains on it
MAX_EVAL_BATCHES = 64  # an endless eval_batches() is cut here
DEFAULT_EVAL_BATCHES = 8

Batch = Any  # Any: whatever the user's loss_fn takes


@dataclass(frozen=True)
class Workload:
    """The five functions, defaults filled in, every result checked.

    `name` is how the user called it, `digest` a hash of the file's text (for resuming safely).
    """

    name: str
    digest: str
    _functions: Mapping[str, Callable[..., Any]]  # Any: user code

    def build_model(self, *, seed: int = 0) -> nn.Module:
        """Build the model with torch's generator seeded: same seed, same initial weights."""
        torch.manual_seed(seed)
        with _user_code("build_model()", "an nn.Module"):
            model = self._functions["build_model"]()
        if not isinstance(model, nn.Module):
            raise WorkloadError(_returned("build_model()", "an nn.Module", model))
        if next(model.parameters(), None) is None:
            raise WorkloadError(
                "build_model() must return a model with parameters, but "
                f"{type(model).__name__} has none; there is nothing to train"
            )
        return model

    def train_batches(self, seed: int) -> Iterator[Batch]:
        """Yield training batches without end: a finite iterator starts over."""
        while True:
            count = 0
            with _user_code(f"train_batches(seed={seed})", "an iterator of batches"):
                iterator = iter(self._functions["train_batches"](seed))
            while True:
                with _user_code(f"train_batches(seed={seed})", "an iterator of batches"):
                    batch = next(iterator, _END)
                if batch is _END:
                    break
                count += 1
                yield batch
            if count == 0:
                raise WorkloadError(
                    f"train_batches(seed={seed}) must yield at least one batch, but it yielded "
                    "none; return a fresh iterator on every call"
                )

    def eval_batches(self) -> Sequence[Batch]:
        """Return the held-out batches (at most MAX_EVAL_BATCHES)."""
        if "eval_batches" not in self._functions:
            return list(itertools.islice(self.train_batches(EVAL_SEED), DEFAULT_EVAL_BATCHES))
        with _user_code("eval_batches()", "an iterable of batches"):
            batches = list(
                itertools.islice(iter(self._functions["eval_batches"]()), MAX_EVAL_BATCHES)
            )
        if not batches:
            raise WorkloadError(
                "eval_batches() must return at least one batch, but it returned none; "
                "return a fresh iterable on every call, or leave the function out"
            )
        return batches

    def loss_fn(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the scalar, floating loss of one batch; its value is not looked at here."""
        with _user_code("loss_fn(model, batch)", "a scalar tensor"):
            loss = self._functions["loss_fn"](model, batch)
        if not isinstance(loss, Tensor):
            raise WorkloadError(_returned("loss_fn(model, batch)", "a scalar tensor", loss))
        if loss.numel() != 1 or not loss.is_floating_point():
            raise WorkloadError(
                "loss_fn(model, batch) must return a scalar floating tensor, but it returned shape "
                f"{tuple(loss.shape)} of {loss.dtype}; reduce it, e.g. with .mean()"
            )
        return loss.reshape(())

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Build the user's optimizer over `model` (AdamW with its defaults when there is none)."""
        if "build_optimizer" not in self._functions:
            return torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        with _user_code("build_optimizer(model)", "a torch.optim.Optimizer"):
            optimizer = self._functions["build_optimizer"](model)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise WorkloadError(
                _returned("build_optimizer(model)", "a torch.optim.Optimizer", optimizer)
            )
        own = {id(parameter) for parameter in model.parameters()}
        listed = [p for group in optimizer.param_groups for p in group["params"]]
        if any(id(parameter) not in own for parameter in listed):
            raise WorkloadError(
                "build_optimizer(model) must optimise parameters of the model it is given, but it "
                "lists others; pass model.parameters()"
            )
        return optimizer


def load_workload(reference: str) -> Workload:
    """Load `model.py` or `model.py:name`.

    Raises:
        WorkloadError: the file is missing, does not import, lacks a required function, or is a
            transformers config, which only `--meta` takes.
    """
    if config_file(reference):
        raise WorkloadError(META_ALONE.format(config=reference))
    path_text, _, name = reference.partition(".py:")
    path = Path(path_text + ".py" if name else reference)
    if not path.is_file():
        raise WorkloadError(
            f"the workload must be a Python file, but {path} is not there; "
            "give a path such as model.py or model.py:name (or, with --meta, a config.json)"
        )
    holder: object = _import_file(path)
    if name:
        if not hasattr(holder, name):
            raise WorkloadError(f"{path} must define {name!r}, but it does not; check the name")
        holder = getattr(holder, name)
    digest = hashlib.sha256(path.read_bytes() + name.encode()).hexdigest()[:16]
    return workload_from(holder, name=reference, digest=digest)


def workload_from(holder: object, *, name: str = "", digest: str = "") -> Workload:
    """Make a workload of any object (module, class instance, namespace) with the five functions."""
    functions = {}
    for function in REQUIRED + OPTIONAL:
        found = getattr(holder, function, None)
        if found is None and function in REQUIRED:
            raise WorkloadError(
                f"{name or type(holder).__name__} must define {SIGNATURES[function]}, but it does "
                "not; see the README for the five functions"
            )
        if found is not None:
            if not callable(found):
                raise WorkloadError(_returned(function, "a function", found))
            functions[function] = found
    return Workload(name=name or type(holder).__name__, digest=digest, _functions=functions)


REQUIRED = ("build_model", "train_batches", "loss_fn")
OPTIONAL = ("build_optimizer", "eval_batches")
SIGNATURES = {
    "build_model": "build_model() -> nn.Module",
    "train_batches": "train_batches(seed) -> iterator of batches",
    "loss_fn": "loss_fn(model, batch) -> scalar tensor",
}
_END = object()


def take_batches(
    workload: Workload, *, seed: int, count: int, skip: int = 0, device: torch.device | None = None
) -> list[Batch]:
    """Return `count` training batches of a seed after the first `skip`, on `device`."""
    stream = itertools.islice(workload.train_batches(seed), skip, skip + count)
    return [batch if device is None else move_batch(batch, device) for batch in stream]


def check_batches(workload: Workload, *, seed: int, count: int = 2) -> None:
    """Check that the same seed gives the same batches.

    Raises:
        WorkloadError: two fresh iterators of one seed differ.
    """
    first = take_batches(workload, seed=seed, count=count)
    again = take_batches(workload, seed=seed, count=count)
    for index, (one, other) in enumerate(zip(first, again, strict=True)):
        if not _same(one, other):
            raise WorkloadError(
                "train_batches(seed) must give the same batches for the same seed, but batch "
                f"{index} of seed {seed} differs between two calls; draw from a generator seeded "
                "with `seed` alone"
            )


def check_loss(loss: Tensor, *, where: str) -> float:
    """Return the loss as a float.

    Raises:
        WorkloadError: it is NaN or infinite.
    """
    value = float(loss.detach())
    if not math.isfinite(value):
        raise WorkloadError(
            f"the FP32 loss must be finite, but it is {value} {where}; "
            "lower the learning rate or look at the data"
        )
    return value


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with every tensor in it (dicts, lists, tuples, `.to`) on `device`."""
    if isinstance(batch, Mapping) and type(batch) is dict:
        return {key: move_batch(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move_batch(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(move_batch(value, device) for value in batch)
    if hasattr(batch, "to"):
        return batch.to(device)
    return batch


def batch_tensors(batch: Batch) -> list[Tensor]:
    """Return the tensors in a batch, in order."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, list | tuple):
        return [tensor for item in batch for tensor in batch_tensors(item)]
    return []


def _same(one: Batch, other: Batch) -> bool:
    pairs = list(zip(batch_tensors(one), batch_tensors(other), strict=False))
    return len(batch_tensors(one)) == len(batch_tensors(other)) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in pairs
    )


def _import_file(path: Path) -> ModuleType:
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # the file's own imports work as when it is run as a script
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise WorkloadError(f"the workload must be a Python file, but {path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickle look classes up there
    with _user_code(f"{path}", "a file that imports"):
        spec.loader.exec_module(module)
    return module


def _returned(function: str, wanted: str, got: object) -> str:
    return f"{function} must return {wanted}, but it returned {type(got).__name__}; mend it"


class _user_code(ContextDecorator):  # noqa: N801 - reads as a statement
    """Turn any exception of the user's code into one WorkloadError line."""

    def __init__(self, function: str, wanted: str) -> None:
        self.function = function
        self.wanted = wanted

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, AutoprecError):
            return
        frames: Iterable[traceback.FrameSummary] = traceback.extract_tb(trace)[1:]
        inside = [frame for frame in frames if "site-packages" not in frame.filename]
        where = f" at {Path(inside[-1].filename).name}:{inside[-1].lineno}" if inside else ""
        what = " ".join(str(error).split())[:300]
        raise WorkloadError(
            f"{self.function} must give {self.wanted}, but it raised {type(error).__name__}"
            f"{where}: {what}"
        ) from error
