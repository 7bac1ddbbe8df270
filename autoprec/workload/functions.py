"""The user's side: plain functions of a file, an object or a mapping, checked on every call.

    def build_model() -> nn.Module
    def train_batches(seed: int) -> Iterator[Any]        # same seed, same batches
    def loss_fn(model, batch) -> Tensor                  # scalar
    def build_optimizer(model) -> torch.optim.Optimizer  # or a list; default AdamW
    def eval_batches() -> Iterable[Any]                  # optional; default: a reserved seed
    def build_scheduler(optimizer) -> LRScheduler        # optional; stepped after each step
    def evaluate(model) -> float | dict[str, float]      # optional: metrics, see --metric-tolerance
    accumulation_steps = 4                               # optional: batches of an optimizer step
    clip_norm = 1.0                                      # optional: the gradient's largest norm

and two for `torchrun ... -m autoprec tune model.py`, which one process alone never calls:

    def parallelize(model, mesh) -> nn.Module            # optional; default: DDP
    def build_mesh(device_type: str) -> DeviceMesh       # optional; default: ("dp",), all ranks

    def parallelize(model, mesh):                        # FSDP2, block by block
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def build_mesh(device_type):                         # FSDP2 x tensor parallel
        sizes = (dist.get_world_size() // 2, 2)
        return init_device_mesh(device_type, sizes, mesh_dim_names=("dp", "tp"))

A batch is what one rank takes: of n ranks with data of their own, rank r trains on batches r,
r + n, r + 2n, ... of the stream, unless `train_batches(seed, rank, world_size)` asks for both
numbers and deals itself. Ranks that differ in a dimension `tp` or `cp` alone get the same batches.

`train_batches` may be endless or finite. `model.py:name` is an object of that file with the same
functions as methods; objects and functions that are there already, as in a notebook, need no file.
Whatever goes wrong in the user's code becomes one `WorkloadError` line that names the function,
what it must return and what it returned; the original exception is its cause.
"""

