"""A small model that stands for one too large to train here: what is measured and proven on it.

    sensitivity    measured on the proxy, transferred to the model         predict/transfer.py
    plan           searched for the model, carried back to the proxy       predict/carry.py
    verification   trained on the proxy, recorded for the model's plan     here

The proxy is a run of its own in OUT/proxy, whose files any command reads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from autoprec.common.progress import Progress
from autoprec.predict.carry import carry_plan
from autoprec.records import Certificate, ModelSpec, Option, Plan, Proxy, Verdict, Verification
from autoprec.tuning.proof import train_plans
from autoprec.tuning.ranks import is_first
from autoprec.tuning.settings import Settings

if TYPE_CHECKING:
    from autoprec.tuning.run import Run
    from autoprec.workload.functions import Workload

FOLDER = "proxy"  # of the run's own
TOO_MILD = (
    "the proxy cannot show as much gradient error as the plan has: {shown:.2%} of {claimed:.2%}; "
    "its layers must be able to run in the options of the plan"
)


def open_proxy(settings: Settings, *, workload: "Workload | None", progress: Progress) -> "Run":
    """Return the proxy's own run, of a model's settings.

    `workload` are live functions in the place of the file that `settings.proxy` names.
    """
    from autoprec.tuning.run import Run  # it imports this module

    own = replace(
        settings,
        workload=settings.proxy,
        proxy="",
        out=settings.out / FOLDER,
        # what is said of the model alone
        script="",
        script_args=(),
        meta=False,
        parallel="",
        batch=None,
        sequence=None,
        keep=(),
        memory=None,
    )
    return Run(own, workload=workload, stages=("sensitivity",), progress=progress)


def verify_on_proxy(
    proxy: "Run", plans: Sequence[Plan], *, name: str, model: ModelSpec
) -> Verification:
    """Prove or refute a model's plans, best first, by training its proxy with what they are there.

    The verification is of the model's plan, with both models in it, and the user's `name` of the
    proxy. Writes plan.json and verification.json of the proxy to its own folder.
    """
    folder = proxy.settings.out
    carried: dict[str, tuple[Plan, Plan]] = {}  # those that are one there: the best of them
    for plan in plans:
        small = carry_plan(plan, proxy.spec, proxy.sensitivity)
        carried.setdefault(small.digest, (plan, small))
    smalls = [small for _, small in carried.values()]
    found = train_plans(proxy, smalls, spec=proxy.spec, sensitivity=proxy.sensitivity)
    plan, small = carried[found.plan]
    certified = small.model_copy(update={"certificate": Certificate.of(found)})
    if is_first():
        certified.save(folder / "plan.json")
        found.save(folder / "verification.json")
    facts = Proxy(
        name=name,
        structure=proxy.spec.structure,
        parameters=proxy.spec.numel,
        model_structure=model.structure,
        model_parameters=model.numel,
        plan=small.digest,
        grad_error=small.grad_error or 0.0,
        model_grad_error=plan.grad_error,
    )
    of_model = {small.options: plan.options for plan, small in carried.values()}
    return _of_model(found, plan, facts, of_model)


def _of_model(
    found: Verification,
    plan: Plan,
    facts: Proxy,
    of_model: Mapping[tuple[Option, ...], tuple[Option, ...]],  # the proxy's -> the model's
) -> Verification:
    """Return the proxy's verification as that of the model's plan."""
    verdict = found.verdict
    notes = tuple(f"on the proxy, {note}" for note in found.notes)  # its layers, its counts
    if not facts.shows_enough and verdict is Verdict.VERIFIED:
        # what was tried is milder than what is claimed: no proof of it
        verdict = Verdict.INCONCLUSIVE
        said = TOO_MILD.format(shown=facts.grad_error, claimed=facts.model_grad_error)
        notes = (said, *notes)
    expected = found.expected_gap
    if expected and facts.grad_error and facts.model_grad_error is not None:
        expected = expected.times(facts.model_grad_error / facts.grad_error)
    return found.model_copy(
        update={
            "plan": plan.digest,
            "verdict": verdict,
            "expected_gap": expected,
            "refuted_plans": tuple(of_model[options] for options in found.refuted_plans),
            "notes": notes,
            "proxy": facts,
        }
    )
