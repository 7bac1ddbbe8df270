"""`autoprec.tune` from Python: live functions in, a run and a plan with verbs out."""

import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autoprec
from autoprec.errors import AutoprecError
from autoprec.records import Precision, Verdict

WIDTH = 16
COUNTING = """
import pathlib, torch
from torch import nn
log = pathlib.Path(__file__).with_suffix(".log")
log.write_text((log.read_text() if log.exists() else "") + "executed\\n")
def build_model():
    return nn.Linear(16, 16)
def train_batches(seed):
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(32, 16, generator=generator)
def loss_fn(model, batch):
    return (model(batch) - batch.flip(-1)).square().mean() + 1.0
"""


class Task:
    """A workload as an object: no file."""

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def train_batches(self, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randn(32, WIDTH, generator=generator)

    def loss_fn(self, model: nn.Module, batch: Tensor) -> Tensor:
        loss: Tensor = (model(batch) - batch.flip(-1)).square().mean() + 1.0
        return loss


class Telling(Task):
    """Warns whenever its model is made, as torch's TransformerEncoder may."""

    def build_model(self) -> nn.Module:
        warnings.warn("a model is made", stacklevel=1)
        return super().build_model()


QUICK: dict[str, Any] = {"trials": 0, "verify": False, "recipes": "tensorwise", "gemms_hp": False}


def random_states() -> tuple[object, ...]:
    drawn: Any = np.random.get_state()  # Any: numpy's own union
    return torch.get_rng_state().tolist(), random.getstate(), drawn[1].tolist()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> autoprec.Run:
    before = random_states()
    with pytest.warns(UserWarning, match="a model is made") as told:
        made = autoprec.tune(Telling(), out=tmp_path_factory.mktemp("live"), **QUICK)
    assert [str(each.message) for each in told].count("a model is made") == 1
    assert random_states() == before  # the caller's numbers go on as they would
    return made


def test_an_object_is_tuned_and_leaves_the_same_files_as_a_file(run: autoprec.Run) -> None:
    folder = run.settings.out
    for name in ("profile.json", "sensitivity.json", "search.json", "plan.json", "report.html"):
        assert (folder / name).exists(), name
    assert autoprec.Plan.load(folder / "plan.json") == run.plan
    assert run.verification is None
    assert run.exit_code == 0


@pytest.mark.slow
def test_functions_by_name_are_a_workload_too(tmp_path: Path) -> None:
    task, there = Task(), {**QUICK, "target": "h100-sxm", "meta": True}
    functions = {name: getattr(task, name) for name in ("build_model", "train_batches", "loss_fn")}
    one = autoprec.tune(functions, out=tmp_path / "one", **there)
    other = autoprec.tune(**functions, out=tmp_path / "other", **there)
    names = ["0", "2"]
    assert [layer.name for layer in one.plan.layers] == names
    assert [layer.name for layer in other.plan.layers] == names


def test_what_is_said_of_a_proof_that_is_left_out_is_told_to_do_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    there = {**QUICK, "target": "h100-sxm", "meta": True}
    autoprec.tune(Task(), out=tmp_path / "one", seeds="5", metric_tolerance=["x=1"], **there)
    assert "leaves out the proof, and --metric-tolerance, --seeds with it" in caplog.text
    caplog.clear()
    autoprec.tune(Task(), out=tmp_path / "other", **there)
    assert "leaves out" not in caplog.text


def test_a_memory_that_no_plan_fits_is_told_before_errors_are_measured(tmp_path: Path) -> None:
    with pytest.raises(AutoprecError, match=r"in 1\.00 KiB, but the smallest needs .* KiB"):
        autoprec.tune(Task(), out=tmp_path, target="h100-sxm", memory="1KiB", **QUICK)
    assert {file.name for file in tmp_path.glob("*.json")} == {"profile.json", "run.json"}


@pytest.mark.slow
def test_a_user_file_is_executed_once_in_a_tune(tmp_path: Path) -> None:
    path = tmp_path / "counting.py"
    path.write_text(COUNTING)
    settings = {**QUICK, "verify": True, "loss_tolerance": 0.5, "seeds": 2}
    run = autoprec.tune(path, out=tmp_path / "run", **settings)
    assert run.verification is not None
    assert run.verification.verdict is Verdict.VERIFIED
    assert (tmp_path / "counting.log").read_text() == "executed\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "one workload"),
        ({"source": "model.py", "loss_fn": len}, "two"),
        ({"source": Task(), "colour": 1}, "colour"),
        ({"source": Task(), "trials": -1}, "--trials"),
        ({"source": Task(), "loss_tolerance": "5"}, "--loss-tolerance"),
        ({"source": Task(), "keep": ["0=fp9"]}, "--keep"),
        ({"source": Task(), "memory": "much"}, "--memory"),
        ({"source": Task(), "target": "h1oo"}, "h1oo"),
        ({"source": SimpleNamespace(build_model=len)}, "train_batches"),
        ({"source": "nowhere.py"}, "nowhere.py"),
    ],
)
def test_what_cannot_be_is_one_line(arguments: dict[str, Any], words: str, tmp_path: Path) -> None:
    source = arguments.pop("source", None)
    with pytest.raises(autoprec.AutoprecError, match=words) as refused:
        autoprec.tune(source, out=tmp_path / "run", **arguments)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run" / "profile.json").exists()


def test_a_run_and_its_plan_are_readable(run: autoprec.Run) -> None:
    for shown in (run, run.plan):
        text, page = str(shown), shown._repr_html_()
        assert any(precision in text for precision in ("fp32", "bf16_o2", "FP32", "BF16"))
        assert page.startswith("<")
        assert "<script" not in page


def test_a_report_goes_where_it_is_asked_to(run: autoprec.Run, tmp_path: Path) -> None:
    path = run.report(tmp_path / "mine.html")
    assert path == tmp_path / "mine.html"
    assert "<html" in path.read_text()
    assert (tmp_path / "layers.csv").exists()


def test_a_changed_layer_has_no_evidence(run: autoprec.Run) -> None:
    changed = run.plan.with_layer("0", "fp8_o1:rowwise")
    assert changed["0"].option.key == "fp8_o1:rowwise"
    assert changed["2"] == run.plan["2"]
    assert (changed.grad_error, changed.predicted, changed.certificate) == (None, None, None)
    assert [row.name for row in run.plan.diff(changed).decisions] == ["0"]
    with pytest.raises(autoprec.PlanMismatchError, match=r"'3'.*nearest"):
        run.plan.with_layer("3", "fp32")
    with pytest.raises(autoprec.PlanMismatchError, match="fp8_o1:RECIPE"):
        run.plan.with_layer("0", "fp8")


def test_a_plan_is_applied_for_a_while_or_for_good(run: autoprec.Run) -> None:
    plan = run.plan.with_layer("0", "bf16_o2").with_layer("2", "bf16_o2")
    model = Task().build_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with plan.applied(model) as inside:
        assert inside is model
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert plan.apply(model, optimizer) == (model, optimizer)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_plan_is_exported(run: autoprec.Run) -> None:
    plan = run.plan.with_layer("0", "fp8_o1:tensorwise").with_layer("2", "fp8_o1:tensorwise")
    assert "tensorwise" in plan.export("torchao")
    assert plan.count(Precision.FP8_O1) == 2
