import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any  # Any: deliberately wrong user functions

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.lr_scheduler import StepLR

from autoprec.errors import WorkloadError
from autoprec.workload.functions import (
    MAX_EVAL_BATCHES,
    check_batches,
    move_batch,
    take_batches,
    tensors_in,
    workload_from,
)
from autoprec.workload.loading import load_workload
from tests.models import mlp_workload


def workload_with(**functions: Any) -> Any:  # Any: see above
    parts: dict[str, Any] = {
        "build_model": lambda: nn.Linear(2, 2),
        "train_batches": lambda seed: iter([torch.full((2, 2), float(seed))]),
        "loss_fn": lambda model, batch: model(batch).sum(),
    }
    return workload_from(SimpleNamespace(**{**parts, **functions}), name="w.py")


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters())


def test_a_training_script_is_not_run_as_a_workload(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit('it trains')")
    with pytest.raises(WorkloadError, match=rf"if it is a training script: --script {script}"):
        load_workload(str(script))
    script.write_text("from elsewhere import *")  # it may define them all
    with pytest.raises(WorkloadError, match="elsewhere"):
        load_workload(str(script))


def test_missing_function_is_named_with_its_signature() -> None:
    holder = SimpleNamespace(build_model=lambda: nn.Linear(1, 1), loss_fn=lambda m, b: m(b).sum())
    with pytest.raises(WorkloadError, match=r"train_batches\(seed\) -> iterator of batches"):
        workload_from(holder, name="w.py")


def test_live_functions_and_objects_need_no_file() -> None:
    class Mine:
        def build_model(self) -> nn.Module:
            return nn.Linear(2, 2)

        def train_batches(self, seed: int) -> Iterator[Tensor]:
            return iter([torch.full((2, 2), float(seed))])

        def loss_fn(self, model: nn.Module, batch: Tensor) -> Tensor:
            loss: Tensor = model(batch).sum()
            return loss

    mine = Mine()
    given = {"build_model": mine.build_model, "train_batches": mine.train_batches}
    for holder in (mine, {**given, "loss_fn": mine.loss_fn, "eval_batches": None}):
        workload = workload_from(holder)
        assert workload.digest == ""
        batch = next(workload.train_batches(3))
        assert workload.loss_fn(workload.build_model(), batch).requires_grad


def test_a_mapping_takes_only_the_five_functions_and_says_which_is_missing() -> None:
    given: dict[str, object] = {"build_model": lambda: 1, "train_batches": lambda seed: []}
    with pytest.raises(WorkloadError, match=r"the workload must define loss_fn\(model, batch\)"):
        workload_from(given)
    with pytest.raises(WorkloadError, match="but it defines 'loss'; see"):
        workload_from({**given, "loss": lambda m, b: 1})
    with pytest.raises(WorkloadError, match="loss_fn must be a function, but it is 3; fix it"):
        workload_from({**given, "loss_fn": 3})


@pytest.mark.parametrize(
    ("functions", "call", "message"),
    [
        ({"build_model": lambda: 3}, "build", "must return an nn.Module, but it returned int"),
        ({"build_model": nn.ReLU}, "build", "has none"),
        ({"build_model": lambda: sys.exit(0)}, "build", "it raised SystemExit"),
        ({"build_model": lambda: torch.jit.script(nn.Linear(2, 2))}, "build", "torch.jit has"),
        ({"loss_fn": lambda m, b: m(b)}, "loss", r"shape \(2, 2\)"),
        ({"loss_fn": lambda m, b: 1.0}, "loss", "returned float"),
        ({"loss_fn": lambda m, b: torch.tensor(1)}, "loss", "scalar floating"),
        ({"train_batches": lambda seed: iter([])}, "batch", "at least one batch"),
        ({"train_batches": lambda seed: 5}, "batch", "raised TypeError"),
        ({"eval_batches": list}, "eval", "at least one batch"),
        ({"build_optimizer": lambda m: None}, "optimizer", "returned NoneType"),
        (
            {"build_optimizer": lambda m: torch.optim.SGD(nn.Linear(1, 1).parameters())},
            "optimizer",
            "lists others",
        ),
        ({"build_optimizer": lambda m: []}, "optimizer", "returned list"),
        (
            {"build_scheduler": lambda o: StepLR(sgd(nn.Linear(1, 1)), 9)},
            "scheduler",
            "its StepLR is of another one",
        ),
        (
            {"build_optimizer": lambda m: torch.optim.SGD(m.parameters(), maximize=True)},
            "optimizer",
            "let loss_fn return the negative",
        ),
        (
            {"build_optimizer": lambda m: [torch.optim.SGD(m.parameters())] * 2},
            "optimizer",
            "each parameter one optimizer, but some have two",
        ),
    ],
)
def test_misbehaving_function_is_one_clear_line(
    functions: dict[str, Any], call: str, message: str
) -> None:
    workload = workload_with(**functions)
    calls = {
        "build": workload.build_model,
        "loss": lambda: workload.loss_fn(nn.Linear(2, 2), torch.ones(2, 2)),
        "batch": lambda: next(workload.train_batches(0)),
        "eval": workload.eval_batches,
        "optimizer": lambda: workload.build_optimizer(nn.Linear(2, 2)),
        "scheduler": lambda: workload.build_scheduler(sgd(nn.Linear(1, 1))),
    }
    with pytest.raises(WorkloadError, match=message) as caught:
        calls[call]()
    assert "\n" not in str(caught.value)


def test_exception_of_the_user_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import torch\n"
        "def build_model():\n    raise ValueError('no\\nweights') from OSError('not found')\n"
        "def train_batches(seed):\n    yield 1\n"
        "def loss_fn(model, batch):\n    return model(batch)\n"
    )
    with pytest.raises(WorkloadError, match=r"mine.py:3: no weights \(from OSError: not found\)"):
        load_workload(str(path)).build_model()


