import csv
import io
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprec.common.text import first_and_more
from autoprec.records import BF16_O2, Precision
from autoprec.report import RunRecords, layers_frame
from autoprec.report.layer_frame import PARTS, TIMES, Row, frame_rows, options_frame
from autoprec.report.layer_table import fold_layers, fold_names, total_row
from tests.examples import examples
from tests.golden_text import check_golden
from tests.report_runs import H100, ROWWISE, TENSORWISE, make_run, renamed, total_ms


def rows_of(run: RunRecords) -> list[Row]:
    return frame_rows(layers_frame(run))


def row_of(run: RunRecords, name: str) -> Row:
    return next(row for row in rows_of(run) if row["name"] == name)


def test_rows_are_the_layers_in_model_order() -> None:
    run = make_run()
    assert run.profile
    assert list(run.profile.model.names) == layers_frame(run)["name"].tolist()


def test_columns_have_the_type_of_their_unit() -> None:
    for run in (make_run(), replace(make_run(), profile=None), RunRecords()):
        types = layers_frame(run).dtypes
        assert {str(types[name]) for name in TIMES} == {"float64"}
        assert {str(types[name]) for name in ("calls", "samples", "memory_bytes")} == {"Int64"}
        assert str(types["is_frozen"]) == "boolean"


def test_parts_of_a_row_add_up_to_its_total() -> None:
    frame = layers_frame(make_run())
    for prefix in ("", "bf16_o2_", "fp32_"):
        parts = frame[[f"{prefix}{part}_ms" for part in (*PARTS, "other")]].sum(axis=1)
        assert parts.tolist() == pytest.approx(frame[f"{prefix}total_ms"].tolist())


def test_row_savings_add_up_to_the_totals() -> None:
    frame = layers_frame(make_run())
    total = total_row(frame)
    for label in ("bf16_o2", "fp32"):
        saved = total[f"{label}_total_ms"] - total["total_ms"]
        assert saved == pytest.approx(frame[f"saved_vs_{label}_ms"].sum())
        assert saved == pytest.approx(total[f"saved_vs_{label}_ms"])
        speedup = total[f"{label}_total_ms"] / total["total_ms"]
        assert speedup == pytest.approx(total[f"speedup_vs_{label}"])
    assert total["untimed"] == 0


def test_a_layer_without_a_time_is_in_no_speedup_and_said() -> None:
    run = make_run()
    assert run.profile
    names = ("head", "router")  # not called by the step
    timings = tuple(
        row.model_copy(update={"total": None}) if row.names[0] in names else row
        for row in run.profile.layers
    )
    profile = run.profile.model_copy(update={"layers": timings})
    total = total_row(layers_frame(replace(run, profile=profile)))
    others = [row for row in rows_of(run) if row["name"] not in names]
    assert total["untimed"] == 2
    assert total["total_ms"] == pytest.approx(sum(row["total_ms"] for row in others))
    expected = sum(row["fp32_total_ms"] for row in others) / total["total_ms"]
    assert total["speedup_vs_fp32"] == pytest.approx(expected)


def test_chosen_times_are_those_of_the_plan_s_option() -> None:
    run = make_run()
    assert run.plan
    assert run.profile
    for row, layer in zip(rows_of(run), run.plan.layers, strict=True):
        assert row["option"] == layer.option.key
        assert row["total_ms"] == total_ms(run.profile, layer.name, layer.option)
        assert row["bf16_o2_total_ms"] == total_ms(run.profile, layer.name, BF16_O2)


def test_shares_of_the_gradient_error_add_up_to_one() -> None:
    assert layers_frame(make_run())["grad_error_share"].sum() == pytest.approx(1.0)


def test_an_fp32_layer_has_no_gradient_error_by_definition() -> None:
    run = make_run()
    assert run.plan
    first = run.plan.layers[0].model_copy(update={"precision": Precision.FP32, "recipe": None})
    plan = run.plan.model_copy(update={"layers": (first, *run.plan.layers[1:])})
    row = rows_of(replace(run, plan=plan))[0]
    assert (row["option"], row["grad_error"]) == ("fp32", 0.0)


