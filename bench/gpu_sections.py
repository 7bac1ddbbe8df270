"""What bench/gpu_day.py measures: a section is its items in order, an item gives rows.

Run in a child process (`run_section`). An item that fails gives a row that says why, and the next
one follows; where the device itself answers no more, the child ends and another goes on.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_measuring import (
    COMPILED,
    EAGER,
    RECIPES,
    TINY_SHAPES,
    Day,
    Item,
    gemms,
    linear_step,
    linears,
    make_arms,
    predict_decoder,
    steps,
)
from gpu_models import SMALL, TINY
from gpu_report import compare
from gpu_running import BROKEN, Row, begun, read_rows, write_row
from profiler import predict_step

from autoprec.common.files import write_atomically
from autoprec.common.text import error_line
from autoprec.device.fp8 import fp8_self_test
from autoprec.device.local import device_facts, find_sensor, release_memory, resolve_device
from autoprec.errors import AutoprecError
from autoprec.predict import load_device_profile
from autoprec.predict.calibrate import calibrate_profile
from autoprec.predict.measure import CAST, LARGE, safe_title, software_here, take_measurements
from autoprec.profiler.proving import cuda_kernels, is_fp8_kernel
from autoprec.records import fp8_option

MEASURED_PROFILE = "device_profile.json"
TUNED = ("--recipes", "tensorwise,rowwise", "--no-gemms-hp")  # what there is time for
WORK_S = 1.0  # that a GPU is given before its clocks are read


def run_section(out: Path, section: str, *, device: str, is_quick: bool) -> int:
    """Run what is left of a section; return the status for whoever started this process."""
    day = Day(resolve_device(device), out, is_quick)
    tried = begun(out, section)
    for item, work in SECTIONS[section](day).items():
        if item in tried:
            continue
        named = {"section": section, "item": item}
        write_row(out, {"section": section, "begun": item, "at": round(time.time(), 1)})
        try:
            for row in work():
                write_row(out, named | row)
        except Exception as error:  # noqa: BLE001  # the items behind it must not be lost
            said = f"{type(error).__name__}: {error_line(error)}"
            write_row(out, named | {"failed": said})
            if not still_answers(day):
                return BROKEN
        release_memory(day.device)
    return 0


def still_answers(day: Day) -> bool:
    """Whether the device still works: an illegal access breaks it for the whole process."""
    try:
        torch.ones(1, device=day.device).sum().item()
    except RuntimeError:
        return False
    return True


# --- facts ------------------------------------------------------------------------------------


def facts(day: Day) -> dict[str, Item]:
    compiled = partial(torch.compile, backend=day.backend)
    return {
        "device": partial(tell_device, day),
        "nvml under load": partial(read_sensor, day),
        "self-test": lambda: tell_checks(day),
        "kernels": partial(name_kernels, day),
        "compiled self-test": lambda: tell_checks(day, compiler=compiled),
    }


def tell_device(day: Day) -> Iterator[Row]:
    found = device_facts(day.device)
    yield found.model_dump(mode="json") | {"shipped profile": day.shipped.name}


def read_sensor(day: Day) -> Iterator[Row]:
    """Read NVML before and while the device works."""
    sensor = find_sensor(day.device)
    if sensor is None:
        yield {"nvml": "none here"}
        return
    yield {"when": "idle", **sensor.read().model_dump()}
    x = torch.randn(8192, 8192, device=day.device).bfloat16()
    for _ in range(1500):  # about 2 s of an H100: queued at once, so that it works meanwhile
        x @ x
    time.sleep(WORK_S)
    yield {"when": "at work", **sensor.read().model_dump(), "missing": sensor.missing}
    day.synchronize()


def tell_checks(day: Day, *, compiler: Callable[..., Any] | None = None) -> Iterator[Row]:
    """Test each recipe against FP64."""
    for recipe in RECIPES:
        for check in fp8_self_test(day.device, recipes=[recipe], compiler=compiler):
            yield check.model_dump()


def name_kernels(day: Day) -> Iterator[Row]:
    """Name what the recipes' linears launch: which library multiplies, and how often."""
    if day.device.type != "cuda":
        return
    for recipe in day.recipes:
        step = linear_step(day, (1024, 1024, 1024), fp8_option(recipe), EAGER)
        step()
        names = cuda_kernels(step)
        yield {"recipe": recipe, "fp8 kernels": sum(map(is_fp8_kernel, names)), "all": names}


