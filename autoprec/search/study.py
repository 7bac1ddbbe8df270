"""The Optuna study: seeds from the exact front, then sampled plans, each evaluated as a whole.

Every finished trial keeps its plan, gradient error and basis with it, so that a study that goes on
(after a kill, or beside other workers) measures no plan twice. `trials` counts the sampled plans
that were worth a measurement; those that the table shows cannot win are many, cost nothing, and are
in the study only.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict

from autoprec.records import Basis, SearchTrial
from autoprec.search.evaluator import EvaluatedPlan, PlanEvaluator
from autoprec.search.problem import Options
from autoprec.search.space import Space

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

NOTE = "autoprec"  # the trial's user attribute that holds a `_Note`
SOURCE = "source"
SAMPLER = "sampler"
STARTUP_TRIALS = 4  # before TPE stops drawing at random; the seeds come first and count
ASKS_PER_TRIAL = 3  # asked at most for one that is worth a measurement
FIRST_CODE = 48  # "0"; each option is one character in a note


class _Note(TypedDict):
    plan: str
    grad_error: float
    basis: str
    source: str
    is_final: bool
    is_duplicate: bool


class StudyLog:
    """One study in progress: has plans evaluated, and writes down what came out."""

    def __init__(
        self, study: "optuna.Study", space: Space, evaluator: PlanEvaluator, *, seed: int = 0
    ) -> None:
        self.study = study
        self.seed = seed
        self.space = space
        self.evaluator = evaluator
        self.duplicates = 0
        self.trials: list[SearchTrial] = []
        self._seen: set[Options] = set()
        self._asked = 0  # of the sampler, in earlier runs of the study too
        self._alive = 0  # trials finished or under way, here or elsewhere
        self._taken_up: set[int] = set()  # the numbers of the trials that were
        keys = {option for prices in space.problem.costs.prices for option in prices}
        self._alphabet = sorted(keys, key=lambda option: option.key)
        self._distributions = _distributions(space)
        self._take_up()

    def try_base(self, base: int, *, source: str) -> EvaluatedPlan:
        """Evaluate a base plan as a trial, unless it is known already."""
        options = self.space.bases[base]
        if options in self.evaluator.known:
            return self.evaluator.known[options]
        self.study.enqueue_trial(self.space.params(base), user_attrs={SOURCE: source})
        self._ask(self.evaluator.evaluate)
        return self.evaluator.evaluate(
            options
        )  # known by now, unless a killed run left another first

    def try_plan(self, options: Options, *, source: str) -> EvaluatedPlan:
        """Measure a plan that the decisions cannot express, and add it to the study."""
        import optuna

        if options in self.evaluator.known:
            return self.evaluator.known[options]
        evaluated = self.evaluator.evaluate(options)
        self.study.add_trial(
            optuna.trial.create_trial(
                value=evaluated.time_to_loss_ms,
                user_attrs={NOTE: self._note(evaluated, source, is_duplicate=False)},
                constraints={"grad_error": self._excess(evaluated)},
            )
        )
        self._take_up()
        return evaluated

    def sample(
        self, trials: int, *, is_over: Callable[[], bool], report: Callable[[int], None]
    ) -> None:
        """Let the sampler propose plans until `trials` of them were measured."""
        asks = trials if self.evaluator.measure is None else ASKS_PER_TRIAL * trials
        while not is_over():
            done = self._sampled
            report(done)
            if done >= trials or self._asked >= asks:
                break
            self.study.sampler = self._sampler()
            self._ask(self.evaluator.evaluate_promising)

    @property
    def _sampled(self) -> int:
        return sum(trial.source == SAMPLER for trial in self.trials)

    def _sampler(self) -> "optuna.samplers.BaseSampler":
        """Return a sampler whose draws follow from the seed and the trials so far.

        A study that goes on after a kill draws what it would have drawn; a worker beside another
        sees that one's trial at hand, and draws something else.
        """
        import optuna

        return optuna.samplers.TPESampler(
            seed=self.seed + self._alive,
            multivariate=True,
            group=True,
            n_startup_trials=STARTUP_TRIALS,
        )

    def _ask(self, evaluate: Callable[[Options], EvaluatedPlan]) -> None:
        """Evaluate one proposal and write it down; one that is broken off is marked as failed."""
        from optuna.trial import TrialState

        trial = self.study.ask(self._distributions)
        try:
            options = self.space.decode(trial.params)
            source = str(trial.user_attrs.get(SOURCE, SAMPLER))
            before = len(self.evaluator.known)
            evaluated = evaluate(options)
            is_duplicate = options in self._seen and len(self.evaluator.known) == before
            trial.set_constraint("grad_error", self._excess(evaluated))
            trial.set_user_attr(NOTE, self._note(evaluated, source, is_duplicate=is_duplicate))
        except BaseException:
            self.study.tell(trial, state=TrialState.FAIL)
            raise
        self.study.tell(trial, evaluated.time_to_loss_ms)
        self._take_up()

    def _write_down(
        self, number: int, evaluated: EvaluatedPlan, source: str, *, is_duplicate: bool
    ) -> None:
        self._asked += source == SAMPLER
        self.duplicates += is_duplicate
        self._seen.add(evaluated.options)
        if is_duplicate or not evaluated.is_final:
            return
        self.trials.append(
            SearchTrial(
                number=number,
                source=source,
                options=evaluated.options,
                step_ms=evaluated.step_ms,
                grad_error=evaluated.grad_error,
                grad_error_basis=evaluated.basis,
                time_to_loss_ms=evaluated.time_to_loss_ms,
                feasible=evaluated.is_feasible,
            )
        )

    def _excess(self, evaluated: EvaluatedPlan) -> float:
        """Return the constraint's value, feasible when <= 0: gradient error / budget - 1."""
        return (
            evaluated.grad_error / self.evaluator.budget - 1.0
            if self.evaluator.budget > 0.0
            else evaluated.grad_error
        )

    def _note(self, evaluated: EvaluatedPlan, source: str, *, is_duplicate: bool) -> _Note:
        codes = {option: chr(FIRST_CODE + code) for code, option in enumerate(self._alphabet)}
        return _Note(
            plan="".join(codes[option] for option in evaluated.options),
            grad_error=evaluated.grad_error,
            basis=evaluated.basis.value,
            source=source,
            is_final=evaluated.is_final,
            is_duplicate=is_duplicate,
        )

    def _take_up(self) -> None:
        """Take up what was finished since the last time: here, before, or by other workers."""
        from optuna.trial import TrialState

        trials = self.study.get_trials(deepcopy=False)
        self._alive = sum(t.state in (TrialState.COMPLETE, TrialState.RUNNING) for t in trials)
        for trial in trials:
            note: _Note | None = trial.user_attrs.get(NOTE)
            is_new = trial.number not in self._taken_up and trial.state.is_finished()
            if note is None or not is_new:
                continue
            self._taken_up.add(trial.number)
            options = tuple(self._alphabet[ord(code) - FIRST_CODE] for code in note["plan"])
            basis = Basis(note["basis"])
            evaluated = (
                self.evaluator.add(options, note["grad_error"], basis)
                if note["is_final"]
                else self.evaluator.estimate(options)
            )
            self._write_down(
                trial.number, evaluated, note["source"], is_duplicate=note["is_duplicate"]
            )


def _distributions(space: Space) -> "dict[str, BaseDistribution]":
    from optuna.distributions import CategoricalDistribution, IntDistribution

    base: Any = IntDistribution(0, len(space.bases) - 1)  # Any: a dict of two kinds
    return {
        "base": base,
        **{name: CategoricalDistribution(values) for name, values in space.choices().items()},
    }
