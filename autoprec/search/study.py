"""The Optuna study: seeds from the exact front, then sampled plans, each judged as a whole.

Every finished trial keeps its plan, e and basis with it, so that a study that goes on (after a
kill, or beside other workers) measures no plan twice. `trials` counts the sampled plans that were
worth a measurement; those that the table shows cannot win are many, cost nothing, and are in the
study only.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypedDict

from autoprec.records import Basis, SearchTrial
from autoprec.search.judge import Judge, Judgement
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
    """One study in progress: proposes plans to the judge, and writes down what came out."""

    def __init__(self, study: "optuna.Study", space: Space, judge: Judge, *, seed: int = 0) -> None:
        self.study = study
        self.seed = seed
        self.space = space
        self.judge = judge
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

    def try_base(self, base: int, *, source: str) -> Judgement:
        """Measure a base plan as a trial, unless its e is known already."""
        options = self.space.bases[base]
        if options in self.judge.known:
            return self.judge.known[options]
        self.study.enqueue_trial(self.space.params(base), user_attrs={SOURCE: source})
        self._ask(self.judge.measure)
        return self.judge.measure(options)  # known by now, unless a killed run left another first

    def try_plan(self, options: Options, *, source: str) -> Judgement:
        """Measure a plan that the decisions cannot express, and add it to the study."""
        import optuna

        if options in self.judge.known:
            return self.judge.known[options]
        judged = self.judge.measure(options)
        self.study.add_trial(
            optuna.trial.create_trial(
                value=judged.time_to_loss_ms,
                user_attrs={NOTE: self._note(judged, source, is_duplicate=False)},
                constraints={"grad_error": self._excess(judged)},
            )
        )
        self._take_up()
        return judged

    def sample(
        self, trials: int, *, is_over: Callable[[], bool], told: Callable[[int], None]
    ) -> None:
        """Let the sampler propose plans until `trials` of them were measured."""
        asks = trials if self.judge.evaluate is None else ASKS_PER_TRIAL * trials
        while not is_over():
            done = self._sampled
            told(done)
            if done >= trials or self._asked >= asks:
                break
            self.study.sampler = self._sampler()
            self._ask(self.judge.judge)

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

    def _ask(self, judge: Callable[[Options], Judgement]) -> None:
        """Judge one proposal and write it down; a trial that is broken off is marked as failed."""
        from optuna.trial import TrialState

        trial = self.study.ask(self._distributions)
        try:
            options = self.space.decode(trial.params)
            source = str(trial.user_attrs.get(SOURCE, SAMPLER))
            before = len(self.judge.known)
            judged = judge(options)
            is_duplicate = options in self._seen and len(self.judge.known) == before
            trial.set_constraint("grad_error", self._excess(judged))
            trial.set_user_attr(NOTE, self._note(judged, source, is_duplicate=is_duplicate))
        except BaseException:
            self.study.tell(trial, state=TrialState.FAIL)
            raise
        self.study.tell(trial, judged.time_to_loss_ms)
        self._take_up()

    def _write_down(
        self, number: int, judged: Judgement, source: str, *, is_duplicate: bool
    ) -> None:
        self._asked += source == SAMPLER
        self.duplicates += is_duplicate
        self._seen.add(judged.options)
        if is_duplicate or not judged.is_final:
            return
        self.trials.append(
            SearchTrial(
                number=number,
                source=source,
                options=judged.options,
                step_ms=judged.step_ms,
                grad_error=judged.grad_error,
                grad_error_basis=judged.basis,
                time_to_loss_ms=judged.time_to_loss_ms,
                feasible=judged.is_feasible,
            )
        )

    def _excess(self, judged: Judgement) -> float:
        """Return the constraint's value: e over the budget, relative; at most 0 is feasible."""
        return (
            judged.grad_error / self.judge.budget - 1.0
            if self.judge.budget > 0.0
            else judged.grad_error
        )

    def _note(self, judged: Judgement, source: str, *, is_duplicate: bool) -> _Note:
        codes = {option: chr(FIRST_CODE + code) for code, option in enumerate(self._alphabet)}
        return _Note(
            plan="".join(codes[option] for option in judged.options),
            grad_error=judged.grad_error,
            basis=judged.basis.value,
            source=source,
            is_final=judged.is_final,
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
            judged = (
                self.judge.remember(options, note["grad_error"], basis)
                if note["is_final"]
                else self.judge.told(options)
            )
            self._write_down(
                trial.number, judged, note["source"], is_duplicate=note["is_duplicate"]
            )


def _distributions(space: Space) -> "dict[str, BaseDistribution]":
    from optuna.distributions import CategoricalDistribution, IntDistribution

    base: Any = IntDistribution(0, len(space.bases) - 1)  # Any: a dict of two kinds
    return {
        "base": base,
        **{name: CategoricalDistribution(values) for name, values in space.choices().items()},
    }
