"""FP32 masters: what the optimizer trains while the model computes in BF16.

    p   BF16, in the model: what forward and backward see, what `state_dict()` saves
    m   FP32, beside it: what the optimizer sees; p = bf16(m) after every step

BF16 has 8 bits of mantissa, so p alone would lose every update below 2^-9 of a weight. The model's
own weights always decide: whoever writes into p (a checkpoint, a re-initialisation, clipping) has
written the master too, element by element, and elements that nobody wrote keep their lower bits:

    m <- m   where bf16(m) = p,   else float(p)

Before a parameter's first step, a write sets all its bits, m <- float(p): DDP then sends rank 0's
BF16 weights to all ranks, and masters that kept bits of their own would drift apart for ever.

Writes are seen by the tensor's version counter; those through `p.data`, which it does not count, by
comparing values in the first steps and every hundredth, and in every step once one was found.
"""

import functools
import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autoprec.common.text import first_and_more
from autoprec.device.late import LateValues
from autoprec.device.ranks import local_part, sharded_tensor
from autoprec.errors import PlanMismatchError
from autoprec.records import Option
from autoprec.runtime.shards import nothing_sharded
from autoprec.workload.written import dtype_name

logger = logging.getLogger(__name__)

ON_MODEL = "_autoprec"  # the root module's attribute that holds its Masters
CLOSE_LOOKS, CLOSE_LOOK_EVERY = 3, 100  # steps in which values are compared, see above
LOOK_ELEMENTS = 2**24  # that a close look takes at once; 11 bytes each meanwhile
LIVE: "weakref.WeakSet[Masters]" = weakref.WeakSet()  # of all applied models, copies included


@dataclass
class Stamp:
    """What a parameter was: it differs once it was written into or got other storage."""

    version: int
    pointer: int


