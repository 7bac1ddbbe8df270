import csv
import io
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprec.records import BF16_O2, FP32, LayerKind, Precision
from autoprec.report import layer_rows, layers_frame
from autoprec.report.folding import fold_rows, total_row, unfolded_rows
from autoprec.report.table import table_totals
from tests.golden_text import check_golden
from tests.report_runs import CPU, H100, ROWWISE, TENSORWISE, make_run, renamed, total_ms


def test_rows_are_the_layers_in_model_order() -> None:
    run = make_run()
    assert run.profile
    assert run.profile.model.names == tuple(row.name for row in layer_rows(run))


def test_parts_of_a_row_add_up_to_its_total() -> None:
    for row in layer_rows(make_run()):
        for times in (row.chosen, row.bf16_o2, row.fp32):
            assert times
            assert times.other_ms is not None
            assert times.total_ms == pytest.approx(times.parts_ms + times.other_ms)


def test_row_savings_add_up_to_the_totals() -> None:
    rows = layer_rows(make_run())
    totals = table_totals(rows)
    assert totals.saved_vs_bf16_o2_ms == pytest.approx(totals.bf16_o2_ms - totals.chosen_ms)
    assert totals.saved_vs_fp32_ms == pytest.approx(totals.fp32_ms - totals.chosen_ms)
    assert totals.saved_vs_bf16_o2_ms == pytest.approx(
        sum(row.saved_vs_bf16_o2_ms or 0.0 for row in rows)
    )
    assert totals.untimed == 0


def test_chosen_times_are_those_of_the_plan_s_option() -> None:
    run = make_run()
    assert run.plan
    assert run.profile
    for row, layer in zip(layer_rows(run), run.plan.layers, strict=True):
        assert row.chosen
        assert row.chosen.total_ms == total_ms(run.profile, layer.name, layer.option)
        assert row.bf16_o2
        assert row.bf16_o2.total_ms == total_ms(run.profile, layer.name, BF16_O2)


def test_shares_of_the_gradient_error_add_up_to_one() -> None:
    shares = [row.grad_error_share for row in layer_rows(make_run())]
    assert sum(share for share in shares if share is not None) == pytest.approx(1.0)


def test_an_fp32_layer_has_no_gradient_error_by_definition() -> None:
    run = make_run()
    assert run.plan
    first = run.plan.layers[0].model_copy(update={"precision": Precision.FP32, "recipe": None})
    plan = run.plan.model_copy(update={"layers": (first, *run.plan.layers[1:])})
    row = layer_rows(replace(run, plan=plan))[0]
    assert row.option == FP32
    assert row.grad_error
    assert row.grad_error.mean == 0.0


def test_without_a_profile_the_plan_s_own_times_are_used() -> None:
    run = make_run()
    assert run.plan
    rows = layer_rows(replace(run, profile=None, sensitivity=None))
    assert rows[2].name == "blocks.0.qkv"
    assert rows[2].chosen
    assert rows[2].chosen.total_ms == run.plan.layers[2].layer_ms
    assert rows[2].chosen.other_ms is None
    assert rows[2].fp32 is None
    assert rows[2].kind is LayerKind.LINEAR


def test_without_a_plan_nothing_is_chosen() -> None:
    rows = layer_rows(replace(make_run(), plan=None))
    assert all(row.option is None and row.chosen is None for row in rows)
    assert table_totals(rows).chosen_ms == 0.0
    assert table_totals(rows).bf16_o2_ms > 0.0


def test_best_fp8_is_the_fastest_recipe_that_ran() -> None:
    row = next(row for row in layer_rows(make_run(machine=H100)) if row.name == "head")
    assert row.best_fp8
    assert row.best_fp8.option == TENSORWISE


def test_an_option_that_cannot_run_has_no_times_but_a_reason() -> None:
    run = make_run()
    assert run.profile
    broken = tuple(
        row.model_copy(update={"total": None, "infeasible": "compile failed"})
        if row.option == ROWWISE
        else row
        for row in run.profile.layers
    )
    profile = run.profile.model_copy(update={"layers": broken})
    head = next(r for r in layer_rows(replace(run, profile=profile)) if r.name == "head")
    rowwise = next(option for option in head.options if option.option == ROWWISE)
    assert rowwise.times is None
    assert rowwise.timing
    assert rowwise.timing.infeasible == "compile failed"


