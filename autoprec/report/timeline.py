"""A run's layers as a trace for Perfetto or chrome://tracing: one track per arm.

An arm is a way to train the whole model: FP32, BF16 O2, the plan, FP8 by each recipe wherever it
goes. Its track has a slice per layer in model order, of the layer's time per step (forward and
backward of all its calls), and within it the GEMMs and casts that were timed apart; then, where the
whole step was timed, one slice for all that is outside the layers. It is a profile laid out in
order and no recording: a real step has all forwards first, and overlaps.

The file is in the Trace Event Format: https://docs.google.com/document/d/
1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU ("Trace Event Format", Google). Times are in us.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from autoprec import __version__
from autoprec.errors import RecordError
from autoprec.records import FP32, LayerSpec, LayerTiming, Option, Profile, StepTiming, Timing
from autoprec.report import formats
from autoprec.report.layer_frame import PARTS
from autoprec.report.runs import RunRecords
from autoprec.report.step_times import profile_steps

US_PER_MS = 1000.0
TICKS = 8  # in a us: of eighths, sums are exact in us and in ns, which viewers make of them
PROCESS = 1  # a track of the same number would be shown as its main thread
OUTSIDE = "attention, activations, loss, optimizer: the step less its layers"
Event = dict[str, Any]  # Any: JSON values of the Trace Event Format


@dataclass(frozen=True)
class Arm:
    """One way to train: its title, every layer's option, and the whole step where it is known."""

    title: str
    options: Mapping[str, Option]
    step: StepTiming | None


def trace_text(run: RunRecords) -> str:
    """Return the trace of a run's profile as JSON."""
    if run.profile is None:
        raise RecordError(
            "a trace is drawn of a profile, but the run has no profile.json; make it with "
            "`autoprec profile MODEL.py`"
        )
    events = [_metadata("process_name", 0, "name", formats.clean_text(run.profile.device.name))]
    for track, arm in enumerate(_arms(run, run.profile), start=PROCESS + 1):
        events += _Track(run.profile, arm, track).events()
    about = {"autoprec": __version__, "basis": run.profile.basis.value}
    trace = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}
    return json.dumps(trace, allow_nan=False)


def _arms(run: RunRecords, profile: Profile) -> Iterator[Arm]:
    """Yield the uniform arms and the plan's; of FP8 those recipes that a layer can take."""
    specs, steps = profile.model.layers, profile_steps(run)  # of the layers' own turn
    yield Arm("FP32", {layer.name: FP32 for layer in specs}, steps.get("fp32"))
    yield Arm(formats.step_title("bf16_o2"), profile.model.bf16_options, steps.get("bf16_o2"))
    if run.plan:
        chosen = {layer.name: layer.option for layer in run.plan.layers}
        yield Arm(formats.step_title("plan"), chosen, steps.get("plan"))
    every = dict.fromkeys(option for layer in specs for option in layer.options)
    for place, option in enumerate(option for option in every if option.is_whole_fp8):
        own = {layer.name: option for layer in specs if option in layer.options}
        # the profiler's uniform FP8 step has the first recipe
        step = steps.get("fp8_o1") if place == 0 else None
        yield Arm(formats.option(option), {**profile.model.bf16_options, **own}, step)


@dataclass
class _Track:
    """The events of one arm; `now_us` is where the next slice begins."""

    profile: Profile
    arm: Arm
    track: int
    now_us: float = 0.0
    made: list[Event] = field(default_factory=list)

    def events(self) -> list[Event]:
        """Return the track's name and place, then its slices."""
        step, title = self.arm.step, self.arm.title
        said = f", {formats.ms(step.ms)} ms {step.basis}" if step else ""
        self.made += [
            _metadata("thread_name", self.track, "name", f"{title}{said}"),
            _metadata("thread_sort_index", self.track, "sort_index", self.track),
        ]
        for layer in self.profile.model.layers:
            self._add_layer(layer, self.arm.options.get(layer.name))
        layers_ms = self.now_us / US_PER_MS
        if step and step.ms > layers_ms:
            rest_ms = step.ms - layers_ms
            about = {"ms": rest_ms, "step_ms": step.ms, "basis": step.basis.value, "is": OUTSIDE}
            self._add("outside the layers", "outside", rest_ms, about)
        return self.made

    def _add_layer(self, layer: LayerSpec, option: Option | None) -> None:
        row = self.profile.timing(layer.name, option) if option else None
        about: Event = {"kind": layer.kind.value, "type": layer.type_name.rpartition(".")[2]}
        about |= {"option": option.key if option else "", "calls": layer.calls_per_step}
        about |= {"shape": str(layer.gemm)} if layer.gemm else {}
        if row is None or row.total is None:
            reason = (row.unknown or row.infeasible) if row else "not timed in this option"
            # an instant: the layer is there, its time is not
            self.made.append(
                {**self._place(layer.name, "layer"), "ph": "i", "s": "t"}
                | {"args": about | {"no time": reason or "not called in the step"}}
            )
            return
        start_us = self.now_us
        self._add(layer.name, "layer", row.total.median_ms, about | _timing_facts(row.total))
        self._add_parts(row, start_us)

    def _add_parts(self, row: LayerTiming, start_us: float) -> None:
        """Add GEMMs and casts within the layer's slice.

        They were timed apart, so that they may take longer than the layer; slices must nest, hence
        all are then drawn shorter by one factor, and their own time is in the arguments.
        """
        parts = {name: part for name in PARTS if (part := getattr(row, name)) is not None}
        whole = row.total.median_ms if row.total else 0.0
        longer = sum(part.median_ms for part in parts.values())
        scale = min(1.0, whole / longer) if longer > 0.0 else 1.0
        after, self.now_us = self.now_us, start_us
        for name, part in parts.items():
            about = _timing_facts(part) | ({"drawn_at": scale} if scale < 1.0 else {})
            kind = "cast" if name == "cast" else "gemm"
            self._add(name, kind, part.median_ms, about, scale=scale)
        self.now_us = after

    def _add(self, name: str, kind: str, ms: float, about: Event, *, scale: float = 1.0) -> None:
        place, end_us = self._place(name, kind), self.now_us + ms * US_PER_MS * scale
        self.made.append({**place, "ph": "X", "dur": _ticked(end_us) - place["ts"], "args": about})
        self.now_us = end_us

    def _place(self, name: str, kind: str) -> Event:
        return {
            "name": formats.clean_text(name) or "(the model itself)",
            "cat": kind,
            "pid": PROCESS,
            "tid": self.track,
            "ts": _ticked(self.now_us),
        }


def _ticked(us: float) -> float:
    """Return the nearest tick: a slice that reaches over another's end by a rounding is dropped."""
    return round(us * TICKS) / TICKS


def _timing_facts(timing: Timing) -> Event:
    facts: Event = {"ms": timing.median_ms, "basis": timing.basis.value}
    facts |= {"p20_ms": timing.p20_ms, "p80_ms": timing.p80_ms, "samples": timing.samples}
    return facts


def _metadata(name: str, track: int, key: str, value: object) -> Event:
    return {"name": name, "ph": "M", "pid": PROCESS, "tid": track, "ts": 0, "args": {key: value}}