@dataclass(eq=False)
class Masters:
    """The masters of one model's BF16 parameters. It lives on the model and is copied with it.

    `values` holds None for a parameter that was BF16 before the plan and was not trained yet;
    `was_split` says that ranks held parts of the model before the plan came, and `gather_as_before`
    makes FSDP gather its FP32 shards, which are their own masters, as without the plan; `loaded`
    what checkpoints hold, until the model's weights are in, and for values that the model loads
    itself the parameter's version after that; `agreed` a parameter's stamp when it and its master
    last agreed; `stepped` the parameters that an optimizer has seen, `averages` those that an
    average was rounded into; `lent` the versions of untrained masters that a state dict has;
    `frozen` FP32 values, on the CPU, of weights that nobody trains, for a script's files.
    """

    options: dict[str, Option]
    values: dict[nn.Parameter, Tensor | None]
    names: dict[str, nn.Parameter]
    was_split: bool = False
    buffer_dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # before the plan
    gather_as_before: Callable[[], None] = nothing_sharded
    loaded: dict[nn.Parameter, tuple[Tensor, int | None]] = field(default_factory=dict)
    agreed: dict[nn.Parameter, Stamp] = field(default_factory=dict)
    stepped: dict[nn.Parameter, bool] = field(default_factory=dict)  # all True: copied with keys
    averages: dict[nn.Parameter, bool] = field(default_factory=dict)  # as `stepped`
    lent: dict[nn.Parameter, int] = field(default_factory=dict)
    frozen: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    steps: int = 0
    is_watching: bool = False
    is_idle_copy: bool = False  # that no optimizer and no average has stepped yet
    changes: int = 0  # of `values`: a parameter came or went, or got another master
    _looks: list[LateValues] = field(default_factory=list)  # what close looks found, to be heard
    _lost: list[list[LateValues]] = field(default_factory=list)  # whether writes changed no bit
    _untrained: dict[nn.Parameter, Stamp] = field(default_factory=dict)  # at the last of the first

    def __post_init__(self) -> None:
        self.agreed = {parameter: _stamp(parameter) for parameter in self.values}
        LIVE.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:  # Any: the fields
        """Restore a copy or a pickle, whose parameters have stamps of their own."""
        vars(self).update(state)
        self.agreed, self._looks, self._lost, self.is_idle_copy = {}, [], [], True
        self.lent, self._untrained = {}, {}
        LIVE.add(self)

    @torch.no_grad()
    def current(self, parameter: nn.Parameter, *, looks_closer: bool = True) -> Tensor:
        """Return the parameter's master, after taking over what was written into the parameter."""
        self._check_dtype(parameter)
        self.hear(parameter)
        master = self.values[parameter]
        if master is None or master.is_meta:
            master = parameter.detach().float()
            self._agree(parameter)
        if parameter in self.loaded or _stamp(parameter) != self.agreed.get(parameter):
            master = self._adopted(parameter, master)
        elif looks_closer and not is_rounded(master, parameter.detach()):
            self._warn_of_writes()
            master = self._adopted(parameter, master)
        if self.values[parameter] is not master:
            self.values[parameter] = master
            self.changes += 1
        self._agree(parameter)
        return master

    def _agree(self, parameter: nn.Parameter) -> None:
        stamp = self.agreed.setdefault(parameter, _stamp(parameter))
        stamp.version, stamp.pointer = parameter._version, parameter.data_ptr()

    def saved(self, parameter: nn.Parameter) -> Tensor:
        """Return the FP32 values that a parameter is rounded from, or else its own."""
        values = [self.loaded[parameter][0]] if parameter in self.loaded else []
        if not parameter.requires_grad and parameter in self.frozen:
            values.append(self.frozen[parameter].to(parameter.device))
        values += [value for value in (self.values[parameter],) if value is not None]
        own = local_part(parameter.detach())
        exact = (value for value in values if is_rounded(local_part(value), own))
        return next(exact, parameter.detach().float())

    @torch.no_grad()
    def put_back(self) -> None:
        """Store as BF16 again what was given FP32 data, as an average is for an evaluation."""
        for parameter in [p for p in self.values if p.dtype is torch.float32]:
            _warn_of_fp32()
            gradient, parameter.grad = parameter.grad, None
            with torch.inference_mode(False):  # whose tensors cannot be trained
                parameter.data = parameter.data.bfloat16()
            parameter.grad = None if gradient is None else gradient.bfloat16()

    @torch.no_grad()
    def round_down(self, parameter: nn.Parameter) -> None:
        """Round a master that was changed, of an average, into its parameter."""
        self.is_idle_copy = False
        self.stepped[parameter] = self.averages[parameter] = True
        parameter.copy_(self.values[parameter])  # type: ignore[arg-type]  # it is there
        self._agree(parameter)

    def lend(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the FP32 values for a state dict; None where there are none but BF16 ones.

        Of what no optimizer trains that is the master itself, and what is written into it arrives.
        """
        if self.values[parameter] is None:  # nobody trains it, and writes must reach it
            return None
        if self.is_trained(parameter):
            return self.saved(parameter)
        master = self.current(parameter)  # which hears
        self.lent[parameter] = master._version
        return master

    def is_trained(self, parameter: nn.Parameter) -> bool:
        """Whether an optimizer has trained the parameter, and no average of others."""
        return parameter in self.stepped and parameter not in self.averages

    def hear(self, parameter: nn.Parameter) -> None:
        """Round a master that a state dict had, and that was written into, as averages are."""
        version, master = self.lent.pop(parameter, None), self.values.get(parameter)
        if master is None or version in (None, master._version):
            return
        if _stamp(parameter) == self.agreed.get(parameter):
            self.round_down(parameter)

    def begin_step(self, parameters: Sequence[nn.Parameter], stamps: Sequence[Stamp]) -> None:
        """Take over what was written into parameters since their stamps, before a step of them.

        The device is not asked for anything: a close look merges what it finds without telling.
        """
        self.steps += 1
        self.is_idle_copy = False
        for parameter in parameters if self.lent or self.averages else ():
            self.hear(parameter)  # a state dict that came before the first step
            self.averages.pop(parameter, None)
        pairs = zip(parameters, stamps, strict=True)
        changed = [p for p, s in pairs if p._version != s.version or p.data_ptr() != s.pointer]
        is_due = self.steps <= CLOSE_LOOKS or self.steps % CLOSE_LOOK_EVERY == 0
        self._hear_of_looks()
        if 1 < self.steps <= CLOSE_LOOKS and not self.loaded:
            self._lost.append([*map(LateValues, self._compared(changed))])
        if self.loaded:
            changed += [p for p in parameters if p in self.loaded]
        for parameter in changed:
            self.current(parameter, looks_closer=False)
        if is_due or self.is_watching:
            same = self._compared(parameters, adopts=True)
            self._looks += [] if self.is_watching else map(LateValues, same)
        if is_due and self.steps >= CLOSE_LOOKS:
            self._look_for_averages()
        if len(self.stepped) < len(self.values):
            self.stepped |= dict.fromkeys(parameters, True)
            self._look_for_updates()

    @torch.no_grad()
    def _compared(
        self, parameters: Sequence[nn.Parameter], *, adopts: bool = False
    ) -> Iterable[Tensor]:
        """Return by device whether all these parameters are what their masters round to.

        With `adopts` masters take over what is not: it was written through `.data`.
        """
        same: dict[torch.device, Tensor] = {}
        for parameter in parameters:
            master = local_part(self.values[parameter])  # type: ignore[arg-type]  # all are current
            written = local_part(parameter.detach())
            for part, new in _pieces(master, written):  # a large tensor's copies would not fit
                is_same = _bits(part.to(new.dtype)) == _bits(new)
                if adopts:
                    part.copy_(torch.where(is_same, part, new.float()))
                before, is_same = same.get(new.device), is_same.all()
                same[new.device] = is_same if before is None else before & is_same
        return same.values()

    def _hear_of_looks(self) -> None:
        looks, self._looks = self._looks, []
        if len(self._lost) == CLOSE_LOOKS - 1:  # once, of as many steps in turn
            lost, self._lost = self._lost, []
            if all(each and all(all(look.read()) for look in each) for each in lost):
                logger.warning(
                    "parameters are written in place after each step and no bit of them changes: "
                    "what is smaller than BF16 resolves (weight decay by hand, noise) is lost; "
                    "leave it to the optimizer, or keep their layers in fp32"
                )
        if not all(all(look.read()) for look in looks) and not self.is_watching:
            self._warn_of_writes()

    def _warn_of_writes(self) -> None:
        if not self.is_watching:
            logger.warning(
                "a parameter was written through .data since the last step; the FP32 master "
                "follows, and from now on every step compares both (write under "
                "torch.no_grad() to avoid that)"
            )
        self.is_watching = True

    def _look_for_averages(self) -> None:
        for store in [store for store in LIVE if store.is_idle_copy and store.values]:
            store.is_idle_copy = False
            logger.warning(
                "a copy of a model with a plan is not trained: if it is an average of weights "
                "(EMA), let torch.optim.swa_utils.AveragedModel update it, or make it of "
                "autoprec.master_view(model); other updates of its BF16 weights lose small changes"
            )

    def _look_for_updates(self) -> None:
        """Warn where a parameter that no optimizer trains was written into, step after step."""
        if self.steps > CLOSE_LOOKS:
            return
        before, others = self._untrained, [p for p in self.values if p not in self.stepped]
        stamps = {parameter: _stamp(parameter) for parameter in others}
        written = {p for p, stamp in stamps.items() if before.get(p, stamp) != stamp}
        if self.steps < CLOSE_LOOKS:  # of a third step, those that a second one saw written
            kept = {p: s for p, s in stamps.items() if self.steps == 1 or p in written}
            self._untrained = kept
            return
        self._untrained = {}
        if names := [name for name, p in self.names.items() if p in written]:
            logger.warning(
                "%s: not trained, but written into after each step. An average of other weights "
                "(EMA) loses small changes in BF16: update it by Tensor.lerp_ or "
                "torch._foreach_lerp_, or keep its layers in fp32",
                first_and_more(names),
            )

    def refresh(self, model: nn.Module) -> None:
        """Take in parameters that replaced others of the same name, e.g. shards of them."""
        for name, parameter in model.named_parameters():
            if parameter.dtype is not torch.bfloat16 or parameter in self.values:
                continue
            old = self.names.get(name, parameter)  # that is not among the values
            self.values[parameter] = _carried(self.values.pop(old, None), parameter)
            self.changes += 1
            self._agree(parameter)
            self.names[name] = parameter

    def _adopted(self, parameter: nn.Parameter, master: Tensor) -> Tensor:
        """Return the master after what was written into the parameter, or loaded for it."""
        written = parameter.detach()
        master = master.to(written.device)
        # Before the first step a write sets all bits; later, only the elements that it changed.
        is_fresh = parameter not in self.stepped
        agreed = self.agreed.get(parameter, _stamp(parameter))
        if is_fresh and parameter._version != agreed.version:
            master.copy_(written)
        else:
            master.copy_(torch.where(master.to(written.dtype) == written, master, written.float()))
        # A checkpoint's master counts where the model's weight is what it rounds to.
        loaded, version = self.loaded.pop(parameter, (None, None))
        if loaded is None or (is_fresh and version not in (None, parameter._version)):
            return master
        loaded = loaded.to(written.device)
        if not is_rounded(loaded, written):
            logger.warning(
                "a checkpoint holds other masters than the model's weights round to; the weights "
                "were kept, so load the model and the optimizer of one checkpoint"
            )
        return master.copy_(torch.where(loaded.to(written.dtype) == written, loaded, master))

    def take_loaded(self) -> None:
        """Take in loaded masters whose weights are in the model, so that views show them at once.

        The others wait for weights that may be loaded after them.
        """
        for parameter, (loaded, _) in list(self.loaded.items()):
            if is_rounded(loaded.to(parameter.device), parameter.detach()):
                self.current(parameter, looks_closer=False)

    def _check_dtype(self, parameter: nn.Parameter) -> None:
        if parameter.dtype is torch.bfloat16:
            return
        name = next((name for name, own in self.names.items() if own is parameter), "one")
        raise PlanMismatchError(
            f"a parameter that the plan stores as bfloat16 must stay so, but {name} is now "
            f"{dtype_name(parameter.dtype)}; where the model's own code converts it, set its "
            "layer to fp32, else call autoprec.undo(model, optimizer) first"
        )


@functools.cache
def _warn_of_fp32() -> None:
    logger.warning(
        "parameters that the plan stores as BF16 were given FP32 data (an average's for an "
        "evaluation, model.float()): forward runs in the plan's precisions all the same, until "
        "autoprec.undo(model, optimizer)"
    )


def masters_of(model: nn.Module) -> Masters:
    """Return the masters of an applied model (PlanMismatchError: no plan is applied to it)."""
    found: Masters | None = vars(model).get(ON_MODEL)
    if found is None:
        inner = [name for name, module in model.named_modules() if ON_MODEL in vars(module)]
        way_out = f"give its {inner[0]!r}" if inner else "call autoprec.apply(plan, model) first"
        raise PlanMismatchError(
            f"the model must be one that a plan was applied to, but this {type(model).__name__} is "
            f"not; {way_out}"
        )
    return found


def exact_values(model: nn.Module, *masters: Masters) -> dict[nn.Parameter, Tensor]:
    """Return the FP32 masters of all BF16 parameters, whichever model's masters have them.

    Those that came after the plan (PEFT's copies of layers) and were not trained have none.
    """
    low = (parameter for parameter in model.parameters() if parameter.dtype is torch.bfloat16)
    found: dict[nn.Parameter, Tensor] = {}
    for parameter in dict.fromkeys([*(p for own in masters for p in own.values), *low]):
        store = next((own for own in (*masters, *LIVE) if parameter in own.values), None)
        found[parameter] = store.current(parameter) if store else parameter.detach().float()
    return found


def is_rounded(master: Tensor, written: Tensor) -> bool:
    """Whether `written` is bf16(master), bit for bit (so that NaN equals NaN)."""
    return torch.equal(_bits(master.to(written.dtype)), _bits(written))


def _carried(master: Tensor | None, parameter: nn.Parameter) -> Tensor | None:
    """Return a master for the parameter that took another one's place, None if it does not fit."""
    if master is None or master.is_meta or master.shape != parameter.shape:
        return None
    if not isinstance(parameter, sharded_tensor()):
        return master
    from torch.distributed.tensor import distribute_tensor

    whole = master.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements)


def _pieces(master: Tensor, written: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    if not (master.is_contiguous() and written.is_contiguous()):
        return [(master, written)]
    pairs = (torch.split(tensor.view(-1), LOOK_ELEMENTS) for tensor in (master, written))
    return zip(*pairs, strict=True)


def _bits(values: Tensor) -> Tensor:
    """Return BF16 values as integers, so that NaN equals NaN."""
    return values.view(torch.int16)


def _stamp(parameter: nn.Parameter) -> Stamp:
    return Stamp(parameter._version, parameter.data_ptr())
