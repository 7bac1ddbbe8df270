"""What a model is made of: precisions, options, layers and shapes, as one real step showed them."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from functools import lru_cache
from typing import Any, Self

from pydantic import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    model_serializer,
    model_validator,
)

from autoprec.common.recipes import RECIPE_GEMMS_HP, Gemm, Precision, Recipe
from autoprec.records.base import FileRecord, Record


class LayerKind(StrEnum):
    """What a layer computes, as far as precision is concerned."""

    LINEAR = "linear"
    CONV = "conv"
    EMBEDDING = "embedding"
    NORM = "norm"
    ATTENTION = "attention"
    RECURRENT = "recurrent"
    OTHER = "other"


class Basis(StrEnum):
    """Where a number comes from; every number in a report says which."""

    MEASURED = "measured"
    PREDICTED = "predicted"
    TRANSFERRED = "transferred"
    UNKNOWN = "unknown"


class Option(Record):
    """One thing a layer can be set to; in JSON its key, e.g. `fp8_o1:rowwise`.

    `gemms_hp` are the GEMMs of an FP8 layer that stay in BF16; the key lists them after a minus,
    e.g. `fp8_o1:tensorwise-grad_input-grad_weight`.
    """

    precision: Precision
    recipe: Recipe | None = None
    gemms_hp: tuple[Gemm, ...] = ()

    @property
    def key(self) -> str:
        """The option as one word."""
        if self.recipe is None:
            return self.precision.value
        return f"{self.precision.value}:{'-'.join([self.recipe.value, *self.gemms_hp])}"

    @property
    def is_fp8(self) -> bool:
        """Whether any GEMM runs on FP8 operands."""
        return self.precision is Precision.FP8_O1

    @property
    def is_whole_fp8(self) -> bool:
        """Whether all GEMMs run in FP8 that its recipe does."""
        return self.is_fp8 and not self.gemms_hp

    @property
    def fp8_gemms(self) -> tuple[Gemm, ...]:
        """The GEMMs that run on FP8 operands."""
        if self.recipe is None:
            return ()
        hp = (*self.gemms_hp, *RECIPE_GEMMS_HP.get(self.recipe, ()))
        return tuple(gemm for gemm in Gemm if gemm not in hp)

    def __str__(self) -> str:
        """Return the key."""
        return self.key

    @classmethod
    def parse(cls, key: str) -> Self:
        """Return the option that `key` names; the inverse of `key`.

        Raises:
            ValueError: the key names no precision, recipe or GEMM.
        """
        precision, _, rest = key.partition(":")
        recipe, *gemms = rest.split("-") if rest else [None]
        return cls(
            precision=Precision(precision),
            recipe=None if recipe is None else Recipe(recipe),
            gemms_hp=tuple(Gemm(gemm) for gemm in gemms if gemm),
        )

    @model_validator(mode="before")
    @classmethod
    def _from_key(cls, value: Any) -> Any:  # Any: pydantic hands in raw input
        return _fields_of(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_recipe(self) -> Self:
        if self.is_fp8 != (self.recipe is not None):
            raise ValueError("fp8_o1 needs a recipe, and only fp8_o1 has one")
        if self.gemms_hp and not self.is_fp8:
            raise ValueError("only an fp8_o1 option can keep GEMMs in BF16")
        if self.gemms_hp != tuple(gemm for gemm in Gemm if gemm in self.gemms_hp):
            raise ValueError("gemms_hp lists each GEMM at most once, in the order of `Gemm`")
        if len(self.gemms_hp) == len(Gemm):
            raise ValueError("an fp8_o1 option with all three GEMMs in BF16 is bf16_o2")
        if self.recipe in RECIPE_GEMMS_HP and self.gemms_hp:
            raise ValueError(f"{self.recipe} fixes its own GEMMs; write rowwise-... instead")
        return self

    @model_serializer
    def _to_key(self) -> str:
        return self.key


@lru_cache(maxsize=1024)  # files hold few options, many times
def _fields_of(key: str) -> dict[str, Any]:  # Any: an option's fields
    return dict(Option.parse(key))


FP32 = Option(precision=Precision.FP32)
BF16_O2 = Option(precision=Precision.BF16_O2)


def fp8_option(recipe: Recipe, *gemms_hp: Gemm) -> Option:
    """Return the FP8 O1 option of a recipe, with these GEMMs kept in BF16."""
    return Option(precision=Precision.FP8_O1, recipe=recipe, gemms_hp=gemms_hp)


def with_gemms_hp(options: Sequence[Option]) -> tuple[Option, ...]:
    """Return the options, then each whole FP8 one with one or two of its GEMMs in BF16."""
    kept = [gemms for count in (1, 2) for gemms in itertools.combinations(Gemm, count)]
    whole = [o.recipe for o in options if o.recipe and o.fp8_gemms == tuple(Gemm)]
    partly = (fp8_option(recipe, *gemms) for recipe in whole for gemms in kept)
    return tuple(dict.fromkeys((*options, *partly)))


class ParameterSpec(Record):
    """One parameter: its full name, shape and dtype (e.g. `float32`).

    `shared_with` is the name under which the same parameter came first (tied weights), `shards` the
    number of ranks that it is divided over.
    """

    name: str
    shape: tuple[NonNegativeInt, ...]
    dtype: str
    is_trainable: bool
    shared_with: str | None = None
    shards: PositiveInt = 1

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """The dimensions that are more than 1; two or more are those of a matrix."""
        return tuple(size for size in self.shape if size != 1)

    @property
    def held_numel(self) -> int:
        """The number of elements that one rank holds."""
        return -(-self.numel // self.shards)


class TensorSpec(Record):
    """One tensor as it came in: `stride` in elements; `is_integer` inputs are indices or masks."""

    shape: tuple[NonNegativeInt, ...]
    stride: tuple[int, ...]
    dtype: str
    requires_grad: bool


class CallSpec(Record):
    """One way a layer was called in the step, and how often; `inputs` are its tensor arguments."""

    inputs: tuple[TensorSpec, ...]
    count: PositiveInt


def floating_elements(calls: Iterable[CallSpec]) -> int:
    """Return the elements of the floating inputs of calls."""
    return sum(
        call.count * math.prod(tensor.shape)
        for call in calls
        for tensor in call.inputs
        if tensor.dtype.startswith(("float", "bfloat"))
    )


class GemmShape(Record):
    """The output GEMM of a linear: [M, K] @ [K, N] with M tokens, K in- and N out-features."""

    M: PositiveInt
    K: PositiveInt
    N: PositiveInt

    def __str__(self) -> str:
        """Return e.g. `2048x1024x4096` (MxKxN)."""
        return f"{self.M}x{self.K}x{self.N}"


class Refusal(Record):
    """Why a layer cannot take a precision, in words."""

    precision: Precision
    reason: str


class LayerSpec(Record):
    """One layer: a module that owns parameters and can take a precision of its own.

    `type_name` is the class (`torch.nn.modules.linear.Linear`), `settings` its `extra_repr()`.
    `gemm` is there for linears only and holds the M of the largest call; `tokens` are all M, in the
    step and in the other batches that were looked at, such as a short last one.
    `calls` are those with a gradient, `forward_calls` those without: under no_grad, as a teacher's
    are, and those that activation checkpointing makes once more.
    `heads` is how many attention heads its outputs (q; key/value heads for k, v and fused ones) or
    inputs (the attention's output) are made of; None where the model does not say.
    `tied_to` names the first layer that owns a parameter shared with this one; tied layers share
    one storage, so they take one storage precision (FP32 or 16 bit) together.
    `output_elements` are those of its floating outputs in one step; None where they were not seen.
    `made_by` names the kernel of a library's or the user's own that makes a linear's input, such as
    a fused norm's: no compiler puts a cast into it; "" where torch's operations make it.
    `options` are what the layer can take on the captured device, `refusals` say why not the rest.
    """

    name: str
    kind: LayerKind
    type_name: str
    settings: str
    parameters: tuple[ParameterSpec, ...]
    gemm: GemmShape | None
    calls: tuple[CallSpec, ...]
    is_frozen: bool
    tied_to: str | None
    options: tuple[Option, ...]
    refusals: tuple[Refusal, ...]
    heads: PositiveInt | None = None
    tokens: tuple[PositiveInt, ...] = ()
    output_elements: NonNegativeInt | None = None
    is_used_uncalled: bool = False
    made_by: str = ""
    forward_calls: tuple[CallSpec, ...] = ()

    @property
    def is_torchs_linear(self) -> bool:
        """Whether it is an `nn.Linear` itself, and not what computes the same."""
        return self.type_name == "torch.nn.modules.linear.Linear"

    @property
    def own_parameters(self) -> tuple[ParameterSpec, ...]:
        """Its parameters but those that an earlier layer has too."""
        return tuple(p for p in self.parameters if p.shared_with is None)

    @property
    def numel(self) -> int:
        """The number of elements of its own parameters."""
        return sum(parameter.numel for parameter in self.own_parameters)

    @property
    def calls_per_step(self) -> int:
        """How often the layer runs in one step with a gradient."""
        return sum(call.count for call in self.calls)

    @property
    def takes_fp8(self) -> bool:
        """Whether FP8 is among its options."""
        return any(option.is_fp8 for option in self.options)

    @property
    def forward_only(self) -> "LayerSpec":
        """The layer as a frozen one of its calls without a gradient."""
        no_grad = {"requires_grad": False}
        calls = tuple(
            CallSpec(inputs=tuple(x.model_copy(update=no_grad) for x in c.inputs), count=c.count)
            for c in self.forward_calls
        )
        gemm, shapes = self.gemm, [p.shape for p in self.parameters if len(p.shape) == 2]
        if self.kind is LayerKind.LINEAR and gemm is None and shapes:
            inputs = [x.shape for call in calls for x in call.inputs[:1]]
            rows, K = max(math.prod(shape[:-1]) for shape in inputs), inputs[0][-1]
            gemm = GemmShape(M=max(rows, 1), K=K, N=math.prod(shapes[0]) // K)
        own = {"calls": calls, "forward_calls": (), "is_frozen": True, "gemm": gemm}
        return self.model_copy(update=own)

    @property
    def input_elements(self) -> int:
        """The elements of its floating inputs in one step, of all calls if one has a gradient."""
        return floating_elements((*self.calls, *(self.forward_calls if self.calls else ())))

    @property
    def shape_key(self) -> str:
        """What decides its time: equal keys are timed once (class, settings, inputs, frozen)."""
        shapes = ";".join(
            f"{c.count}*" + ",".join(f"{t.shape}{t.stride}{t.requires_grad}" for t in c.inputs)
            for c in self.calls
        )
        sizes = ",".join(f"{p.shape}{p.is_trainable}" for p in self.parameters)
        return f"{self.type_name}({self.settings})[{sizes}]<{shapes}>"

    def refusal(self, precision: Precision) -> str | None:
        """Return the reason that the layer cannot take `precision`, or None when it can."""
        return next((r.reason for r in self.refusals if r.precision is precision), None)


class AsWritten(Record):
    """How the user's file trains, where that is more than FP32 run eagerly.

    Dtypes are torch's names without `torch.`: of the autocast around the model ("" for none), the
    16-bit ones among the parameters, and the one in which FSDP's policy gathers them. What is
    measured of numerics is without all of it. FP32 products, or cuDNN's convolutions, may be in
    TF32 where the process allows it.
    """

    autocast: str = ""
    gathered: str = ""
    parameters: tuple[str, ...] = ()
    is_compiled: bool = False
    allow_tf32: bool = False
    allow_tf32_conv: bool = True  # torch's default

    @property
    def is_fp32(self) -> bool:
        """Whether it trains FP32 parameters without autocast."""
        return not (self.autocast or self.parameters or self.gathered)


class BatchMix(Record):
    """How many of the batches that were looked at have `tokens` as their largest M of a linear."""

    tokens: NonNegativeInt
    batches: PositiveInt


class ModelSpec(FileRecord):
    """A model as one real training step showed it.

    `uncovered` are parameters no layer owns (a class token); they take the activation dtype.
    `uncalled` are layers the step did not run. `structure` is a hash of names, types and shapes.
    `tokens_per_step` is the largest M of a linear (0 when there is none). `optimizer` is the class
    name, `optimizer_state_numel_ratio` its state elements per parameter element (2 for Adam).
    `has_randomness` says that two forwards of one batch differ unless seeded (dropout).
    `is_deterministic` says that two seeded runs of the reference step agree bit for bit.
    `as_written` is how the user trains it; None where that is not known.
    `mix` has the M of the first batches where their shapes differ, the captured one's first.
    `saved_bytes` is what autograd keeps from forward for backward, parameters and recomputed parts
    left out, and `backward_bytes` the most of it with gradients beside it; None where it was not
    seen. `batch_bytes` is a batch's tensors. `product_flops` are the floating operations of a
    step's matrix products outside of layers (attention), backward included; those of complex
    numbers are left out. `moving` is what the training's own code writes into beside its trained
    weights and buffers: parameters that nobody trains (a teacher that averages its student),
    attributes of modules (a hidden state).
    """

    KIND = "model"
    REMAKE = "`autoprec profile MODEL.py`"

    layers: tuple[LayerSpec, ...]
    uncovered: tuple[ParameterSpec, ...]
    uncalled: tuple[str, ...]
    structure: str
    tokens_per_step: NonNegativeInt
    optimizer: str
    optimizer_state_numel_ratio: float
    has_randomness: bool
    is_deterministic: bool
    loss: float | None
    device: str
    as_written: AsWritten | None = None
    mix: tuple[BatchMix, ...] = ()
    saved_bytes: NonNegativeInt | None = None
    backward_bytes: NonNegativeInt | None = None
    batch_bytes: NonNegativeInt | None = None
    product_flops: NonNegativeFloat = 0.0
    moving: tuple[str, ...] = ()

    def layer(self, name: str) -> LayerSpec:
        """Return the layer of that exact name (KeyError when there is none)."""
        return {layer.name: layer for layer in self.layers}[name]

    @property
    def bf16_options(self) -> dict[str, Option]:
        """Uniform BF16 O2, by name: every layer that can take it, the others FP32."""
        return {layer.name: BF16_O2 if BF16_O2 in layer.options else FP32 for layer in self.layers}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the layers, in model order."""
        return tuple(layer.name for layer in self.layers)

    @property
    def numel(self) -> int:
        """The number of elements of all parameters."""
        return sum(parameter.numel for parameter in self.parameters())

    @property
    def with_complex_numbers(self) -> tuple[str, ...]:
        """The names of the layers with complex parameters, and of such parameters of none."""
        held = [(layer.name, layer.parameters) for layer in self.layers]
        held += [(parameter.name, (parameter,)) for parameter in self.uncovered]
        return tuple(n for n, own in held if any(p.dtype.startswith("complex") for p in own))

    @property
    def loose_stacks(self) -> tuple[str, ...]:
        """The names of stacked matrices that no layer owns, as experts are, beside their router.

        A router has an output for each of them, in the module that holds them or below.
        """
        found = []
        for stack in (p for p in self.uncovered if len(p.matrix_shape) == 3):
            holder = stack.name[: stack.name.rfind(".") + 1]
            near = (p.matrix_shape for p in self.parameters() if p.name.startswith(holder))
            if any(len(shape) == 2 and stack.matrix_shape[0] in shape for shape in near):
                found.append(stack.name)
        return tuple(found)

    @property
    def followers(self) -> tuple[str, ...]:
        """The parameters that nobody trains and that training writes into."""
        return tuple(p.name for p in self.parameters() if p.name in self.moving)

    def writes_into(self, layer: str) -> bool:
        """Whether training writes into a layer beside its trained weights: a state it keeps."""
        return any(name.startswith(f"{layer}.") for name in self.moving)

    def parameters(self) -> Iterator[ParameterSpec]:
        """Yield every parameter once, covered or not; tied ones once."""
        for layer in self.layers:
            yield from layer.own_parameters
        yield from self.uncovered
