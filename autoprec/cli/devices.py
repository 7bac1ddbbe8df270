"""`autoprec devices`: what the cost model knows of each device, and what it predicts.

Nothing here needs torch but `measure`. Results go to stdout; `--json` prints one JSON object.
"""

import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from autoprec.common.files import read_text, write_atomically
from autoprec.common.recipes import Recipe
from autoprec.errors import DeviceError

if TYPE_CHECKING:
    from autoprec.records.devices import DeviceProfile, LinearPrediction

devices_app = typer.Typer(help="Device profiles, and what they predict.", no_args_is_help=True)
log = logging.getLogger(__name__)

SHAPE = re.compile(r"\s*(\d+)\s*[x,*]\s*(\d+)\s*[x,*]\s*(\d+)\s*", re.IGNORECASE)
SUMMARY = {"name", "title", "architecture", "capability", "fp8_recipes", "fp8_reason", "basis"}
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
NAME = typer.Argument(help="A profile's name, a usual spelling, or a path.")
# Columns of a prediction's times, and how wide they are.
COLS = {"output": 10, "grad_input": 12, "grad_weight": 13, "cast": 9, "neighbours": 12, "total": 10}


@devices_app.command("list")
def devices_list(as_json: Json = False) -> None:
    """List the device profiles."""
    from autoprec.predict import list_device_profiles

    profiles = list_device_profiles()
    if as_json:
        listed = [profile.model_dump(mode="json", include=SUMMARY) for profile in profiles]
        typer.echo(json.dumps({"devices": listed}))
        return
    width = max(len(profile.name) for profile in profiles)
    for profile in profiles:
        typer.echo(f"{profile.name:<{width}}  {profile.title:<40}  {_ability(profile)}")


@devices_app.command("show")
def devices_show(name: Annotated[str, NAME], as_json: Json = False) -> None:
    """Print a device's constants, each with its kind and source."""
    from autoprec.predict import load_device_profile

    profile = load_device_profile(name)
    typer.echo(profile.to_json().rstrip() if as_json else "\n".join(_profile_lines(profile)))


@devices_app.command("predict")
def devices_predict(
    name: Annotated[str, NAME] = "",
    shape: Annotated[str, typer.Option(help="MxKxN: tokens, in-features, out-features.")] = "",
    recipe: Annotated[str, typer.Option(help=f"One of {', '.join(Recipe)}.")] = "tensorwise",
    compiled: Annotated[
        bool, typer.Option("--compile/--eager", help="Casts fused by torch.compile, or eager.")
    ] = True,
    csv: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads it at run time
        typer.Option(
            help="Predict every row (device, M, K, N, recipe, compiled) instead; NAME is for rows "
            "without a device."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict a linear layer, forward and backward, in BF16 and FP8."""
    from autoprec.predict import load_device_profile, predict_linear

    if csv is not None:  # the file says shapes, and which device where NAME does not
        if shape or as_json:
            raise DeviceError(
                "--csv FILE takes its shapes from the file and prints CSV, but "
                f"{'--shape' if shape else '--json'} came with it; leave that out"
            )
        _predict_file(csv, device=name, recipe=recipe, compiled=compiled)
        return
    if not name or not shape:
        raise DeviceError(
            "predict needs a device and --shape MxKxN, or --csv FILE, but got "
            f"{'no --shape' if name else 'neither'}; "
            "e.g. autoprec devices predict h100-sxm --shape 8192x4096x14336"
        )
    sizes = SHAPE.fullmatch(shape)
    if sizes is None:
        raise DeviceError(
            f"--shape must be MxKxN (tokens, in-features, out-features), but it is {shape!r}; "
            "write e.g. 8192x4096x14336"
        )
    profile = load_device_profile(name)
    M, K, N = map(int, sizes.groups())
    found = predict_linear(profile, M, K, N, recipe=recipe, compiled=compiled)
    typer.echo(found.model_dump_json() if as_json else "\n".join(_prediction_lines(found)))


@devices_app.command("measure")
def devices_measure(
    out: Annotated[Path, typer.Option(help="The profile to write, e.g. my-gpu.json.")],
    target: Annotated[str, typer.Option(help="The device to measure: cuda or cuda:N.")] = "cuda",
    as_json: Json = False,
) -> None:
    """Measure the device that is here and write its profile (takes about two minutes)."""
    from autoprec.predict.measure import measure_device_profile

    profile = measure_device_profile(target)
    write_atomically(out, profile.to_json())
    typer.echo(profile.to_json().rstrip() if as_json else f"wrote {out}: {profile.title}")


def _predict_file(path: Path, *, device: str, recipe: str, compiled: bool) -> None:
    from autoprec.predict import load_device_profile, parse_recipe
    from autoprec.predict.tables import ADDED, predict_table

    if device:
        load_device_profile(device)  # a wrong argument is no matter of single rows
    text, priced = read_text(path, what="CSV"), parse_recipe(recipe)
    table = predict_table(text, source=str(path), device=device, recipe=priced, compiled=compiled)
    typer.echo(table.to_csv(index=False, lineterminator="\n"), nl=False)
    answers = table.iloc[:, -len(ADDED) :].set_axis(ADDED, axis="columns")
    failed = answers[answers["profile"] == ""]
    if len(failed) == len(table) > 0:
        raise DeviceError(
            f"some row of {path} must be one that can be predicted, but none of {len(table)} is; "
            f"the first says: {failed['refusal'].iloc[0]}"
        )
    if len(failed):
        log.warning("%d of %d rows not predicted; see `refusal`", len(failed), len(table))


def _ability(profile: "DeviceProfile") -> str:
    return ", ".join(profile.fp8_recipes) if profile.has_fp8 else f"no FP8: {profile.fp8_reason}"


def _profile_lines(profile: "DeviceProfile") -> list[str]:
    width = max(len(name) for name in profile.constants)
    lines = [
        f"{profile.name}: {profile.title} ({profile.architecture}, {profile.capability})",
        f"FP8: {_ability(profile)}",
        f"also called: {', '.join(profile.aliases)}",
        f"software assumed: {profile.software}",
        *(f"note: {note}" for note in profile.notes),
        "",
    ]
    for name, constant in profile.constants.items():
        amount = f"{constant.value:.6g} {'' if constant.unit == '1' else constant.unit}".rstrip()
        lines.append(f"{name:<{width}}  {amount:<18} {constant.kind:<10} {constant.source}")
    return lines


def _prediction_lines(prediction: "LinearPrediction") -> list[str]:
    mode = "compiled" if prediction.compiled else "eager"
    names = "".join(f"{name:>{width}}" for name, width in COLS.items())
    lines = [
        f"{prediction.device}: M={prediction.M} K={prediction.K} N={prediction.N}, "
        f"{prediction.recipe}, {mode}, {prediction.basis}"
        f"{f', {prediction.software} assumed' if prediction.software else ''}",
        f"{'ms':<6}{names}  (80 % interval)",
    ]
    for label, arm in (("BF16", prediction.bf16), ("FP8", prediction.fp8)):
        if arm is None:
            lines.append(f"FP8    {prediction.refusal}")
            continue
        times = "".join(f"{getattr(arm, f'{n}_ms'):>{width}.4f}" for n, width in COLS.items())
        lines.append(f"{label:<6}{times}  ({arm.total_low_ms:.4f} to {arm.total_high_ms:.4f})")
    for label in ("gemm_speedup", "speedup"):
        if (gain := getattr(prediction, label)) is not None:
            lines.append(f"{label:<13} {gain.value:.2f}x  ({gain.low:.2f} to {gain.high:.2f})")
    return lines