NAMES = "build_model = train_batches = loss_fn = None\n"


@pytest.mark.parametrize(
    "text", ["def build_model(:\n", "import not_there_at_all\n", "raise SystemExit\n"]
)
def test_file_that_does_not_import_is_one_clear_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(NAMES + text)
    with pytest.raises(WorkloadError, match=r"broken.py must give a file that imports"):
        load_workload(str(path))


def test_a_file_that_changes_the_directory_is_found_again_by_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = []
    for rest in ("", "more = 1\n", "more = 1\n"):
        Path(tmp_path, "mine.py").write_text(
            f"import os\nos.chdir('/')\n{NAMES}{rest}".replace("None", "len")
        )
        monkeypatch.chdir(tmp_path)
        found.append(load_workload("mine.py"))
    first, second, third = found
    assert first.digest != second.digest == third.digest  # of its text, not of nothing
    assert load_workload(first.reference).digest == third.digest  # from where it went


def test_the_place_of_an_error_is_in_the_users_code_and_not_in_the_package() -> None:
    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        move_batch(batch, "no device")  # type: ignore[arg-type]  # so it raises
        return batch

    workload, model = workload_with(loss_fn=loss_fn), nn.Linear(2, 2)
    with pytest.raises(WorkloadError, match=rf" at {Path(__file__).name}:"):
        workload.loss_fn(model, torch.ones(2, 2))


def test_a_script_that_reads_its_arguments_is_told_where(tmp_path: Path) -> None:
    path = tmp_path / "parses.py"
    path.write_text(NAMES + "import argparse\nargparse.ArgumentParser().parse_args(['--x'])\n")
    with pytest.raises(WorkloadError, match=r"it raised SystemExit at parses.py:3: 2"):
        load_workload(str(path))


