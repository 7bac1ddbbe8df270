import itertools
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from autoprec.errors import InfeasibleError, RecordError
from autoprec.records import (
    BF16_O2,
    FP32,
    Basis,
    Constraint,
    Estimate,
    Option,
    Profile,
    Search,
    Sensitivity,
    StepError,
)
from autoprec.search import grad_error_budget, search_plan
from autoprec.search.costs import Costs, make_costs
from autoprec.search.explore import find_interacting
from autoprec.search.stage import _apart
from autoprec.search.storage import check_storage, open_study, storage_in
from autoprec.sensitivity.gap import CEILING, HORIZON_STEPS, grad_error_budget_for
from autoprec.verification import Terms
from tests.search_tables import ROWWISE, TENSORWISE, TYPICAL, Row, opened, tables_of

Options = tuple[Option, ...]
BUDGET = 4e-3

# e falls from layer to layer, as in a trained transformer
LAYERS: dict[str, Row] = {
    f"blocks.{i}.{part}": {o: (ms, grad_error / (1 + i)) for o, (ms, grad_error) in TYPICAL.items()}
    for i in range(4)
    for part in ("qkv", "fc")
}


class Meter:
    """Stands for the joint measurement: the table's sum, times what a test plants."""

    def __init__(self, costs: Costs, factor: Callable[[Options], float] = lambda _: 1.0) -> None:
        self.costs = costs
        self.factor = factor
        self.asked: list[Options] = []

    def __call__(self, options: Options, batches: int = 2) -> Estimate:
        self.asked.append(options)
        return Estimate(mean=self.costs.grad_error(options) * self.factor(options))


def run(
    tables: tuple[Profile, Sensitivity],
    *,
    evaluate: Callable[[Options, int], Estimate] | None = None,
    budget: float | None = BUDGET,
    keep: tuple[str, ...] = (),
    trials: int = 2,
    time_budget_s: float | None = None,
    seed: int = 0,
    storage: str | None = None,
    clock: Callable[[], float] = lambda: 0.0,
    memory_bytes: int | None = None,
) -> Search:
    return search_plan(
        *tables,
        constraint=Constraint(
            loss_tolerance=1e-3, grad_error_budget=budget, keep=keep, memory_bytes=memory_bytes
        ),
        evaluate=evaluate,
        trials=trials,
        time_budget_s=time_budget_s,
        seed=seed,
        storage=storage,
        clock=clock,
    )


@pytest.fixture(autouse=True)
def short_front(monkeypatch: pytest.MonkeyPatch) -> None:
    """Solve for few points of the front, which test_search_problem.py has against brute force."""
    monkeypatch.setattr("autoprec.search.solver.FRONT_POINTS", 2)


@pytest.fixture
def tables() -> tuple[Profile, Sensitivity]:
    return tables_of(LAYERS, activation_error=1e-5)


def wobble(options: Options) -> float:
    """Joint e within 10 % of the sum, the same for the same plan."""
    codes = [option.key for option in options]
    return 1.0 + 0.1 * math.sin(sum((i + 1) * len(code) for i, code in enumerate(codes)))


# --- what is chosen -----------------------------------------------------------------------------


def test_the_chosen_plan_is_the_soonest_to_the_loss_within_the_budget(
    tables: tuple[Profile, Sensitivity],
) -> None:
    meter = Meter(make_costs(*tables), wobble)
    search = run(tables, evaluate=meter)
    assert search.chosen.grad_error_measured is not None
    assert search.chosen.grad_error_measured <= BUDGET
    counted_ms = meter.costs.counted_ms(search.chosen.options)
    chosen_ms = counted_ms * (1 + search.chosen.grad_error_measured)
    feasible = [trial.time_to_loss_ms for trial in search.trials if trial.feasible]
    assert chosen_ms == pytest.approx(min(feasible))
    assert search.exact.grad_error <= BUDGET
    assert search.bound_ms <= search.exact.step_ms * (1 + 1e-9)
    assert Search.from_json(search.to_json()) == search