import dataclasses
import inspect
import itertools
import math
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType, ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from autoprec.common.lost_ranks import is_of_lost_rank
from autoprec.common.progress import NOW
from autoprec.common.text import error_line, shown_value
from autoprec.errors import AutoprecError, WorkloadError
from autoprec.workload.optimizers import checked_optimizer, checked_schedule, plain_parts
from autoprec.workload.written import (
    LOW_PRECISION,
    Written,
    check_built,
    is_compiled,
    no_autocast,
    note_moving,
    plain_model,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

EVAL_SEED = 2**31 - 1  # reserved: no stage trains on it
MAX_EVAL_BATCHES = 64  # an endless eval_batches() is cut here
DEFAULT_EVAL_BATCHES = 8
PACKAGE = str(Path(__file__).parents[1])  # of autoprec, wherever it lies
LIBRARIES = ("site-packages", sysconfig.get_path("stdlib"), PACKAGE)  # where no user's code is
NO_OBJECTS = (list, tuple, type, nn.Module, FunctionType, ModuleType)
LONGEST_ERROR = 300  # characters of the user's own exception

T = TypeVar("T")
Batch = Any  # Any: whatever the user's loss_fn takes


InFp32 = Callable[[nn.Module], torch.dtype | None]


@dataclass(frozen=True)
class Part:
    """What one rank does of a workload: its batches, its part of the model, the loss of all."""

    rank: int = 0  # of those that have batches of their own
    ranks: int = 1
    # The user's model, as every rank builds it, to the one that this rank trains.
    spread: "Callable[[Workload, nn.Module], nn.Module]" = lambda _, model: model
    joined: Callable[[Tensor], Tensor] = lambda loss: loss  # this rank's loss to the mean of all
    # makes a spread model compute in FP32; returns the dtype in which it did until then, if 16-bit
    in_fp32: InFp32 = lambda _: None


ALONE = Part()


@dataclass(frozen=True)
class Workload:
    """The user's functions, defaults filled in, every result checked.

    Attributes:
        name: how the user called it.
        reference: its file for other processes, wherever its code changes to; empty for live
            objects.
        digest: a hash of the file's text, so that only an unchanged one is resumed; empty for live
            objects, of which nobody can say whether they are the same.
        written: their autocast, dtypes and compiling, as far as these were seen.
        part: what this process does of them, where it is one of several ranks.
        accumulation_steps: the batches of one optimizer step; their gradients' mean is taken.
        clip_norm: what the gradient's norm is clipped to before each step; None: it is not.
        schedules: where a schedule that starts like this peaks and ends, once it was looked ahead.
    """

    name: str
    digest: str
    _functions: Mapping[str, Callable[..., Any]]  # Any: user code
    written: Written = field(default_factory=Written)
    part: Part = field(default_factory=lambda: ALONE)
    accumulation_steps: int = 1
    clip_norm: float | None = None
    schedules: dict[tuple[object, ...], tuple[int, int | None]] = field(default_factory=dict)
    reference: str = ""

    def build_model(self, *, seed: int = 0, in_fp32: bool = True) -> nn.Module:
        """Build the model for training, not compiled: same seed, same initial weights.

        In FP32, else in its own dtypes.
        """
        # FP32 before it is sharded; what compiles its parts may be the sharding function
        spread = self._spread(plain_model(self._build(seed), in_fp32=in_fp32))
        model = plain_model(spread, in_fp32=in_fp32)
        self.written.gathered = self.part.in_fp32(model)
        note_moving(model, self.written.moving)
        return model

    def written_model(self, *, seed: int = 0) -> nn.Module:
        """Build the model as the user trains it, in its own dtypes and compiled if it is."""
        return self._spread(self._build(seed))

    def _spread(self, model: nn.Module) -> nn.Module:
        found = self.part.spread(self, model)
        self.written.is_compiled |= is_compiled(found)
        return found

    def _build(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = self._call("build_model()", nn.Module, "an nn.Module")
        check_built(model)
        if not model.training:  # else parts in eval mode are meant so (frozen norms)
            model.train()
        self.written.dtypes |= {p.dtype for p in model.parameters()} & {*LOW_PRECISION}
        self.written.is_compiled |= is_compiled(model)
        return model

    def train_batches(self, seed: int) -> Iterator[Batch]:
        """Yield training batches without end: a finite iterator starts over."""
        user_code = UserCode(f"train_batches(seed={seed})", "an iterator of batches")
        while True:
            with user_code:
                iterator = self._own_batches(seed)
                next_one = [*itertools.islice(iterator, 1)]
            if not next_one:
                ranks = self.part.ranks
                wanted, got = ("one batch", "none") if ranks == 1 else (f"{ranks} batches", "fewer")
                raise WorkloadError(
                    f"train_batches(seed={seed}) must yield at least {wanted}, but it yielded "
                    f"{got}; return a fresh iterator on every call"
                )
            while next_one:
                yield next_one.pop()  # a batch that was given away takes no memory here
                with user_code:
                    next_one = [*itertools.islice(iterator, 1)]

    def _own_batches(self, seed: int) -> Iterator[Batch]:
        """Return this rank's part of one pass: every n-th batch, or what the function deals."""
        function, part = self._functions["train_batches"], self.part
        if _parameters(function) >= DEALING:
            return iter(function(seed, rank=part.rank, world_size=part.ranks))
        stream = iter(function(seed))
        return stream if part.ranks == 1 else itertools.islice(stream, part.rank, None, part.ranks)

    def defines(self, name: str) -> bool:
        """Whether the user defined an optional function."""
        return name in self._functions

    def build_mesh(self, device_type: str) -> "DeviceMesh":
        """Return the user's mesh of ranks."""
        from torch.distributed.device_mesh import DeviceMesh

        return self._call("build_mesh(device_type)", DeviceMesh, "a DeviceMesh", device_type)

    def parallelize(self, model: nn.Module, mesh: "DeviceMesh") -> nn.Module:
        """Return the model as the user spreads it over the ranks of a mesh."""
        call = "parallelize(model, mesh)"
        return self._call(call, nn.Module, "the model (end it with `return model`)", model, mesh)

    def eval_batches(self) -> Sequence[Batch]:
        """Return the held-out batches (at most MAX_EVAL_BATCHES)."""
        if "eval_batches" not in self._functions:
            return list(itertools.islice(self.train_batches(EVAL_SEED), DEFAULT_EVAL_BATCHES))
        with UserCode("eval_batches()", "an iterable of batches"):
            batches = list(itertools.islice(self._functions["eval_batches"](), MAX_EVAL_BATCHES))
        if not batches:
            raise WorkloadError(
                "eval_batches() must return at least one batch, but it returned none; "
                "return a fresh iterable on every call, or leave the function out"
            )
        return batches

    def loss_fn(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of one batch, run eagerly and without the user's own autocast."""
        with self.plainly():
            return self.written_loss(model, batch)

    @contextmanager
    def plainly(self) -> Iterator[None]:
        """Run the user's code eagerly and without its autocast; checkpointing does in backward."""
        with no_autocast(self.written), torch.compiler.set_stance("force_eager"):
            yield

    def written_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the scalar, floating loss of one batch, run as the user does."""
        try:
            with self.written.around(model):
                loss = self._call("loss_fn(model, batch)", Tensor, "a scalar tensor", model, batch)
        except WorkloadError as error:
            is_low = any(p.dtype in LOW_PRECISION for p in model.parameters())
            is_of_dtype = "float" in str(error).lower() or "AssertionError" in str(error)
            if is_low and not self.written.dtypes and is_of_dtype:
                error.args = (f"{error}{GIVES_BF16}",)
            raise
        if loss.numel() != 1 or not loss.is_floating_point():
            raise WorkloadError(
                "loss_fn(model, batch) must return a scalar floating tensor, but it returned shape "
                f"{tuple(loss.shape)} of {loss.dtype}; reduce it, e.g. with .mean()"
            )
        return self.part.joined(loss.reshape(()))

    def evaluate(self, model: nn.Module) -> object:
        """Return what the user's evaluate does, run as `loss_fn` is (`verification.metrics`)."""
        with self.plainly():
            return self._call("evaluate(model)", object, "a number, or numbers by name", model)

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Build the user's optimizer over `model`.

        When there is none: AdamW with its defaults, fused on a GPU. One kernel then does what a
        careful user's would, and a guard needs not wait for the device to leave a bad step out.
        """
        if "build_optimizer" not in self._functions:
            trained = [p for p in model.parameters() if p.requires_grad]
            is_on_gpu = {p.device.type for p in trained} == {"cuda"}
            return torch.optim.AdamW(trained, fused=True if is_on_gpu else None)
        call, wanted = "build_optimizer(model)", "a torch.optim.Optimizer, or a list of them"
        return checked_optimizer(self._call(call, object, wanted, model), model, call, wanted)

    def build_scheduler(self, optimizer: torch.optim.Optimizer) -> LRScheduler | None:
        """Build the user's schedule of learning rates; None where there is none."""
        if "build_scheduler" not in self._functions:
            return None
        call, wanted = "build_scheduler(optimizer)", "a torch.optim.lr_scheduler.LRScheduler"
        return checked_schedule(self._call(call, LRScheduler, wanted, optimizer), optimizer, call)

    def _call(self, call: str, kind: type[T], wanted: str, *args: object) -> T:
        """Call a function, written as `name(arguments)`, and return its result of this kind."""
        with UserCode(call, wanted):
            result = self._functions[call.partition("(")[0]](*args)
        if not isinstance(result, kind):
            got = type(result).__name__
            raise WorkloadError(f"{call} must return {wanted}, but it returned {got}; fix it")
        return result


def workload_from(holder: object, *, name: str = "", digest: str = "") -> Workload:
    """Make a workload of an object (module, class instance) or a mapping with the functions.

    Raises:
        WorkloadError: a required function is missing, one is none, or a mapping has others.
    """
    if not isinstance(holder, Mapping):
        name = name or type(holder).__name__
        holder = {each: getattr(holder, each, None) for each in DEFINED}
    name = name or "the workload"
    functions = {each: found for each, found in holder.items() if found is not None}
    readme = "see the README for the functions of a workload"
    for each, found in functions.items():
        if each not in DEFINED:
            may = f"{name} may define {', '.join(DEFINED)}"
            raise WorkloadError(f"{may}, but it defines {shown_value(each)}; {readme}")
        if each in VALUES:
            _check_value(each, found)
        elif not callable(found):
            got = shown_value(found)
            raise WorkloadError(f"{each} must be a function, but it is {got}; fix it")
    for each, signature in REQUIRED.items():
        if each not in functions:
            raise WorkloadError(f"{name} must define {signature}, but it does not; {readme}")
    values = {each: functions.pop(each) for each in VALUES if each in functions}
    return Workload(name=name, digest=digest, _functions=functions, **values)


REQUIRED = {
    "build_model": "build_model() -> nn.Module",
    "train_batches": "train_batches(seed) -> iterator of batches",
    "loss_fn": "loss_fn(model, batch) -> scalar tensor",
}
SPREADING = ("parallelize", "build_mesh")
OPTIONAL = ("build_optimizer", "build_scheduler", "eval_batches", "evaluate", *SPREADING)
VALUES = {"accumulation_steps": "a whole number from 1", "clip_norm": "a number above 0"}
DEFINED = (*REQUIRED, *OPTIONAL, *VALUES)
GIVES_BF16 = "; a plan's layers give BF16: cast before what takes FP32 alone, as in op(x.float())"
DEALING = {"rank", "world_size"}  # arguments of a train_batches that deals batches to ranks itself


def _check_value(name: str, value: Any) -> None:  # Any: the user's
    is_number = isinstance(value, int if name == "accumulation_steps" else int | float)
    if isinstance(value, bool) or not is_number or not value > 0:
        got = shown_value(value)
        raise WorkloadError(f"{name} must be {VALUES[name]}, but it is {got}; fix it")


def _parameters(function: Callable[..., Any]) -> set[str]:  # Any: user code
    """Return the names of a function's parameters; none where Python cannot tell."""
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # written in C
        return set()


def take_batches(
    workload: Workload, *, seed: int, count: int, device: torch.device | None = None
) -> list[Batch]:
    """Return `count` training batches of a seed, on `device`."""
    stream = itertools.islice(workload.train_batches(seed), count)
    return [batch if device is None else move_batch(batch, device) for batch in stream]


def check_batches(workload: Workload, *, seed: int, count: int = 2) -> None:
    """Check that the same seed gives the same batches."""
    first, again = (take_batches(workload, seed=seed, count=count) for _ in range(2))
    for index, pair in enumerate(zip(first, again, strict=True)):
        one, other = map(tensors_in, pair)
        if len(one) != len(other) or not all(map(_are_equal, one, other)):
            raise WorkloadError(
                "train_batches(seed) must give the same batches for the same seed, but batch "
                f"{index} of seed {seed} differs between two calls; draw from a generator seeded "
                "with `seed` alone"
            )


def _are_equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same; NaN, of a value that is missing, is the same as NaN."""
    parts, others = list(plain_parts(one)), list(plain_parts(other))
    if (one.layout, one.shape, len(parts)) != (other.layout, other.shape, len(others)):
        return False
    return all(
        (x.shape, x.dtype) == (y.shape, y.dtype)
        and torch.allclose(x, y, rtol=0.0, atol=0.0, equal_nan=True)
        for x, y in zip(parts, others, strict=True)
    )


class NoGradientError(WorkloadError):
    """A batch whose loss moves no weight, as one in which every sample keeps its margin."""


def check_loss(loss: Tensor, *, where: str) -> float:
    """Return the loss as a float."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise WorkloadError(
            f"the FP32 loss must be finite, but it is {value} {where}; "
            "lower the learning rate or look at the data"
        )
    return value


def move_batch(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with every tensor in it (dicts, lists, tuples, `.to`) on `device`."""
    if type(batch) is dict:
        return {key: move_batch(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move_batch(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(move_batch(value, device) for value in batch)
    moved = batch.to(device) if hasattr(batch, "to") else batch
    return batch if moved is None else moved  # None: moved in place


def tensors_in(value: Any, *, looked_into: set[int] | None = None) -> list[Tensor]:
    """Return the tensors in nested values, in one order; with a set also those of objects."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name, None) for field in dataclasses.fields(value)]
    elif not (looked_into is None or isinstance(value, NO_OBJECTS) or id(value) in looked_into):
        looked_into.add(id(value))
        value = [*getattr(value, "__dict__", {}).values()]
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item, looked_into=looked_into)]
    return []


@dataclass(frozen=True)
class UserCode(AbstractContextManager["UserCode"]):
    """Turns any exception of the user's code inside, and its exit, into one WorkloadError line."""

    function: str
    wanted: str

    def __enter__(self) -> Self:
        NOW.waits(self.function)
        return self

    def __exit__(
        self, kind: object, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        NOW.goes_on()
        if not isinstance(error, Exception | SystemExit) or isinstance(error, AutoprecError):
            return
        if dist.is_available() and dist.is_initialized() and is_of_lost_rank(error):
            return  # met inside the user's code (FSDP gathers there), and no fault of it
        # The innermost frame of the user's own code; the first is ours, libraries' are no help.
        frames = traceback.extract_tb(trace)[1:]
        inside = [f for f in frames if not any(folder in f.filename for folder in LIBRARIES)]
        where = f" at {Path(inside[-1].filename).name}:{inside[-1].lineno}" if inside else ""
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        cause = "" if root is error else f" (from {type(root).__name__}: {error_line(root)})"
        raise WorkloadError(
            f"{self.function} must give {self.wanted}, but it raised {type(error).__name__}"
            f"{where}: {error_line(error, most=LONGEST_ERROR)}{cause}"
        ) from error