# --- the product itself -----------------------------------------------------------------------


def tune(day: Day) -> dict[str, Item]:
    """The whole loop on a small decoder: the plan first, then its proof."""
    return {
        "plan": partial(run_tune, day, "--no-verify"),
        "proof": partial(run_tune, day),
    }


def run_tune(day: Day, *arguments: str) -> Iterator[Row]:
    """Run the command line as a user does; the answer is a row, what it says goes into the log."""
    file, folder = day.out / "decoder.py", day.out / "tune"
    text = (
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from gpu_models import Sizes, decoder_functions\n"
        f"functions = decoder_functions({TINY if day.is_quick else SMALL!r})\n"
    )
    write_atomically(file, text)
    command = [sys.executable, "-m", "autoprec", "tune", f"{file}:functions", "--out", str(folder)]
    command += ["--target", str(day.device), "--json", *TUNED, *arguments]
    command += ["--resume"] * folder.exists()  # a run that was cut off goes on
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stderr)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it said nothing"])[-1])
    yield {"seconds": time.monotonic() - started, **json.loads(done.stdout)}


def profile(day: Day) -> dict[str, Item]:
    return {"profile": partial(measure_profile, day)}


def measure_profile(day: Day) -> Iterator[Row]:
    """Measure the constants of a device profile, and tell those that changed."""
    on_cuda = day.device.type == "cuda"
    name = torch.cuda.get_device_name(day.device) if on_cuda else "CPU"
    measured = take_measurements(
        day.device,
        clock=day.clock,
        shapes=TINY_SHAPES if day.is_quick else LARGE,
        copied_bytes=1 << (16 if day.is_quick else 30),
        cast=(32, 64) if day.is_quick else CAST,
        samples=3 if day.is_quick else 20,
        monitor=day.monitor,
        backend=day.backend,
    )
    for kernel, times in measured.large.items():
        yield {"kernel": kernel.value, "us": {"x".join(map(str, s)): us for s, us in times.items()}}
    yield {"copied_tbs": measured.copied_tbs, "empty_us": measured.empty_us}
    source = f"bench/gpu_day.py on {name}, torch {torch.__version__}"
    try:
        made = calibrate_profile(
            day.shipped,
            measured,
            title=safe_title(name),
            source=source,
            software=software_here(),
        )
    except AutoprecError as error:
        yield {"no profile": str(error)}
        return
    write_atomically(day.out / MEASURED_PROFILE, made.to_json())
    for constant, value in made.constants.items():
        if value != day.shipped.constants[constant]:
            shipped = day.shipped.value(constant)
            yield {"constant": constant, "shipped": shipped, "measured": value.value}


def predictions(day: Day) -> dict[str, Item]:
    return {"predictions": partial(predict_all, day)}


def predict_all(day: Day) -> Iterator[Row]:
    """Set every measured time and speedup beside those of the shipped and the measured profile."""
    profiles = {"shipped": day.shipped}
    if (day.out / MEASURED_PROFILE).exists():
        profiles["measured"] = load_device_profile(day.out / MEASURED_PROFILE)
    rows = read_rows(day.out)
    arms = make_arms(day, predict_decoder(day, day.shipped)[COMPILED])
    for name, device_profile in profiles.items():
        by_mode = predict_decoder(day, device_profile)
        step_ms = {arm.label: predict_step(by_mode[arm.mode], arm.options) for arm in arms}
        yield from compare(rows, name, device_profile, step_ms)


SECTIONS: dict[str, Callable[[Day], dict[str, Item]]] = {
    "facts": facts,
    "steps": steps,
    "gemms": gemms,
    "linears": linears,
    "tune": tune,
    "profile": profile,
    "predictions": predictions,
}