def test_the_same_tables_and_seed_give_the_same_search(
    tables: tuple[Profile, Sensitivity],
) -> None:
    costs = make_costs(*tables)
    one, two = (run(tables, evaluate=Meter(costs, wobble), seed=3) for _ in range(2))
    assert one == two


def test_without_a_workload_the_table_stands_for_the_whole_plan(
    tables: tuple[Profile, Sensitivity],
) -> None:
    search = run(tables)
    assert search.chosen.grad_error_measured is None
    assert search.chosen == search.exact
    assert "the model was not run" in search.notes[0]
    assert {t.grad_error_basis for t in search.trials if t.options != (FP32,) * 8} == {
        Basis.PREDICTED
    }
    assert search.step_equivalents == 0.0


def test_a_lower_joint_e_than_the_sum_lets_the_search_go_beyond_the_exact_plan(
    tables: tuple[Profile, Sensitivity],
) -> None:
    search = run(tables, evaluate=Meter(make_costs(*tables), lambda _: 0.7), budget=2e-3)
    assert search.chosen.step_ms < search.exact.step_ms
    assert search.chosen.grad_error > 2e-3 >= (search.chosen.grad_error_measured or 1.0)


def test_a_higher_joint_e_than_the_sum_moves_the_choice_down_the_front(
    tables: tuple[Profile, Sensitivity],
) -> None:
    search = run(tables, evaluate=Meter(make_costs(*tables), lambda _: 1.2), budget=2e-3)
    assert search.exact.grad_error_measured is not None
    assert search.exact.grad_error_measured > 2e-3
    assert (search.chosen.grad_error_measured or 1.0) <= 2e-3
    assert any(option.is_fp8 for option in search.chosen.options)


def test_fp32_is_the_plan_where_nothing_faster_keeps_the_budget(
    tables: tuple[Profile, Sensitivity],
) -> None:
    search = run(tables, evaluate=Meter(make_costs(*tables)), budget=1e-6)
    assert search.chosen.options == (FP32,) * 8
    assert (search.chosen.grad_error, search.chosen.grad_error_measured) == (0.0, 0.0)
    assert search.ranked == ()


def test_ranked_plans_have_clearly_less_e_and_end_with_the_safe_ones(
    tables: tuple[Profile, Sensitivity],
) -> None:
    search = run(tables, evaluate=Meter(make_costs(*tables)))
    bf16, fp32 = search.ranked[-2:]
    assert bf16.options == (BF16_O2,) * 8
    assert fp32.options == (FP32,) * 8
    es = [point.grad_error for point in (search.chosen, *search.ranked)]
    assert es == sorted(es, reverse=True)
    assert all(after <= 0.7 * before for before, after in itertools.pairwise(es[:-2]))


def test_kept_layers_stay_as_they_were_asked_for(tables: tuple[Profile, Sensitivity]) -> None:
    keep = ("blocks.0.*=bf16_o2", "blocks.3.fc=fp8_o1:rowwise")
    search = run(tables, evaluate=Meter(make_costs(*tables), wobble), keep=keep)
    for options in [search.chosen.options, *(trial.options for trial in search.trials)]:
        assert options[:2] == (BF16_O2, BF16_O2)
        assert options[7] == ROWWISE


def test_keeps_that_no_budget_allows_are_an_error(tables: tuple[Profile, Sensitivity]) -> None:
    with pytest.raises(InfeasibleError, match=r"at most 0.0010 %.* has 0.1.* or drop a --keep$"):
        run(tables, budget=1e-5, keep=("blocks.0.qkv=fp8_o1:tensorwise",))
    meter = Meter(make_costs(*tables), lambda _: 1e3)
    with pytest.raises(InfeasibleError, match=r"the least of the \d+ plans measured is"):
        run(tables, evaluate=meter, keep=("blocks.0.qkv=fp8_o1:tensorwise",))


