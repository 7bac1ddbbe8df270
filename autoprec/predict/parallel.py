"""Parallel training: sharded shapes per device, and what communication costs.

    fsdp=N     parameters, gradients and optimizer state are sharded over N devices; each layer's
               weights are gathered before its forward and again before its backward, its gradients
               are reduce-scattered. Mostly hidden behind compute.
    tp=N       the GEMMs themselves are split over N devices: column-parallel layers keep N/tp
               out-features, row-parallel ones K/tp in-features. Two all-gathers and two
               reduce-scatters of the activations per block and direction, not hidden.
               Whole attention heads stay together, so N divides the heads, and the key/value heads
               where they are fewer: checked where the model says how many it has.
    gather=fp8 tensorwise FP8 layers gather weights (torchao's enable_fsdp_float8_all_gather) and
               activations (its float8 tensor parallelism) in FP8, where all three GEMMs are
    ac=full    activation checkpointing: the forward runs again in the backward; `selective` half

A collective over n devices moves (n - 1) / n of its bytes through each device's link: the fast one
inside a node, the network between nodes.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from autoprec.common.recipes import Recipe
from autoprec.common.text import first_and_more
from autoprec.errors import DeviceError
from autoprec.model.options import FP8_MULTIPLE
from autoprec.model.roles import COLUMN_ROLES, KEY_VALUE_ROLES, ROW_ROLES, Role, role_of
from autoprec.records.devices import Machine
from autoprec.records.model import GemmShape, LayerKind, LayerSpec, Option

LARGEST_DEGREE = 1 << 20
RECOMPUTED = {"none": 0.0, "selective": 0.5, "full": 1.0}  # share of the forward that runs twice
_ROLE_NAMES = "roles are read from names such as q_proj, o_proj, up_proj, down_proj, fc1 or lm_head"
_SHARED_HEADS = " (Megatron lets devices share one, torch's tensor parallelism does not)"
_EXAMPLE = "write e.g. fsdp=8, tp=8 or fsdp=32,tp=8"


@dataclass(frozen=True)
class Parallel:
    """Degrees of parallelism; `recomputed` is the share of the forward that runs twice."""

    fsdp: int = 1
    tp: int = 1
    fp8_gather: bool = False
    recomputed: float = 0.0

    @property
    def devices(self) -> int:
        """How many devices train together."""
        return self.fsdp * self.tp

    def __str__(self) -> str:
        """Return the text that `parse_parallel` reads; empty for one device."""
        name = next(name for name, share in RECOMPUTED.items() if share == self.recomputed)
        parts = [f"{degree}={n}" for degree, n in (("fsdp", self.fsdp), ("tp", self.tp)) if n > 1]
        parts += ["gather=fp8"] if self.fp8_gather and self.devices > 1 else []
        return ",".join(parts + ([f"ac={name}"] if self.recomputed else []))


def parse_parallel(text: str) -> Parallel:
    """Return the degrees of e.g. `fsdp=32,tp=8`, in any case; of "" those of one device.

    Raises:
        DeviceError: a part is no known degree, given twice, or without any effect.
    """
    given: dict[str, str] = {}
    # Each part must be known by itself; that they go together is checked once all are read.
    for part in text.lower().split(",") if text else ():
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name in given:
            raise DeviceError(f"--parallel names each degree once, but {name} is twice; {_EXAMPLE}")
        if not _is_known(name, value):
            raise DeviceError(
                "--parallel must be fsdp=N, tp=N, gather=fp8|bf16 or ac=none|selective|full, "
                f"separated by commas, but it is {text!r}; {_EXAMPLE}"
            )
        given[name] = value
    parallel = Parallel(
        fsdp=int(given.get("fsdp", 1)),
        tp=int(given.get("tp", 1)),
        fp8_gather=given.get("gather") == "fp8",
        recomputed=RECOMPUTED[given.get("ac", "none")],
    )
    if parallel.fp8_gather and parallel.devices == 1:
        raise DeviceError(
            "gather=fp8 needs devices to gather from, fsdp=N or tp=N with N > 1, but --parallel is "
            f"{text!r}; add one, or leave gather=fp8 out"
        )
    return parallel


def split_axis(layer: LayerSpec, parallel: Parallel) -> str:
    """Return the axis along which tensor parallelism splits a GEMM, N or K; empty for neither."""
    role = role_of(layer) if parallel.tp > 1 else Role.OTHER
    return "N" if role in COLUMN_ROLES else "K" if role in ROW_ROLES else ""


def shard_gemm(layer: LayerSpec, parallel: Parallel) -> GemmShape:
    """Return the layer's GEMM on one device."""
    gemm = layer.gemm
    if gemm is None:
        raise DeviceError(f"a layer must have been called to be sharded, but {layer.name} was not")
    axis = split_axis(layer, parallel)
    if not axis:
        return gemm
    size = getattr(gemm, axis)
    if size % parallel.tp:
        step = parallel.tp * FP8_MULTIPLE
        raise DeviceError(
            f"tp must divide the layers that it splits, but {layer.name} has {axis}={size} and "
            f"tp={parallel.tp}; choose a degree that divides it, or pad it to "
            f"{-(-size // step) * step}"
        )
    if layer.heads and layer.heads % parallel.tp:  # it would cut through an attention head
        is_shared = role_of(layer) in KEY_VALUE_ROLES
        kind, why = ("key/value ", _SHARED_HEADS) if is_shared else ("", "")
        raise DeviceError(
            f"tp must divide the attention heads{' and the key/value heads' if is_shared else ''}, "
            f"but {layer.name} has {layer.heads} {kind}heads and tp={parallel.tp}; choose a "
            f"divisor of {layer.heads}{why}"
        )
    return gemm.model_copy(update={axis: size // parallel.tp})


def unsplit_note(layers: Iterable[LayerSpec], parallel: Parallel) -> str:
    """Return a note of the linears that tensor parallelism leaves whole for want of a role."""
    called = [layer for layer in layers if layer.kind is LayerKind.LINEAR and layer.calls]
    whole = [layer.name for layer in called if not split_axis(layer, parallel)]
    if parallel.tp == 1 or not whole:
        return ""
    named = first_and_more(whole, most=3)
    if len(whole) == len(called):
        return f"tp={parallel.tp} splits no layer: none has a known role ({named}); {_ROLE_NAMES}"
    return (
        f"tp={parallel.tp} leaves {len(whole)} of {len(called)} linear layers whole, since they "
        f"have no known role ({named}); {_ROLE_NAMES}"
    )


def gathers_fp8(option: Option, parallel: Parallel) -> bool:
    """Return whether a layer of that option is gathered in FP8."""
    return parallel.fp8_gather and option.recipe is Recipe.TENSORWISE and not option.gemms_hp


def parameter_share(layer: LayerSpec, parallel: Parallel) -> float:
    """Return the share of a layer's parameters that tensor parallelism leaves on one device."""
    return 1 / parallel.tp if split_axis(layer, parallel) else 1.0


def collective_us(machine: Machine, moved: float, *, members: int, per_node: int) -> float:
    """Return the time of an all-gather or reduce-scatter of `moved` bytes over `members` devices.

    `per_node` is how many of them share a node: they share its fast links, and together they have
    that many ports to the network.
    """
    if members <= 1:
        return 0.0
    link = machine.interconnect_gbs
    if members > per_node:
        link = min(link, machine.network_gbs * per_node)
    return moved * (members - 1) / members / (link * 1e3 * machine.link_fraction)


def _is_known(name: str, value: str) -> bool:
    if name in ("fsdp", "tp"):
        return value.isdecimal() and 1 <= int(value) <= LARGEST_DEGREE
    return value in {"gather": ("fp8", "bf16"), "ac": RECOMPUTED}.get(name, ())
