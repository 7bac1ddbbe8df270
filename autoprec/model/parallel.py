"""A workload and this process's ranks -> the workload as each rank of one run sees it.

    build_model     the user's model, spread by `parallelize` over a mesh of all ranks; without one,
                    the same model on every rank with gradients averaged, as under DDP
    train_batches   this rank's part of the stream
    loss_fn         this rank's graph under the mean loss of all ranks

So every stage runs as with one process, each sees the same numbers on every rank, and what is
decided by them is decided alike. Layers keep their names, and nothing is wrapped: switching the
precision of one is an attribute of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from autoprec.common.text import first_and_more, one_line, short_digest
from autoprec.device import ranks
from autoprec.errors import WorkloadError
from autoprec.model.averaging import GradientAverage
from autoprec.model.layers import plain_name, unwrapped
from autoprec.workload.functions import InFp32, Part, Workload

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

DATA = ("dp", "ddp", "fsdp", "hsdp", "data")  # dimensions of a mesh whose ranks have own batches
SAME_DATA = ("tp", "cp", "sp")  # those whose ranks work on the same batch together
IN_PLACE = "shard it in place, with fully_shard or parallelize_module, and return it"
OWN_MESH = (
    "give tensor parallelism a dimension of its own: def build_mesh(device_type): return "
    "init_device_mesh(device_type, (N, M), mesh_dim_names=('dp', 'tp'))"
)


@dataclass(frozen=True)
class Spread:
    """The mesh of all ranks, and which of them have batches of their own."""

    mesh: "DeviceMesh"
    data_dims: tuple[str, ...]
    part: tuple[int, int]  # of the batches: this rank's, of how many
    peers: tuple[int, ...]  # the ranks that differ from this one in data alone, itself among them

    def data_group(self) -> "dist.ProcessGroup | None":
        """Return the process group of the peers; None where these are all ranks."""
        if len(self.peers) == ranks.world_size():
            return None
        found = self.mesh[self.data_dims]
        return (found if found.ndim == 1 else found._flatten()).get_group()


def parallel_workload(
    workload: Workload, device: torch.device, *, in_fp32: InFp32 = lambda _: None
) -> Workload:
    """Return the workload as this rank runs it; itself where the process is alone.

    `in_fp32` makes a model that was spread compute in FP32, and returns the dtype that it had.
    """
    if ranks.world_size() == 1:
        return workload
    spread = make_spread(workload, device)
    spread_model = partial(_spread_model, device, spread)
    part = Part(*spread.part, spread=spread_model, joined=_mean_loss, in_fp32=in_fp32)
    return replace(workload, part=part)


def make_spread(workload: Workload, device: torch.device) -> Spread:
    """Return the user's mesh, or one dimension of all ranks, with its data ranks."""
    if workload.defines("build_mesh"):
        mesh = workload.build_mesh(device.type)
    else:
        mesh = init_device_mesh(device.type, (ranks.world_size(),), mesh_dim_names=("dp",))
    names = mesh.mesh_dim_names or (("dp",) if mesh.ndim == 1 else ())
    if mesh.size() != ranks.world_size():
        raise WorkloadError(
            f"build_mesh() must give a mesh of all {ranks.world_size()} ranks, but it has "
            f"{' x '.join(map(str, mesh.shape))} = {mesh.size()}; make its sizes multiply to "
            "torch.distributed.get_world_size()"
        )
    known = [name for name in names if _is_data(name) or name.startswith(SAME_DATA)]
    if len(known) != mesh.ndim:
        unknown = one_line(next((n for n in names if n not in known), "no names"))
        raise WorkloadError(
            "a mesh's dimensions must be named, those whose ranks have batches of their own "
            f"{'..., '.join(DATA)}... and the others {'..., '.join(SAME_DATA)}..., but build_mesh "
            f"gave {unknown!r}; pass mesh_dim_names"
        )
    # This rank's number among those with batches of their own: its place along the data dimensions.
    places = mesh.get_coordinate() or [0] * mesh.ndim
    number, count, peers = 0, 1, mesh.mesh
    for dim in reversed(range(mesh.ndim)):
        if not _is_data(names[dim]):
            peers = peers.select(dim, places[dim])
    for dim, name in enumerate(names):
        if _is_data(name):
            number, count = number * mesh.size(dim) + places[dim], count * mesh.size(dim)
    members = tuple(int(member) for member in peers.flatten())
    return Spread(mesh, tuple(filter(_is_data, names)), (number, count), members)


def _is_data(name: str) -> bool:
    return name.startswith(DATA)


class _MeanOverRanks(torch.autograd.Function):
    """The mean loss of all ranks, with this rank's gradient: those are averaged elsewhere."""

    @staticmethod
    def forward(_ctx: Any, loss: Tensor) -> Tensor:  # Any: autograd's context is untyped
        return ranks.mean_over_ranks(loss)

    @staticmethod
    def backward(_ctx: Any, *gradients: Any) -> Any:  # Any: as above
        return gradients[0]