def test_an_error_just_over_the_budget_is_told_from_it() -> None:
    assert _apart(0.0038, 0.00381) == ["0.380 %", "0.381 %"]
    assert _apart(1e-5, 0.1) == ["0.0010 %", "10 %"]


def test_a_memory_limit_holds_for_every_plan_that_may_be_chosen(
    tables: tuple[Profile, Sensitivity],
) -> None:
    meter = Meter(make_costs(*tables), wobble)
    search = run(tables, evaluate=meter, memory_bytes=20_000, trials=8)
    assert all(meter.costs.memory_bytes(plan) <= 20_000 for plan in meter.asked)
    assert all((p.memory_bytes or 0) <= 20_000 for p in (search.chosen, *search.ranked))
    assert search.ranked[-1].options != (FP32,) * 8  # 32 kB
    with pytest.raises(InfeasibleError, match=r"raise --loss-tolerance or raise --memory$"):
        run(tables, budget=1e-5, memory_bytes=20_000)


# --- the budget ---------------------------------------------------------------------------------


def test_the_budget_follows_from_the_tolerance_unless_given(
    tables: tuple[Profile, Sensitivity],
) -> None:
    sensitivity = tables[1]
    asked = Constraint(loss_tolerance=1e-3, grad_error_budget=None)
    assert grad_error_budget(sensitivity, asked) == grad_error_budget_for(
        sensitivity, 1e-3, HORIZON_STEPS
    )
    given = asked.model_copy(update={"grad_error_budget": 0.2})
    assert grad_error_budget(sensitivity, given) == 0.2
    longer = asked.model_copy(update={"run_steps": 2000})
    assert grad_error_budget(sensitivity, longer) < grad_error_budget(sensitivity, asked)
    assert run(tables, budget=None).grad_error_budget == grad_error_budget(sensitivity, asked)


def test_no_tolerance_allows_an_error_above_the_ceiling(
    tables: tuple[Profile, Sensitivity],
) -> None:
    profile, sensitivity = tables
    search = run(tables, budget=5.0)
    assert search.grad_error_budget == CEILING
    assert any("2505.19115" in note for note in search.notes)
    assert not any("2505.19115" in note for note in run(tables, budget=0.2).notes)
    # at its largest: an error that halved since counts as it was
    points = (StepError(step=s, grad_error=Estimate(mean=e)) for s, e in ((10, 0.02), (50, 0.01)))
    halved = sensitivity.model_copy(update={"by_step": tuple(points)})
    assert run((profile, halved), budget=5.0).grad_error_budget == CEILING / 2


def test_what_errors_early_in_the_run_take_from_the_budget_is_said(
    tables: tuple[Profile, Sensitivity],
) -> None:
    profile, sensitivity = tables
    for early, said in (
        (0.08, ["the budget is divided by 8.0 for errors early in the run: FP8's was 8.0 % after "
                "10 steps, and 1.0 % after 50"]),
        (0.02, []),
    ):  # fmt: skip
        points = (
            StepError(step=s, grad_error=Estimate(mean=e)) for s, e in ((10, early), (50, 0.01))
        )
        found = sensitivity.model_copy(update={"by_step": tuple(points)})
        notes = run((profile, found), budget=None).notes
        assert [note for note in notes if note.startswith("the budget is")] == said


def test_the_horizon_is_what_verification_trains() -> None:
    assert Terms().warmup_steps + Terms().branch_steps == HORIZON_STEPS


# --- measurements are not repeated --------------------------------------------------------------


def test_no_plan_is_measured_twice(tables: tuple[Profile, Sensitivity], tmp_path: Path) -> None:
    meter = Meter(make_costs(*tables), wobble)
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    first = run(tables, evaluate=meter, storage=storage)
    assert len(set(meter.asked)) == len(meter.asked)
    assert (FP32,) * 8 not in meter.asked  # it is the reference
    again = run(tables, evaluate=meter, storage=storage)
    assert len(set(meter.asked)) == len(meter.asked)
    assert again.chosen == first.chosen
    assert again.trials == first.trials
    assert again.duplicates_skipped == first.duplicates_skipped


