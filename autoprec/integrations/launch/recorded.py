"""What a script's first steps did -> a Workload, as if somebody had written its model.py.

    build_model      the model's weights before the script's first training call, for every seed
    train_batches    the recorded batches in an order drawn from the seed, again and again
    loss_fn          the model on the recorded arguments, then the recorded way to the loss
    build_optimizer  the script's optimizer, at the learning rate that its schedule starts from
    build_scheduler  its torch scheduler, if it is stepped once for each optimizer step
    accumulation_steps, clip_norm   of its first steps
    eval_batches     the last quarter of what was recorded, which nothing trains on

Before that is trusted, the first batch is run again on the recorded weights: loss and gradient must
be those that the script had. FP32 and the plan are compared without the script's autocast, which
the step as written has: the dtype that its layers saw, and whether the script compiles its model
(not how: it is compiled in torch's default mode). TF32 stays as the script has set it.
"""

import contextlib
import gc
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from autoprec.common.files import text_digest
from autoprec.common.text import short_digest
from autoprec.device.random_state import random_state_kept
from autoprec.errors import WorkloadError
from autoprec.integrations.launch.calls import FirstCall, RecordedBatch, begun_like
from autoprec.integrations.launch.optimizers import (
    SeenOptimizer,
    copy_optimizer,
    copy_schedule,
    set_peak_rates,
    was_stepped,
)
from autoprec.integrations.launch.patches import Function, patched, patched_spawn
from autoprec.integrations.launch.recorder import MODEL_PY, Recorder
from autoprec.integrations.launch.script import FAILED, Script, StopScript, run_script
from autoprec.integrations.launch.tape import FromTape, remove_scale, replay
from autoprec.integrations.launch.weights import gradient_norm
from autoprec.integrations.plans import remove_autocast
from autoprec.model.layers import find_layers
from autoprec.model.local_copy import copy_model
from autoprec.records import BF16_O2
from autoprec.runtime import install_options
from autoprec.workload.functions import UserCode, Workload, move_batch, workload_from
from autoprec.workload.optimizers import in_turn, trained_by
from autoprec.workload.written import LOW_PRECISION, Written, in_fp32

logger = logging.getLogger(__name__)
Pairs = dict[str, tuple[nn.Parameter, nn.Parameter]]  # parameters at first and at the end, by name
HELD_OUT = 4  # one batch in four is for evaluation
FEWEST_STEPS = 8  # that --script-steps takes
LOSS_RTOL, NORM_RTOL = 1e-4, 1e-2  # kernels that are not deterministic stay within these


