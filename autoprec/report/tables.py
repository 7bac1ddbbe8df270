"""What the page and the terminal both show, but for layers."""

from collections.abc import Iterator

from autoprec.records import BF16_O2, DeviceFacts
from autoprec.records.sensitivity import JointMeasurement, Sensitivity, between_layers
from autoprec.records.verification import Verification, loss_gaps
from autoprec.report import formats
from autoprec.report.answer import written_loss
from autoprec.report.formats import UNKNOWN, count_of
from autoprec.report.step_times import spread_title
from autoprec.report.summary import Summary
from autoprec.report.text_table import Table
from autoprec.sensitivity.gap import HORIZON_STEPS, predicted_loss_gap


def steps_table(found: Summary) -> Table:
    """Return the whole-step times and the plan's speedup over each baseline."""
    heads = ["step", "ms", spread_title(found.steps.values()), "samples", "basis"]
    heads += ["plan's speedup"] if found.speedups else []
    rows = []
    for label, step in found.steps.items():
        low, high = step.timing.p20_ms, step.timing.p80_ms
        spread = f"{formats.ms(low)}..{formats.ms(high)}" if low < high else ""
        counts = (str(step.timing.samples or UNKNOWN), step.basis.value)
        speedup = found.speedups.get(label)
        texts = (found.title(label), formats.ms(step.ms), spread, *counts)
        rows.append((*texts, str(speedup or ""))[: len(heads)])
    return Table(heads, rows, numbers=(1, 2, 3, 5))


def loss_sentences(found: Summary) -> Iterator[str]:
    """Yield what the plan costs in loss: predicted from its gradient error, then as proven."""
    if found.grad_error is not None:
        yield (
            f"gradient error {formats.grad_error(found.grad_error)} ({found.grad_error_basis}) => "
            f"{formats.share(found.extra_steps, sign=True)} training steps"
        )
    if found.time_to_loss is not None and found.extra_steps is not None:
        yield (
            "time-to-loss speedup over FP32 = "
            f"{formats.ratio(found.speedups['fp32'].value)} / {1 + found.extra_steps:.4f} = "
            f"{found.time_to_loss} (predicted)"
        )
    yield found.promise.sentence
    if found.promise.expectation:
        yield found.promise.expectation
    yield from found.promise.measured
    proof = found.run.verification
    if proof and proof.control_gap:
        spread = proof.seed_spread
        beside = f"; seeds differ by {formats.share(spread)}" if spread is not None else ""
        yield f"for scale: BF16 O2's own gap is {formats.gap(proof.control_gap)}{beside}"
    if said := written_loss(found.run):
        yield said
    if found.bf16_sentence:
        yield found.bf16_sentence


def branch_table(verification: Verification) -> Table:
    """Return the loss of every branch and its gap to the same seed's reference."""
    gaps = {b.label: loss_gaps(verification.branches, b.label) for b in verification.branches}
    rows = []
    for branch in verification.branches:
        loss, gap = branch.eval_loss, gaps[branch.label].get(branch.seed)
        failed = "failed" if branch.diverged_at is None else f"diverged at {branch.diverged_at}"
        shown = failed if loss is None else f"{loss:.5f}"
        rows.append((str(branch.seed), branch.label, shown, formats.share(gap, sign=True)))
    return Table(("seed", "branch", "loss", "gap"), rows, numbers=(0, 2, 3))


def sensitivity_sentences(sensitivity: Sensitivity) -> Iterator[str]:
    """Yield what a sensitivity says of whole plans, and of its own noise."""
    for recipe, linears, grad_error, gap in recipe_costs(sensitivity):
        yield (
            f"{recipe} in all {linears} linears: gradient error {formats.share(grad_error)}, "
            f"predicted loss gap after {HORIZON_STEPS} steps {formats.share(gap, sign=True)}"
        )
    for joint in sensitivity.joint:
        yield (
            f"{joint.label}, all layers at once, grad_weight's counted whole: "
            f"{formats.grad_error(joint.grad_error)}, "
            f"sum of parts {formats.share(joint.predicted_grad_error)}{_overlap(joint)}"
        )
    yield (
        f"BF16 activations alone: {formats.grad_error(sensitivity.activation_error)}; two runs of "
        f"the reference: {formats.grad_error(sensitivity.floor)}; "
        f"{count_of(sensitivity.batches, 'batch', 'batches')}, {sensitivity.preconditioner} "
        "preconditioner"
    )


def _overlap(joint: JointMeasurement) -> str:
    if joint.overlap <= 0.0:
        return ""
    return f", of which {formats.share(joint.overlap)} counts the same kinks and choices again"


def recipe_costs(sensitivity: Sensitivity) -> list[tuple[str, int, float, float]]:
    """Return per FP8 recipe, wherever it goes: title, linears, gradient error, predicted gap."""
    rows = []
    outside = between_layers(sensitivity.activation_error, sensitivity.islands)
    for option in dict.fromkeys(row.option for row in sensitivity.rows):
        if not option.is_whole_fp8:
            continue
        own = {row.name: row for row in sensitivity.rows if row.option == option}
        others = [r for r in sensitivity.rows if r.option == BF16_O2 and r.name not in own]
        parts = sum(row.counted_error for row in (*own.values(), *others))
        grad_error = outside + parts
        gap = predicted_loss_gap(sensitivity, grad_error, HORIZON_STEPS)
        title = formats.option(option)
        rows.append((title, len(own), grad_error, gap))
    return rows


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