def test_a_file_does_not_hide_a_module_of_python(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text(NAMES)
    with pytest.raises(WorkloadError, match="must not be named as one of Python's own modules"):
        load_workload(str(tmp_path / "json.py"))


def test_a_default_dtype_that_all_would_be_measured_in_is_refused() -> None:
    workload = workload_with()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with pytest.raises(WorkloadError, match=r"at float32, .* but it is torch.bfloat16; return"):
            workload.build_model()
    finally:
        torch.set_default_dtype(torch.float32)


def test_object_in_a_file_can_be_the_workload(tmp_path: Path) -> None:
    path = tmp_path / "objects.py"
    path.write_text(
        "import torch\n"
        "class Mine:\n"
        "    def build_model(self):\n        return torch.nn.Linear(2, 2)\n"
        "    def train_batches(self, seed):\n        return iter([torch.ones(2, 2)])\n"
        "    def loss_fn(self, model, batch):\n        return model(batch).sum()\n"
        "mine = Mine()\n"
    )
    assert isinstance(load_workload(f"{path}:mine").build_model(), nn.Linear)
    with pytest.raises(WorkloadError, match="must define 'yours'"):
        load_workload(f"{path}:yours")


def test_missing_file_says_what_to_give() -> None:
    with pytest.raises(WorkloadError, match=r"nowhere\.py is not there"):
        load_workload("nowhere.py")


def test_code_that_takes_fp32_alone_is_told_to_cast_where_a_plan_gives_bf16() -> None:
    said = ["expected scalar type Float but found BFloat16"]

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        output: Tensor = model(batch.to(next(model.parameters()).dtype))
        if output.dtype is not torch.float32:  # as operators of somebody's do
            raise RuntimeError(said[0])
        return output.sum()

    workload = workload_with(loss_fn=loss_fn)
    model = workload.build_model(seed=0)
    (batch,) = take_batches(workload, seed=0, count=1)
    workload.loss_fn(model, batch)
    with pytest.raises(WorkloadError, match=r"layers give BF16: .* as in op\(x\.float\(\)\)$"):
        workload.loss_fn(model.bfloat16(), batch)
    said[0] = "out of memory"  # which no cast would help
    with pytest.raises(WorkloadError, match=r"out of memory$") as found:
        workload.loss_fn(model, batch)
    assert type(found.value.__cause__) is RuntimeError  # by which stages know it
    own = workload_with(loss_fn=loss_fn, build_model=lambda: nn.Linear(2, 2).bfloat16())
    with pytest.raises(WorkloadError, match="BFloat16") as caught:
        own.loss_fn(own.build_model(seed=0).bfloat16(), batch)
    assert "layers give BF16" not in str(caught.value)  # it is written for BF16


def test_finite_training_batches_start_over() -> None:
    batches = take_batches(workload_with(), seed=3, count=4)
    assert [float(batch[0, 0]) for batch in batches] == [3.0] * 4


def test_endless_evaluation_batches_are_cut() -> None:
    def endless() -> Iterator[Tensor]:
        while True:
            yield torch.ones(2, 2)

    assert len(workload_with(eval_batches=endless).eval_batches()) == MAX_EVAL_BATCHES


def test_batches_that_ignore_the_seed_are_refused() -> None:
    workload = workload_with(train_batches=lambda seed: iter([torch.rand(2, 2)]))
    with pytest.raises(WorkloadError, match="batch 0 of seed 0 differs"):
        check_batches(workload, seed=0)
    check_batches(mlp_workload(), seed=0)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_batches_and_missing_values_are_compared_by_what_they_hold() -> None:
    graph = torch.eye(4).to_sparse()
    layouts = [graph, graph.to_sparse_csr(), graph.to_sparse_csc(), torch.tensor([1.0, math.nan])]
    for value in layouts:
        check_batches(workload_with(train_batches=lambda seed, v=value: iter([v.clone()])), seed=0)
    for other in (
        graph * 2,
        torch.eye(4),
        torch.eye(5).to_sparse(),
        torch.full((2,), math.nan),
    ):
        for value in (graph, layouts[-1]):
            pair = iter((value, other))
            workload = workload_with(train_batches=lambda seed, pair=pair: iter([next(pair)]))
            with pytest.raises(WorkloadError, match="batch 0 of seed 0 differs"):
                check_batches(workload, seed=0, count=1)


def test_same_seed_builds_the_same_model() -> None:
    one, other = (mlp_workload().build_model(seed=5) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_built_model_is_in_training_mode_but_for_parts_that_are_frozen() -> None:
    frozen, loaded = (nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)) for _ in range(2))
    frozen[0].eval()
    loaded.eval()  # as from_pretrained gives it
    modes = []
    for model in (frozen, loaded):
        built = workload_with(build_model=[model].pop).build_model()
        modes.append([part.training for part in built.modules()])
    assert modes == [[True, False, True], [True, True, True]]


@dataclass(slots=True)
class Graph:
    """A batch of a library's own, which is moved in place."""

    nodes: Tensor
    edges: Tensor = field(init=False)

    def to(self, device: torch.device) -> None:
        self.nodes = self.nodes.to(device)


def test_a_batch_may_move_in_place_and_have_fields_without_a_value() -> None:
    graph = Graph(torch.zeros(2))
    assert move_batch({"graph": graph}, torch.device("meta")) == {"graph": graph}
    assert [tensor.device.type for tensor in tensors_in(graph)] == ["meta"]


def test_move_batch_keeps_the_structure() -> None:
    batch = {"x": torch.ones(1), "meta": ["a", (torch.zeros(2), 3)]}
    moved = move_batch(batch, torch.device("meta"))
    assert moved["x"].is_meta
    assert moved["meta"][0] == "a"
    assert moved["meta"][1][0].is_meta
    assert moved["meta"][1][1] == 3


def test_the_default_optimizer_is_fused_on_a_gpu_and_only_there() -> None:
    with FakeTensorMode():
        on_gpu = nn.ParameterList([torch.empty(4, 4, device="cuda")])
    workload = workload_with()
    assert workload.build_optimizer(on_gpu).defaults["fused"]
    assert not workload.build_optimizer(nn.Linear(4, 4)).defaults["fused"]


def test_lazy_parameters_are_refused_before_any_work() -> None:
    functions = {
        "build_model": lambda: nn.Sequential(nn.LazyLinear(4)),
        "train_batches": lambda seed: iter([torch.ones(2, 4)]),
        "loss_fn": lambda model, batch: model(batch).sum(),
    }
    with pytest.raises(WorkloadError, match=r"have a shape, but 0\.weight is lazy; run a batch"):
        workload_from(functions).build_model()