def record_workload(script: Script, *, steps: int) -> Workload:
    """Run a script for `steps` training steps, and make a workload of what it did.

    The script runs once in this process, whatever it writes goes where it always goes, but its
    standard output to stderr.

    Raises:
        WorkloadError: the script failed, ended early, or trains in a way that cannot be recorded.
    """
    recorder = Recorder(steps)
    status = _run_recorded(script, recorder)
    first = recorder.first
    if recorder.refusal is not None:
        raise _refused(script, recorder.refusal)
    if first is None or recorder.model is None or recorder.steps < recorder.wanted:
        raise _ended_early(script, recorder, status)
    stopped = "%s was stopped after %d training steps; what it wrote until then is its own"
    logger.warning(stopped, script.name, recorder.steps)
    batches, optimizers = recorder.recorded(), [*recorder.optimizers.values()]
    begun_like(first.model, batches)
    now = dict(recorder.model.named_parameters())
    pairs = {n: (p, now[n]) for n, p in first.model.named_parameters() if n in now}
    followers, thawed = _followers(recorder, pairs), _thawed(optimizers, pairs)
    _free(recorder)
    # the check wants the script's autocast and scale; what is tuned is the model without them
    autocast = check_recording(script, recorder, first, batches[0])
    remove_autocast(first.model)
    for parameter in thawed:
        parameter.requires_grad_(True)
    batches = [_plain(batch, first.model, recorder.micro_steps) for batch in batches]
    held_out = max(2, len(batches) // HELD_OUT)
    functions: dict[str, Any] = {  # Any: functions and numbers
        "build_model": lambda: copy_model(first.model),
        "train_batches": lambda seed: _shuffled(batches[:-held_out], seed),
        "loss_fn": recorded_loss,
        "build_optimizer": lambda model: in_turn(
            [copy_optimizer(each.first, first.model, model) for each in optimizers]
        ),
        "eval_batches": lambda: batches[-held_out:],
    }
    functions |= _around_steps(recorder, optimizers)
    workload = workload_from(functions, name=script.name, digest=_digest(script, recorder))
    written = Written(script_autocast=autocast, script_compiles=first.is_compiled, moving=followers)
    written.multiplied = _multiplied(first, batches[0])
    return replace(workload, written=written)


def _run_recorded(script: Script, recorder: Recorder) -> int:
    """Run a script that a recorder follows; return its exit status, 0 where it was stopped."""
    status = 0
    with (
        contextlib.ExitStack() as stack,
        contextlib.chdir(os.getcwd()),
        random_state_kept(),
        recorder.following(),
        patched_spawn(partial(_spawn_here, recorder)),
        patched(threading, "excepthook", _show_other),
        contextlib.redirect_stdout(sys.stderr),
        contextlib.suppress(StopScript),  # the recorder knows why
    ):
        # what a script may change for the whole process, and the stages rely on, is put back
        stack.callback(torch.set_default_device, None)
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        stack.callback(torch.autograd.set_detect_anomaly, torch.is_anomaly_enabled())
        status = run_script(script)
    return status


def _show_other(show: Function, error: Any) -> None:  # Any: threading's own
    """Show what ended a thread, unless it was the recorder."""
    if error.exc_type is not StopScript:
        show(error)


def _spawn_here(
    recorder: Recorder,
    _: Function,
    /,
    fn: Function,
    args: Any = (),
    nprocs: int = 1,
    *__: Any,
    **___: Any,
) -> None:
    """Be the one process that a script spawns."""
    if nprocs != 1:
        recorder.refuse(
            f"one process must train, but the script spawns {nprocs} (where it counts devices, "
            "CUDA_VISIBLE_DEVICES=0 makes it one)"
        )
    fn(0, *args)


def _followers(recorder: Recorder, pairs: Pairs) -> set[str]:
    """Return the parameters that no optimizer trained and that are not as they were at first."""
    trained = {p for optimizer in recorder.optimizers for p in trained_by(optimizer)}
    others = {n: x for n, x in pairs.items() if not x[1].requires_grad or x[1] not in trained}
    return {n for n, (p, own) in others.items() if not torch.equal(own.detach().to(p.device), p)}


def _thawed(optimizers: Sequence[SeenOptimizer], pairs: Pairs) -> list[nn.Parameter]:
    """Return the optimizers' parameters that are frozen at first and trained in a later step."""
    held = {p for seen in optimizers for p in trained_by(seen.first)}
    frozen = [(p, own) for p, own in pairs.values() if p in held and not p.requires_grad]
    thawed = [p for p, own in frozen if own.requires_grad]
    if thawed:
        logger.warning(
            "%d parameters are frozen in the script's first step and trained in a later one: "
            "tuning trains them in every step",
            len(thawed),
        )
    return thawed


def _plain(batch: RecordedBatch, model: nn.Module, micro_steps: int) -> RecordedBatch:
    """Return a batch without the loss's scale, and with inputs as before a library's autocast."""
    remove_scale(batch.graph, batch.constants, micro_steps=micro_steps)
    is_low = any(p.dtype in LOW_PRECISION for p in model.parameters())
    return batch if is_low else batch._replace(calls=in_fp32(batch.calls))


def _around_steps(recorder: Recorder, optimizers: Sequence[SeenOptimizer]) -> dict[str, Any]:
    """Return what a step has beside the loss; without a schedule optimizers get their peaks."""
    found: dict[str, Any] = {"accumulation_steps": recorder.micro_steps}  # Any: as above
    if recorder.clip_norm is not None:
        found["clip_norm"] = recorder.clip_norm
    if recorder.takes_of_norm is not None:
        logger.warning(
            "the script changes gradients before a step otherwise than by clip_grad_norm_ of all "
            "(clips values, drops some, LARC): a step takes one of %.2g times the norm; "
            "that is not followed, tuning trains without it at the script's learning rate",
            recorder.takes_of_norm,
        )
    schedules = [each.schedule for each in optimizers if each.schedule is not None]
    for each in optimizers:
        each.schedule = None  # it holds the script's own optimizer
    if schedules and len(optimizers) > 1:
        names = " and ".join(type(each.first).__name__ for each in optimizers)
        logger.warning("the schedules of %s are not followed: each is at its peak rate", names)
    elif schedules and was_stepped(*schedules[0], recorder.steps):
        found["build_scheduler"] = partial(copy_schedule, schedules[0][1])
        return found
    for each in optimizers:
        set_peak_rates(each.first, each.rates)
    return found


def recorded_loss(
    model: nn.Module, batch: RecordedBatch, before: Callable[[int], None] = lambda number: None
) -> Tensor:
    """Return the loss of a recorded batch for the model as it is now.

    `before` hears the number of each call of the model.
    """

    def call(number: int, *made: Tensor) -> Any:  # Any: whatever it returns
        recorded = batch.calls[number]
        inputs = recorded.args, recorded.kwargs
        if recorded.writes_inputs:
            inputs = tree_map_only(Tensor, Tensor.clone, inputs)
        args, kwargs = tree_map_only(FromTape, lambda each: made[each.index], inputs)
        part = recorded.begin(model)
        before(number)
        return part(*args, **kwargs)

    return replay(batch.graph, model, call, batch.constants)


def check_recording(
    script: Script, recorder: Recorder, first: FirstCall, recorded: RecordedBatch
) -> torch.dtype | None:
    """Run the first batch again as the script did, and compare; return its layers' autocast."""
    calls, _ = recorder.batches[0]
    model = copy_model(first.model).to(first.device)
    first.policy.install(model)
    batch = move_batch(recorded, first.device)
    seen: set[torch.dtype] = set()  # Accelerate's autocast is inside of the model's forward
    device = first.device.type

    def note(_module: nn.Module, _args: object) -> None:
        if torch.is_autocast_enabled(device):
            seen.add(torch.get_autocast_dtype(device))

    with random_state_kept():
        with contextlib.ExitStack() as hooks:
            for layer in find_layers(model).values():
                hooks.enter_context(layer.register_forward_pre_hook(note))
            # as in the script: the random numbers of its dropout, and its autocast
            with first.autocast, UserCode("the recorded first step", "its loss again"):
                loss = recorded_loss(model, batch, lambda number: calls[number].draw_again())
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]  # torch's own stub
    inputs = "the model or its loss depends on something else than the model's inputs"
    if "forward" in vars(model) and not hasattr(model.forward, "__self__"):
        inputs = "its copy runs the forward that is on the script's object; make that a method"
    other = "the gradient does not only come from the loss (hooks, or a forward that was replaced)"
    for what, found, wanted, tolerance, cause in (
        ("loss", float(loss.detach()), recorder.losses[0], LOSS_RTOL, inputs),
        ("gradient norm", gradient_norm(model), recorder.first_norm, NORM_RTOL, other),
    ):
        is_finite = math.isfinite(found) or math.isfinite(wanted)  # a scaler skips what is not
        if is_finite and not math.isclose(found, wanted, rel_tol=tolerance, abs_tol=1e-12):
            raise _refused(
                script,
                f"a recording must repeat the script's first step, but the {what} is {found:.6g} "
                f"again instead of {wanted:.6g}: {cause}",
            )
    return next(iter(seen), first.policy.low_dtype)


