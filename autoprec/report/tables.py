"""What the page and the terminal both show, but for layers and steps."""

from autoprec.records import APPLICABLE_RECIPES, BF16_O2, DeviceFacts, Sensitivity
from autoprec.report import formats
from autoprec.report.formats import UNKNOWN
from autoprec.report.text_table import Table
from autoprec.sensitivity.gap import HORIZON_STEPS, predicted_loss_gap


def recipe_table(sensitivity: Sensitivity) -> Table:
    """Return the cost in convergence of each FP8 recipe: FP8 wherever it goes, BF16 elsewhere."""
    rows = []
    for option in dict.fromkeys(row.option for row in sensitivity.rows):
        if not option.is_fp8 or option.gemms_hp:
            continue
        own = {row.name: row for row in sensitivity.rows if row.option == option}
        others = [r for r in sensitivity.rows if r.option == BF16_O2 and r.name not in own]
        parts = sum(max(row.grad_error.mean, 0.0) for row in (*own.values(), *others))
        grad_error = sensitivity.between_layers + parts
        gap = predicted_loss_gap(sensitivity, grad_error, HORIZON_STEPS)
        title = formats.option(option)
        if option.recipe not in APPLICABLE_RECIPES:
            title += " (for comparison; no plan applies it)"
        shares = (formats.share(grad_error), formats.share(gap, sign=True))
        rows.append((title, str(len(own)), *shares))
    gap_title = f"predicted loss gap, {HORIZON_STEPS} steps"
    heads = ("recipe", "linears", "gradient error, sum of parts", gap_title)
    return Table(heads, rows, numbers=(1, 2, 3))


def device_facts(device: DeviceFacts) -> dict[str, str]:
    """Return the facts of a device, one by one."""
    return {
        "device": f"{device.name} ({device.kind} {device.capability})",
        "memory": formats.size(device.memory_bytes),
        "driver": device.driver or UNKNOWN,
        "threads": str(device.threads),
        "TF32": _tf32(device),
        "FP8 recipes": ", ".join(device.fp8_recipes) or f"none: {device.fp8_reason}",
        **device.software,
    }


def _tf32(device: DeviceFacts) -> str:
    """Return where FP32 runs in TF32: torch has one setting for GEMMs and one for convolutions."""
    gemms = "allowed" if device.allow_tf32 else "off"
    if device.allow_tf32_conv is None:
        return gemms
    return f"GEMMs: {gemms}; convolutions: {'allowed' if device.allow_tf32_conv else 'off'}"