def test_a_search_killed_half_way_goes_on_where_it_was(
    tables: tuple[Profile, Sensitivity], tmp_path: Path
) -> None:
    meter = Meter(make_costs(*tables), wobble)
    storage = f"sqlite:///{tmp_path / 'study.db'}"

    def killed_at_second(options: Options, batches: int) -> Estimate:
        if len(meter.asked) == 2:
            raise KeyboardInterrupt
        return meter(options)

    with pytest.raises(KeyboardInterrupt):
        run(tables, evaluate=killed_at_second, storage=storage, trials=2)
    before = list(meter.asked)
    search = run(tables, evaluate=meter, storage=storage, trials=2)
    assert meter.asked[:2] == before
    assert len(set(meter.asked)) == len(meter.asked)
    assert search.chosen == run(tables, evaluate=Meter(meter.costs, wobble), trials=2).chosen


def test_a_study_of_other_tables_is_left_alone(
    tables: tuple[Profile, Sensitivity], tmp_path: Path
) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    meter = Meter(make_costs(*tables), wobble)
    run(tables, evaluate=meter, storage=storage, trials=1)
    count = len(meter.asked)
    other = tables_of(LAYERS, activation_error=2e-5)
    search = run(other, evaluate=meter, storage=storage, trials=1)
    assert len(meter.asked) > count
    assert search == run(other, evaluate=Meter(meter.costs, wobble), trials=1)
    with opened(storage) as database:
        names = optuna.get_all_study_names(database)
    assert len(names) == 2
    assert names[0] == "autoprec"
    assert names[1].startswith("autoprec-")


def test_the_time_budget_ends_the_search_after_the_plan_at_hand(
    tables: tuple[Profile, Sensitivity],
) -> None:
    now = 0.0
    meter = Meter(make_costs(*tables))

    def slow(options: Options, batches: int) -> Estimate:
        nonlocal now
        now += 60.0
        return meter(options)

    search = run(tables, evaluate=slow, time_budget_s=30.0, clock=lambda: now)
    assert len(meter.asked) == 1
    assert search.chosen.options == search.exact.options


def test_no_trials_still_measure_the_seeds(tables: tuple[Profile, Sensitivity]) -> None:
    meter = Meter(make_costs(*tables))
    search = run(tables, evaluate=meter, trials=0)
    assert {trial.source for trial in search.trials} == {"exact", "uniform"}


# --- repair -------------------------------------------------------------------------------------


def test_a_planted_pair_is_found_and_kept_out_of_fp8(
    tables: tuple[Profile, Sensitivity],
) -> None:
    def clash(options: Options) -> float:  # layers 3 and 6 in FP8 together do harm
        return 5.0 if options[3].is_fp8 and options[6].is_fp8 else 1.0

    meter = Meter(make_costs(*tables), clash)
    search = run(tables, evaluate=meter, budget=1e-2, trials=8)
    names = list(LAYERS)
    assert len(search.interacting) == 1
    assert search.interacting[0] in (names[3], names[6])
    assert search.chosen.options.count(TENSORWISE) == 7
    assert not search.chosen.options[names.index(search.interacting[0])].is_fp8
    assert f"bisection found {search.interacting[0]} interacting" in search.notes[0]
    assert len(meter.asked) <= 8 + 2  # the exact plan and uniform BF16
    few = run(tables, evaluate=Meter(meter.costs, clash), budget=1e-2, trials=2)
    assert few.interacting == ()  # too few to look for them


def test_an_excess_spread_over_all_layers_blames_none(
    tables: tuple[Profile, Sensitivity],
) -> None:
    def more_than_half(options: Options) -> float:
        return 1.0 + 0.5 * sum(option.is_fp8 for option in options)

    search = run(tables, evaluate=Meter(make_costs(*tables), more_than_half), trials=6)
    assert (search.chosen.grad_error_measured or 1.0) <= BUDGET