def _multiplied(first: FirstCall, recorded: RecordedBatch) -> frozenset[str]:
    """Return the parameters of layers with which the script itself computes in FP32 alone."""
    model = copy_model(first.model).to(first.device)
    batch, layers = move_batch(recorded, first.device), find_layers(model)
    used = {node.target for node in recorded.graph.nodes}
    named = [n for i, (n, _) in enumerate(model.named_parameters()) if f"parameter_{i}" in used]
    holders = {n: _holders(model.get_parameter(n), layers) for n in named}

    def runs(names: Iterable[str]) -> bool:
        options = dict.fromkeys((layer for name in names for layer in holders[name]), BF16_O2)
        try:
            with install_options(model, options, activation_dtype=torch.float32):
                recorded_loss(model, batch)
        except (RuntimeError, TypeError, ValueError):
            return False
        return True

    if any(parameter.dtype in LOW_PRECISION for parameter in model.parameters()):
        return frozenset()  # what the script computes with is 16-bit without a plan, too
    with random_state_kept():
        return frozenset() if runs(named) else frozenset(n for n in named if not runs([n]))


def _holders(parameter: nn.Parameter, layers: Mapping[str, nn.Module]) -> list[str]:
    return [n for n, layer in layers.items() if any(p is parameter for p in layer.parameters())]


def _shuffled(batches: list[RecordedBatch], seed: int) -> Iterator[RecordedBatch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]


def _free(recorder: Recorder) -> None:
    """Let the script's own model and optimizer leave the accelerator."""
    if recorder.model is not None and recorder.first and recorder.first.device.type != "cpu":
        recorder.model.zero_grad(set_to_none=True)
        recorder.model.to("cpu")
        for optimizer in recorder.optimizers:
            optimizer.state.clear()
        gc.collect()
        torch.cuda.empty_cache()  # does nothing where CUDA was not used
    recorder.model, recorder.optimizers = None, {}


def _digest(script: Script, recorder: Recorder) -> str:
    """Hash the script and what it did: another run of an unseeded script is another workload."""
    losses = [f"{loss:.6g}" for loss in recorder.losses]
    file = Path(vars(sys.modules["__main__"])["__file__"])  # as the script left it
    return short_digest(text_digest(file), repr(script), recorder.wanted, losses)


def _refused(script: Script, reason: str) -> WorkloadError:
    return WorkloadError(f"{script.name} cannot be tuned as it is: {reason}; {MODEL_PY}")


def _ended_early(script: Script, recorder: Recorder, status: int) -> WorkloadError:
    rule = f"the script must train for {recorder.wanted} steps"
    if status >= FAILED:
        return WorkloadError(
            f"{rule}, but {script.name} failed with exit status {status} after {recorder.steps}; "
            f"fix it, or {MODEL_PY}"
        )
    if recorder.steps > 0:
        fewer = "ask for fewer, or " if recorder.steps >= FEWEST_STEPS else ""
        return WorkloadError(
            f"{rule} (--script-steps), but {script.name} trained its model for {recorder.steps}; "
            f"{fewer}let it train longer"
        )
    reason = "an optimizer of torch.optim must step, but none did"
    if recorder.model is None:
        reason = "a model must be called in training mode, but none was in this process"
    elif not recorder.batches:
        reason = "the loss must be trained by backward, but none was called"
    return _refused(script, reason)
