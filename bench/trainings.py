"""Published whole-training speedups (bench/data/training.csv) as observations.

A row counts when both arms differ in FP8 alone (`fair_pair`), the model's dimensions are known, it
is priced (no MoE, no FP4), and batch, sequence and parallelism are stated. torchtitan's Llama 3
trains on 8,192 tokens unless it says otherwise. Rows that lack a batch are scored apart, with one
sequence.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from decoders import DECODERS, decoder_spec
from published import read_rows, source_of

from autoprec.common.recipes import Recipe
from autoprec.predict.layers import Setting
from autoprec.predict.parallel import Parallel
from autoprec.predict.predict import retarget_model
from autoprec.predict.spelling import parse_recipe
from autoprec.predict.step import StepTimes, first_fp8, step_times
from autoprec.records.devices import DeviceProfile, Machine
from autoprec.records.model import BF16_O2, ModelSpec, Option, fp8_option

TORCHTITAN_SEQUENCE = 8192
STATES = 2.0  # Adam
DEVICES = {
    "H100": "h100-sxm-500w",  # torchao's and torchtitan's, see the data's notes
    "H100 96GB 2.4TB/s 500W": "h100-sxm-500w",
    "H100 80GB": "h100-sxm",
    "MI300X": "mi300x",
    "B200 (power limited)": "b200",
    "GB200": "b200",
    "L40S": "l40s",
    "RTX 4090": "rtx-4090",
    "RTX 5090": "rtx-5090",
    "RTX PRO 6000": "rtx-pro-6000",
}
OWN_ENGINE = "llmq"


@dataclass(frozen=True)
class Training:
    """One published pair of runs."""

    source: str
    device: str
    model: str
    batch: int
    sequence: int
    parallel: Parallel
    recipe: Recipe
    compiled: bool
    speedup: float
    tokens_s: float  # BF16, per device; 0 where the row does not say
    is_assumed: bool

    @cached_property
    def spec(self) -> ModelSpec:
        return decoder_spec(DECODERS[self.model], batch=self.batch, sequence=self.sequence)

    @property
    def is_own_engine(self) -> bool:
        """Whether it is no PyTorch run."""
        return OWN_ENGINE in self.source

    def predict(self, machine: Machine, profile: DeviceProfile) -> tuple[float, float]:
        """Return the predicted speedup and BF16 tokens per second and device."""
        options = [fp8_option(self.recipe)]
        target = retarget_model(self.spec, profile, options, self.parallel)
        bf16 = self._step(target, machine, BF16_O2)
        fp8 = self._step(target, machine, None)
        tokens = self.batch * self.sequence / self.parallel.tp
        return bf16.total / fp8.total, tokens / bf16.total * 1e6

    def _step(self, target: ModelSpec, machine: Machine, option: Option | None) -> StepTimes:
        setting = Setting(machine, self.parallel, self.compiled, STATES)
        return step_times(target, (lambda _: option) if option else first_fp8, setting)

    def __str__(self) -> str:
        degrees = f"fsdp={self.parallel.fsdp},tp={self.parallel.tp}"
        shape = f"{self.batch}x{self.sequence}{'?' if self.is_assumed else ''}"
        return f"{self.model} {self.device} {degrees} {shape} {self.recipe} [{self.source[:30]}]"


def trainings() -> list[Training]:
    """Return every row that counts, and those whose batch is assumed."""
    found = (_training(row) for row in read_rows("training.csv"))
    return [training for training in found if training is not None]


def stated(rows: Sequence[Training]) -> list[Training]:
    """Return the rows that say everything."""
    return [row for row in rows if not row.is_assumed]


def _training(row: dict[str, str]) -> Training | None:
    if row["fair_pair"] != "yes" or row["model"] not in DECODERS or not row["speedup"]:
        return None
    if row["device"] not in DEVICES or "fp4" in row["recipe"] or "async" in row["parallelism"]:
        return None
    if "nocompile" in row["recipe"] + row["source"]:
        return None  # a prototype's hand-written casts in an eager model: neither mode of ours
    recipe = _recipe(row["recipe"])
    if recipe is None or not row["n_gpu"]:
        return None
    batch = _batch(row["batch"])
    sequence = int(row["seq"] or (TORCHTITAN_SEQUENCE if "titan" in row["source"] else 0))
    is_llmq = OWN_ENGINE in row["source"]
    return Training(
        source=source_of(row),
        device=_device(row),
        model=row["model"],
        batch=batch or 1,
        sequence=sequence or TORCHTITAN_SEQUENCE,
        parallel=_parallel(row, is_llmq=is_llmq),
        recipe=recipe,
        compiled=row["compile"] not in ("no", "") or "TE" in row["recipe"] or is_llmq,
        speedup=float(row["speedup"]),
        tokens_s=_tokens(row),
        is_assumed=not batch or not sequence,
    )


def _device(row: dict[str, str]) -> str:
    return (
        "h100-sxm"
        if OWN_ENGINE in row["source"] and row["device"] == "H100"
        else DEVICES[row["device"]]
    )


def _recipe(text: str) -> Recipe | None:
    """Return the plan's recipe; block scales are priced by their nearest, tensorwise."""
    priced = parse_recipe(text)
    return None if priced in (Recipe.MXFP8, Recipe.BLOCKWISE) else priced


def _batch(text: str) -> int:
    found = re.findall(r"\d+", text)
    if "micro" in text:
        return int(found[1]) if len(found) > 2 else 0
    return int(found[0]) if found else 0


def _parallel(row: dict[str, str], *, is_llmq: bool) -> Parallel:
    text, notes = row["parallelism"], row["notes"].lower()
    tp = re.search(r"TP(\d+)", text)
    degree = int(tp[1]) if tp else 1
    recomputed = 0.0
    if "asyncTP" in row["source"]:  # its notes say so on the tensorwise rows only
        recomputed = 1.0 if "70B" in row["model"] else 0.5
    elif "full ac" in notes or "ac on" in notes:
        recomputed = 1.0
    elif "selective" in notes or "sac" in notes:
        recomputed = 0.5
    return Parallel(
        fsdp=1 if is_llmq else max(int(row["n_gpu"]) // degree, 1),
        tp=degree,
        fp8_gather="all-gather" in row["recipe"] and "bf16 all-gather" not in row["recipe"],
        recomputed=recomputed,
    )


def _tokens(row: dict[str, str]) -> float:
    if not row["tokens_s_baseline"] or "tok/s" not in row["unit"]:
        return 0.0
    per_device = int(row["n_gpu"]) if "total" in row["unit"] else 1
    return float(row["tokens_s_baseline"]) / per_device