@pytest.mark.parametrize("culprit", range(13))
def test_bisection_finds_a_single_culprit(culprit: int) -> None:
    asked: list[tuple[int, ...]] = []

    def excess_without(suspects: "tuple[int, ...]") -> float:
        asked.append(tuple(suspects))
        return 0.1 if culprit in suspects else 1.0

    assert find_interacting(range(13), 1.0, excess_without, 8) == (culprit,)  # type: ignore[arg-type] # wider
    assert len(asked) <= 8


def test_bisection_blames_no_one_for_what_all_do() -> None:
    assert find_interacting(range(16), 1.6, lambda half: 1.6 - 0.1 * len(half) * 0.9, 8) == ()


# --- manners ------------------------------------------------------------------------------------


def test_optuna_stays_silent_and_gets_its_settings_back(
    tables: tuple[Profile, Sensitivity], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    optuna.logging.set_verbosity(optuna.logging.INFO)
    root = (logging.getLogger().level, list(logging.getLogger().handlers))
    try:
        run(tables, storage=f"sqlite:///{tmp_path / 'study.db'}", trials=1)
        assert optuna.logging.get_verbosity() == optuna.logging.INFO
    finally:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
    assert (logging.getLogger().level, list(logging.getLogger().handlers)) == root
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("storage", "match"),
    [
        ("sqlite:////no/such/folder/study.db", "unable to open database file"),
        ("nonsense", "Could not parse"),
        ("mysql://host/db", "Failed to import DB access module"),
    ],
)
def test_a_storage_that_cannot_be_opened_is_one_clear_line(storage: str, match: str) -> None:
    with pytest.raises(RecordError, match=match) as caught, open_study(storage, "one", tables=""):
        pass
    assert "\n" not in str(caught.value)
    assert "--storage must be a database URL" in str(caught.value)


@pytest.mark.parametrize("name", ["a{b}", "a%20b", "a?b#c", "a b", "a\udcff"], ids=ascii)
def test_a_folder_of_any_name_has_its_own_study(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    with open_study(storage_in(tmp_path / name), "one", tables=""):
        pass
    check_storage(storage_in(tmp_path / name))
    assert [path.name for path in (tmp_path / name).iterdir()] == ["study.db"]


def test_a_study_that_may_not_be_written_is_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_study(storage_in(tmp_path), "one", tables=""):
        pass
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(RecordError, match=r"--storage must .*\(it may not be written\)"):
        check_storage(storage_in(tmp_path))


def test_a_storage_file_that_is_no_database_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_text("not a database " * 100)
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    with (
        pytest.raises(RecordError, match="file is not a database"),
        open_study(storage, "one", tables=""),
    ):
        pass


def test_the_study_is_an_ordinary_optuna_study(
    tables: tuple[Profile, Sensitivity], tmp_path: Path
) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    meter = Meter(make_costs(*tables), wobble)
    search = run(tables, evaluate=meter, storage=storage, trials=2)
    with opened(storage) as database:
        study = optuna.load_study(study_name="autoprec", storage=database)
        assert len(study.directions) == 3
        assert study.metric_names == ["step time, ms", "gradient error", "bytes"]
        trials, best = study.trials, study.best_trials
    feasible = [t for t in trials if t.values and max(t.constraints.values()) <= 0.0]
    assert min(t.values[0] * (1.0 + t.values[1]) for t in feasible) == min(
        t.time_to_loss_ms for t in search.trials if t.feasible
    )
    # the unnamed list, by which optuna-dashboard tells infeasible trials
    assert all(t.constraints["0"] == t.constraints["grad_error"] for t in feasible)
    measured = {point.grad_error_measured for point in search.measured_front}
    assert {trial.values[1] for trial in best} <= measured