def test_without_a_profile_the_plan_s_own_times_are_used() -> None:
    run = make_run()
    assert run.plan
    row = row_of(replace(run, profile=None, sensitivity=None), "blocks.0.qkv")
    assert row["total_ms"] == run.plan.layers[2].layer_ms
    assert row["bf16_o2_total_ms"] == run.plan.layers[2].baseline_ms
    assert row["other_ms"] is row["fp32_total_ms"] is None
    assert row["grad_error"] == run.plan.layers[2].grad_error
    assert row["kind"] == "linear"


def test_without_a_plan_nothing_is_chosen() -> None:
    frame = layers_frame(replace(make_run(), plan=None))
    assert frame[["option", "total_ms", "grad_error"]].isna().all().all()
    assert total_row(frame)["total_ms"] is None
    assert total_row(frame)["bf16_o2_total_ms"] > 0.0


def test_best_fp8_is_the_fastest_recipe_that_ran() -> None:
    row = row_of(make_run(machine=H100), "head")
    assert row["best_fp8"] == TENSORWISE.key


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
    rows = frame_rows(options_frame(replace(run, profile=profile)))
    (row,) = [r for r in rows if (r["name"], r["option"]) == ("head", ROWWISE.key)]
    assert row["total_ms"] is None
    assert row["infeasible"] == "compile failed"


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
    frame = layers_frame(make_run(blocks=12))
    folded, total = fold_layers(frame), total_row(frame)
    assert folded["layers"].sum() == len(frame)
    assert len(folded) < len(frame) / 4
    for column in ("total_ms", "fp32_total_ms", "grad_error", "memory_bytes"):
        assert folded[column].sum() == pytest.approx(total[column])
        assert frame[column].sum() == pytest.approx(total[column])


def test_a_sum_is_measured_only_if_all_of_it_is() -> None:
    frame = layers_frame(make_run(blocks=3)).set_index("name", drop=False)
    frame.loc["blocks.1.fc1", "time_basis"] = "predicted"
    frame.loc["blocks.2.fc2", "grad_error_basis"] = "transferred"
    rows = {row["name"]: row for row in frame_rows(fold_layers(frame.reset_index(drop=True)))}
    shown = [(rows[f"blocks.{{0-2}}.{x} (x3)"], x) for x in ("fc1", "fc2", "proj")]
    assert {name: (row["time_basis"], row["grad_error_basis"]) for row, name in shown} == {
        "fc1": ("predicted", "measured"),
        "fc2": ("measured", "transferred"),
        "proj": ("measured", "measured"),
    }


def test_rows_with_another_answer_are_not_folded() -> None:
    names = fold_layers(layers_frame(make_run(blocks=12)))["name"].tolist()
    assert "blocks.0.qkv" in names
    assert "blocks.{1-11}.qkv (x11)" in names
    assert "blocks.{0-11}.fc1 (x12)" in names


def test_a_model_that_is_a_layer_itself_has_a_name() -> None:
    (own,) = fold_names([""])
    assert own == "(the model itself)"
    assert first_and_more(["", "head"]) == "the model itself, head"


def test_a_folded_name_that_covers_too_much_says_so() -> None:
    run = renamed(make_run(blocks=2), {"blocks.0.fc1": "e.0.1.fc", "blocks.1.fc1": "e.1.0.fc"})
    assert "e.{0-1}.{0-1}.fc (2 of 4)" in fold_layers(layers_frame(run))["name"].tolist()


@examples(25)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12, unique=True))
def test_ranges_name_exactly_the_numbers(numbers: list[int]) -> None:
    (name,) = fold_names(f"blocks.{number}.fc1" for number in numbers)
    if len(numbers) == 1:
        assert name == f"blocks.{numbers[0]}.fc1"
        return
    inside = name[name.index("{") + 1 : name.index("}")]
    covered: set[int] = set()
    for part in inside.split(","):
        low, _, high = part.partition("-")
        covered |= set(range(int(low), int(high or low) + 1))
    assert covered == set(numbers)