def _mean_loss(loss: Tensor) -> Tensor:
    if isinstance(loss, DTensor):  # a loss computed in parallel
        loss = loss.full_tensor()
    mean: Tensor = _MeanOverRanks.apply(loss)  # type: ignore[no-untyped-call]  # torch's own
    return mean


def _spread_model(
    device: torch.device, spread: Spread, workload: Workload, model: nn.Module
) -> nn.Module:
    """Spread the model that was built over the ranks; all have the same weights before."""
    before = _shapes(model)
    digest = short_digest(list(_sums(model)))
    ranks.check_same("initial weights (build_model must draw from torch's generator)", digest)
    if workload.defines("parallelize"):
        # The model is on the CPU (or on meta): sharding moves it part by part, so that a rank's
        # device never holds the whole of it.
        built, marks, modules = model, _marks(model), set(model.modules())
        returned = workload.parallelize(model, spread.mesh)
        model = unwrapped(returned, parallel=True)
        _check_same_model(before, _shapes(model))
        if modules.isdisjoint(model.modules()):
            raise WorkloadError(
                "parallelize(model, mesh) must return the model that it was given, but it returned "
                f"another one with the same parameters; {IN_PLACE}"
            )
        if returned is built and _marks(model) == marks:
            raise WorkloadError(
                "parallelize(model, mesh) must shard the model or wrap it, but it returned the "
                "model as it was; call fully_shard or parallelize_module in it, or leave it out: "
                "without parallelize the ranks train as under DDP"
            )
    model = model.to(device)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise WorkloadError(
            "parallelize(model, mesh) must give weights to a model that was built on meta, but "
            "some parameters have none; call model.to_empty and initialise them"
        )
    _average_what_is_left(model, spread)
    return model


def _marks(model: nn.Module) -> list[object]:
    """Return what a model's parallelization, wrappers and first weights leave on it."""
    hooked = [(type(m), len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]
    return [*hooked, *((type(p.data), p.is_meta) for p in model.parameters())]


def _check_same_model(before: dict[str, list[int]], after: dict[str, list[int]]) -> None:
    """Refuse a `parallelize` that gave another model."""
    differ = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if differ:
        name = one_line(differ[0])
        way = IN_PLACE
        if not before.keys() & set(differ):  # it was another name of a parameter that is tied
            way = f"parallelize_module divides tied weights apart: tie {name} again behind it"
        raise WorkloadError(
            "parallelize(model, mesh) must return the model that it was given, but "
            f"{len(differ)} parameters differ, among them {name!r} "
            f"({before.get(differ[0], 'absent')} before, {after.get(differ[0], 'absent')} after); "
            f"{way}"
        )


def _average_what_is_left(model: nn.Module, spread: Spread) -> None:
    """Average the gradients of a model whose data ranks nothing else joins; refuse a mixture."""
    if len(spread.peers) == 1:
        return
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    joined = {name for name, parameter in trained.items() if _covers(parameter, spread.peers)}
    if not joined:  # DDP's way: whole parameters, or such as only tensor parallelism divides
        every = list(trained.values())
        GradientAverage(every, spread.data_group(), len(spread.peers)).watch()
        return
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        raise WorkloadError(
            "ranks with batches of their own must hold a model together by fully_shard, but "
            f"parallelize divides parameters over {', '.join(spread.data_dims)} without it; "
            f"{OWN_MESH}"
        )
    left = [name for name in trained if name not in joined]
    if left:
        layers = dict.fromkeys(name.rpartition(".")[0] or "the model" for name in left)
        raise WorkloadError(
            f"parallelize(model, mesh) must shard every layer, but it leaves {len(layers)} whole, "
            f"whose gradients nothing averages: {one_line(first_and_more(layers))}; end it with "
            "fully_shard(model, mesh=...), which takes what is left"
        )


def _covers(parameter: nn.Parameter, peers: Sequence[int]) -> bool:
    """Whether a parameter is one DTensor on all of these ranks."""
    if not isinstance(parameter, DTensor):
        return False
    return set(peers) <= set(parameter.device_mesh.mesh.flatten().tolist())


def _shapes(model: nn.Module) -> dict[str, list[int]]:
    """Return the global shape of every parameter, by its name without wrappers' parts."""
    return {plain_name(name): list(p.shape) for name, p in model.named_parameters()}


def _sums(model: nn.Module) -> Iterator[list[Any]]:  # Any: names, shapes and sums
    """Yield the sum of every parameter; of those on meta the shape alone."""
    for name, parameter in model.named_parameters():
        total = None if parameter.is_meta else float(parameter.detach().double().sum())
        yield [name, list(parameter.shape), total]