def test_layers_csv_is_what_a_person_looked_at() -> None:
    check_golden("layers.csv", layers_frame(make_run()).to_csv(index=False, float_format="%.6g"))


def test_layers_csv_columns_add_up() -> None:
    frame = layers_frame(make_run(blocks=3))
    parts = ("output", "grad_input", "grad_weight", "cast", "other")
    for prefix in ("", "bf16_o2_", "fp32_"):
        total = (
            frame[[f"{prefix}{part}_ms" for part in parts]].fillna(0.0).astype(float).sum(axis=1)
        )
        assert total.tolist() == pytest.approx(frame[f"{prefix}total_ms"].tolist())
    saved = frame["bf16_o2_total_ms"].sum() - frame["total_ms"].sum()
    assert frame["saved_vs_bf16_o2_ms"].sum() == pytest.approx(saved)
    names = ("parameter", "gradient", "optimizer", "activation")
    memory = sum(frame[f"{name}_bytes"].sum() for name in names)
    assert memory == frame["memory_bytes"].sum()


def test_layers_csv_keeps_odd_names_exactly() -> None:
    name = 'a,"b"\nc'
    text = layers_frame(renamed(make_run(), {"head": name})).to_csv(index=False)
    assert name in [row["name"] for row in csv.DictReader(io.StringIO(text))]


def test_layers_csv_of_a_plan_alone_has_the_same_columns() -> None:
    run = make_run()
    alone = layers_frame(replace(run, profile=None, sensitivity=None, search=None))
    assert list(layers_frame(run).columns) == list(alone.columns)
    assert len(alone) == len(layers_frame(run))


def test_folding_keeps_every_layer_and_every_total() -> None:
    rows = layer_rows(make_run(blocks=12))
    folded = fold_rows(rows)
    assert sorted(r.name for row in folded for r in row.rows) == sorted(r.name for r in rows)
    assert len(folded) < len(rows) / 4
    assert sum(row.chosen_ms or 0.0 for row in folded) == pytest.approx(total_row(rows).chosen_ms)
    assert sum(row.grad_error.mean for row in folded if row.grad_error) == pytest.approx(
        table_totals(rows).grad_error
    )


def test_rows_with_another_answer_are_not_folded() -> None:
    names = [row.name for row in fold_rows(layer_rows(make_run(blocks=12)))]
    assert "blocks.0.qkv" in names
    assert "blocks.{1-11}.qkv (x11)" in names
    assert "blocks.{0-11}.fc1 (x12)" in names


def test_a_folded_name_that_covers_too_much_says_so() -> None:
    run = renamed(make_run(blocks=2), {"blocks.0.fc1": "e.0.1.fc", "blocks.1.fc1": "e.1.0.fc"})
    names = [row.name for row in fold_rows(layer_rows(run))]
    assert "e.{0-1}.{0-1}.fc (2 of 4)" in names


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12, unique=True))
def test_ranges_name_exactly_the_numbers(numbers: list[int]) -> None:
    rows = layer_rows(make_run(blocks=1, machine=CPU, M=64, width=32))
    fc1 = next(row for row in rows if row.name == "blocks.0.fc1")
    (folded,) = fold_rows([replace(fc1, name=f"blocks.{number}.fc1") for number in numbers])
    if len(numbers) == 1:
        assert folded.name == f"blocks.{numbers[0]}.fc1"
        return
    inside = folded.name[folded.name.index("{") + 1 : folded.name.index("}")]
    covered: set[int] = set()
    for part in inside.split(","):
        low, _, high = part.partition("-")
        covered |= set(range(int(low), int(high or low) + 1))
    assert covered == set(numbers)


def test_unfolded_rows_are_the_rows() -> None:
    rows = layer_rows(make_run())
    assert [row.name for row in unfolded_rows(rows)] == [row.name for row in rows]
