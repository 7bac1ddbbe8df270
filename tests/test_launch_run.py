"""`autoprec run`: a plan in a training script that does not know of it."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from autoprec.cli.main import main
from autoprec.errors import PlanMismatchError, WorkloadError
from autoprec.integrations.launch import Script, run_with_plan
from autoprec.integrations.launch.running import RunOutcome
from autoprec.integrations.launch.script import run_script
from autoprec.records import BF16_O2, FP32, Option, Phase, Plan, Recipe, fp8_option
from autoprec.runtime import masters
from tests.accelerate_state import forget_accelerators, fresh_accelerate
from tests.launch_scripts import APART, HEAD, LOOP, PARTS, SHARDED, own_main, write_script
from tests.plans import plan_for

__all__ = ["fresh_accelerate", "own_main"]
pytestmark = pytest.mark.usefixtures("own_main")
SAVE = "torch.save([p.float() for p in model.parameters()], sys.argv[2])\n"
DTYPE = "print(model.first.weight.dtype)\n"
PATCHED = (
    (nn.Module, "__call__"),
    (torch.optim.Optimizer, "__init__"),
    (torch.optim.Optimizer, "load_state_dict"),
    (nn.parallel.DistributedDataParallel, "__init__"),
    (torch.autograd, "backward"),
    (torch.nn.utils, "clip_grad_norm_"),
)


class Net(nn.Module):
    """The scripts' model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(32, 64), nn.LayerNorm(64), nn.Linear(64, 16)


def run(
    folder: Path,
    body: str,
    *args: str,
    plan: Plan | None = None,
    **how: Any,  # of `run_with_plan`
) -> RunOutcome:
    """Run a script of this text with a plan, and check that nothing stays patched."""
    before = [vars(owner)[name] for owner, name in PATCHED]
    masters.LIVE.clear()
    hooks = len(_global_optimizer_pre_hooks)
    script = Script(write_script(folder, body), args)
    try:
        return run_with_plan(script, plan or plan_for(Net()), **how)
    finally:
        assert [vars(owner)[name] for owner, name in PATCHED] == before
        assert len(_global_optimizer_pre_hooks) <= hooks + 1  # the runtime's own stays


@pytest.mark.parametrize("option", [BF16_O2, fp8_option(Recipe.TENSORWISE)])
def test_a_run_is_bit_identical_to_the_line_in_the_script(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: Option,
) -> None:
    """And neither of both moves the random numbers that the script draws."""
    path = tmp_path / "plan.json"
    plan_for(Net(), others={"first": option}).save(path)
    line = f"import autoprec; autoprec.apply({str(path)!r}, model, optimizer)\n"
    draws = "print(torch.rand(2).tolist())\n"
    by_hand = write_script(tmp_path, HEAD + line + LOOP + SAVE + draws, name="by_hand.py")
    plain = write_script(tmp_path, HEAD + LOOP + SAVE + draws)
    printed = []
    for script in (by_hand, plain):
        monkeypatch.setattr(sys, "argv", [script, "6", f"{script}.pt"])
        runpy.run_path(script, run_name="__main__")
        printed.append(capsys.readouterr().out.splitlines())
    masters.LIVE.clear()
    with pytest.raises(SystemExit) as leaving:
        main(["run", "--plan", str(path), plain, "6", str(tmp_path / "run.pt")])
    ran = capsys.readouterr()
    assert leaving.value.code == 0, ran.err
    assert ran.out.splitlines() == printed[0]
    assert ran.out.splitlines()[-1] == printed[1][-1]
    assert printed[0][:-1] != printed[1][:-1]
    expected: list[Tensor] = torch.load(f"{by_hand}.pt")
    actual: list[Tensor] = torch.load(tmp_path / "run.pt")
    assert all(torch.equal(one, other) for one, other in zip(expected, actual, strict=True))
    line = ran.err.splitlines()[-1]
    assert line.startswith("autoprec: plan applied to Net at train.py:"), ran.err
    assert ("3 bf16_o2" if option == BF16_O2 else "2 bf16_o2, 1 fp8_o1") in line
    assert "AdamW" in line


def test_models_that_are_trained_side_by_side_take_one_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = nn.ModuleDict({"body": Net(), "head": nn.Linear(16, 16)})
    plan = plan_for(both, others={"body.first": fp8_option(Recipe.TENSORWISE), "head": FP32})
    plan.save(path := tmp_path / "plan.json")
    line = "both = nn.ModuleDict({'body': self.body, 'head': self.head}); import autoprec; "
    line += f"autoprec.apply({str(path)!r}, both, optimizer)"
    assert run_script(Script(write_script(tmp_path, APART.replace("BEFORE", line)), ("4",))) == 0
    by_hand = capsys.readouterr().out
    masters.LIVE.clear()
    outcome = run(tmp_path, APART.replace("BEFORE", "pass"), "4", plan=plan)
    assert (outcome.status, capsys.readouterr().out) == (0, by_hand)
    assert "plan applied to body and head at train.py:" in outcome.message
    assert outcome.message.endswith("layers 2 bf16_o2, 1 fp32, 1 fp8_o1; optimizers SGD")


def test_models_side_by_side_that_ddp_wraps_are_refused(tmp_path: Path) -> None:
    """DDP's hooks are on the parameters that it found: ranks would train on their own."""
    both = nn.ModuleDict({"body": Net(), "head": nn.Linear(16, 16)})
    start = "torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), "
    wrap = f"{start}rank=0, world_size=1); wrap = nn.parallel.DistributedDataParallel; "
    wrap += "self.body, self.head = wrap(self.body), wrap(self.head)"
    with pytest.raises(
        PlanMismatchError, match="before the model is wrapped, but it already is by Distr"
    ):
        run(tmp_path, APART.replace("BEFORE", wrap), "2", plan=plan_for(both))
    torch.distributed.destroy_process_group()


def test_an_evaluation_before_training_runs_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = f"""{HEAD}
model.eval()
with torch.no_grad():
    model(torch.randn(4, 32))
{DTYPE}model.train()
{LOOP}{DTYPE}"""
    outcome = run(tmp_path, body, "2")
    assert (outcome.status, outcome.was_applied) == (0, True)
    assert re.findall(r"torch\.\w+", capsys.readouterr().out) == ["torch.float32", "torch.bfloat16"]


def test_the_right_model_of_several_is_found(tmp_path: Path) -> None:
    body = f"""{HEAD}
other = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 8))
second = torch.optim.SGD(other.parameters(), lr=0.1)
other(torch.randn(2, 32)).sum().backward()
second.step()
class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = model
    def forward(self, x, y):
        return F.cross_entropy(self.inner(x), y)
whole = WithLoss()
for x, y in batches(2):
    whole(x, y).backward()
    optimizer.step()
    optimizer.zero_grad()
assert other[0].weight.dtype is torch.float32
assert model.first.weight.dtype is torch.bfloat16
assert nn.Module.__call__ is nn.Module._wrapped_call_impl  # the wrapper is gone
"""
    outcome = run(tmp_path, body)
    assert outcome.status == 0
    assert "plan applied to Net" in outcome.message


def test_every_fold_of_a_cross_validation_gets_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And each is told of before its first step, so that a run that is killed has said it."""
    body = f"""{HEAD}
del model, optimizer
for fold in range(2):
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    {LOOP.strip().replace(chr(10), chr(10) + "    ")}
    assert model.first.weight.dtype is torch.bfloat16
"""
    outcome = run(tmp_path, body, "2", tell=print)
    assert outcome.status == 0
    assert outcome.message.count("plan applied to Net") == 2
    told = [line.startswith("plan applied to Net") for line in capsys.readouterr().out.splitlines()]
    assert told == [True, False, False] * 2


@pytest.mark.parametrize("head", [HEAD, SHARDED])
def test_a_second_model_gets_the_plan_before_torchs_checkpoints_step_its_optimizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], head: str
) -> None:
    """`get_state_dict` makes the state of a new optimizer by a step, before any call."""
    path = tmp_path / "plan.json"
    plan_for(Net()).save(path)
    shard = "fully_shard(model.first, mp_policy=policy); fully_shard(model, mp_policy=policy)"
    again = f"""
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
{LOOP}
saved = get_state_dict(model, optimizer)
model = Net()
{shard if head is SHARDED else ""}
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
HAND
get_state_dict(model, optimizer)
set_state_dict(model, optimizer, model_state_dict=saved[0], optim_state_dict=saved[1])
{LOOP}
if "dist" in globals(): dist.destroy_process_group()
"""
    line = f"import autoprec; autoprec.apply({str(path)!r}, model, optimizer)\n"
    outcome = run(tmp_path, head + again.replace("HAND", ""), "3", plan=Plan.load(path))
    assert outcome.message.count("plan applied to") == 2
    printed = capsys.readouterr().out
    by_hand = Script(write_script(tmp_path, head + line + again.replace("HAND", line)), ("3",))
    assert run_script(by_hand) == 0
    assert printed == capsys.readouterr().out
    assert len(printed.splitlines()) == 6


@pytest.mark.parametrize("wraps_first", [True, False])
def test_ddp_gets_a_model_that_has_the_plan(tmp_path: Path, *, wraps_first: bool) -> None:
    made = "optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)" if wraps_first else ""
    body = f"""{HEAD}
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
wrapped = nn.parallel.DistributedDataParallel(model)
{made}
plain, model = model, wrapped
{LOOP}
dist.destroy_process_group()
assert plain.first.weight.dtype is torch.bfloat16
"""
    outcome = run(tmp_path, body, "2")
    assert outcome.status == 0
    assert "before DistributedDataParallel wrapped it" in outcome.message
    assert ("SGD" if wraps_first else "AdamW") in outcome.message


def test_updates_by_hand_are_told_to_lose_what_bf16_does_not_resolve(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    step = "for p in model.parameters(): p.data.sub_(1e-2 * p.grad); p.grad = None"
    head, loop = HEAD.rpartition("optimizer = ")[0], LOOP.replace("optimizer.step()", step)
    assert run(tmp_path, head + loop.replace("optimizer.zero_grad()", "pass"), "3").status == 0
    assert caplog.text.count("no optimizer of torch.optim trains Net") == 1
    caplog.clear()
    assert run(tmp_path, HEAD + LOOP, "3").status == 0
    assert "no optimizer" not in caplog.text


WITH_TEACHER = f"""{HEAD.rpartition("optimizer = ")[0]}
teacher = Net()
student = model
if sys.argv[2] == "ddp":
    BEFORE_DDP
    import torch.distributed as dist
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    teacher, student = (nn.parallel.DistributedDataParallel(each) for each in (teacher, model))
teacher.load_state_dict(student.state_dict())
if sys.argv[2] != "ddp":
    BEFORE_TRAINING
for parameter in teacher.parameters():
    parameter.requires_grad = False
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for x, y in batches(4):
    aim = teacher(x)  # first, and with gradients on
    loss = F.mse_loss(student(x), aim + 1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    for own, average in zip(model.parameters(), teacher.parameters()):
        average.data.mul_(0.99).add_(own.detach().data, alpha=0.01)
    print(f"{{loss.item():.17g}}")
assert {{p.dtype for p in teacher.parameters()}} == {{torch.float32}}
if sys.argv[2] == "ddp": dist.destroy_process_group()
"""


@pytest.mark.parametrize("way", ["alone", "ddp"])
def test_a_teacher_that_runs_before_its_student_stays_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    path = tmp_path / "plan.json"
    plan_for(Net()).save(path)
    body, place = WITH_TEACHER, "BEFORE_DDP" if way == "ddp" else "BEFORE_TRAINING"
    plain = body.replace("BEFORE_DDP", "pass").replace("BEFORE_TRAINING", "pass")
    outcome = run(tmp_path, plain, "4", way, plan=Plan.load(path))
    assert (outcome.status, outcome.message.count("applied")) == (0, 1)
    assert outcome.message.endswith("optimizers AdamW")
    printed = capsys.readouterr().out
    line = f"import autoprec; autoprec.apply({str(path)!r}, model)"
    assert run_script(Script(write_script(tmp_path, body.replace(place, line)), ("4", way))) == 0
    assert printed == capsys.readouterr().out


TRAINED_SHARDED = f"""{SHARDED}
with torch.no_grad():
    model(next(iter(batches(1)))[0])  # an evaluation before training leaves the root gathered
{LOOP}
model.reshard()
assert {{p.dtype for p in model.parameters()}} == {{torch.float32}}
weight = model.first.weight
model.first.unshard()
assert model.first.weight.dtype is torch.bfloat16
assert "bf16_o2" in repr(model)
dist.barrier()
dist.destroy_process_group()
"""


def test_a_sharded_model_gets_the_plan_at_its_first_call(tmp_path: Path) -> None:
    outcome = run(tmp_path, TRAINED_SHARDED, "2")
    assert outcome.status == 0
    assert "at its first training call" in outcome.message
    assert outcome.message.endswith("optimizers AdamW")


@pytest.mark.slow
def test_torchrun_gives_a_sharded_script_a_plan_of_two_dtypes(tmp_path: Path) -> None:
    plan_for(Net(), others={"norm": FP32}).save(tmp_path / "plan.json")
    script = write_script(tmp_path, TRAINED_SHARDED)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = ["-m", "autoprec", "run", "--plan", str(tmp_path / "plan.json"), script, "3"]
    done = subprocess.run(
        [sys.executable, *launch, *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("plan applied to FSDPNet") == 1  # rank 0 tells
    assert "layers 2 bf16_o2, 1 fp32; optimizers AdamW" in done.stderr
    assert "1 of FSDP's groups hold FP32 layers beside 16-bit ones: the root" in done.stderr


def test_a_compiled_step_that_steps_the_optimizer_gets_the_plan(tmp_path: Path) -> None:
    body = f"""{HEAD}
@torch.compile(backend="eager")
def step(x, y):
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
for x, y in batches(2):
    step(x, y)
assert model.first.weight.dtype is torch.bfloat16
"""
    outcome = run(tmp_path, body)
    assert outcome.status == 0
    assert "(before AdamW's first step)" in outcome.message


def test_a_compiled_model_gets_the_plan_and_compiles_once(tmp_path: Path) -> None:
    body = f"""{HEAD}
import torch._dynamo.testing
counter = torch._dynamo.testing.CompileCounter()
idle = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # keeps the watch on
plain, model = model, torch.compile(model, backend=counter, fullgraph=True)
{LOOP}
assert plain.first.weight.dtype is torch.bfloat16
assert counter.frame_count == 1, counter.frame_count
"""
    assert run(tmp_path, body, "3").status == 0


HIDDEN_CALLS = {
    "in a closure": """
for x, y in batches(3):
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss
    optimizer.step(closure)
""",
    "in a compiled function": """
compute = torch.compile(lambda x, y: F.cross_entropy(model(x), y), backend="eager", fullgraph=True)
for x, y in batches(3):
    compute(x, y).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
""",
    "of forward itself": LOOP.replace("model(x)", "model.forward(x)"),
}


@pytest.mark.parametrize("where", HIDDEN_CALLS)
def test_a_call_that_cannot_be_seen_gets_the_plan_at_the_first_step(
    tmp_path: Path, where: str
) -> None:
    body = HEAD + HIDDEN_CALLS[where] + "assert model.first.weight.dtype is torch.bfloat16\n"
    body += "assert optimizer.state[model.first.weight]['exp_avg'].dtype is torch.float32\n"
    outcome = run(tmp_path, body, "3")
    assert outcome.status == 0
    assert "before AdamW's first step" in outcome.message


def test_a_model_whose_method_calls_its_parts_has_the_plan_before_the_first_part_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run(tmp_path, PARTS, "3")
    assert outcome.was_applied
    assert "at the first training call of a part" in outcome.message
    printed = capsys.readouterr().out
    plan_for(Net()).save(tmp_path / "plan.json")
    line = f"import autoprec; autoprec.apply({str(tmp_path / 'plan.json')!r}, model, optimizer)\n"
    by_hand = write_script(tmp_path, PARTS.replace("for x, y", line + "for x, y"), name="hand.py")
    assert run_script(Script(by_hand, ("3",))) == 0
    assert capsys.readouterr().out == printed != ""


def test_a_model_whose_forward_is_called_past_its_hooks_has_the_plan_from_the_first_step(
    tmp_path: Path,
) -> None:
    """As RecBole's are; the weights that the first backward needs stay as they are until then."""
    scored = HEAD.replace(
        "def forward(self, x)",
        "def loss(self, x, y):\n"
        "        return self.score(self.forward(x), y)\n"
        "    def forward(self, x)",
    ).replace("super().__init__()", "super().__init__(); self.score = nn.CrossEntropyLoss()")
    outcome = run(
        tmp_path, scored + LOOP.replace("F.cross_entropy(model(x), y)", "model.loss(x, y)"), "3"
    )
    assert "before AdamW's first step" in outcome.message


@pytest.mark.parametrize("cls", ["AdamW", "SGD"])
def test_a_resumed_run_equals_one_without_interruption(tmp_path: Path, cls: str) -> None:
    body = f"""{HEAD.replace("AdamW", cls)}
from pathlib import Path
start, steps, path = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
if start:
    state = torch.load(path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
for step in range(start, steps):
    torch.manual_seed(step)
    x, y = next(iter(batches(1)))
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
torch.save({{"model": model.state_dict(), "optimizer": optimizer.state_dict()}}, path)
"""
    whole, halves = tmp_path / "whole.pt", tmp_path / "halves.pt"
    for args in (("0", "6", whole), ("0", "3", halves), ("3", "6", halves)):
        assert run(tmp_path, body, *map(str, args)).status == 0
    expected, actual = torch.load(whole), torch.load(halves)
    assert _flat(expected) == _flat(actual)


@pytest.mark.parametrize("model_first", [True, False])
def test_an_evaluation_after_a_resume_is_the_one_before_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], *, model_first: bool
) -> None:
    """The checkpoint's weights are FP32 ones, rounded here as by `apply`; the masters count."""
    evaluate = """
model.eval()
with torch.no_grad():
    print("loss", F.cross_entropy(model(torch.ones(4, 32)), torch.arange(4)).item())
model.train()
"""
    save = """
weights, masters = model.state_dict(), optimizer.state_dict()["state"]
assert torch.equal(weights["first.weight"], masters[0]["master_weight"])
assert model.first.state_dict(keep_vars=True)["weight"] is model.first.weight
rounded = {name: value.bfloat16() for name, value in weights.items()}
torch.save([rounded, optimizer.state_dict()], sys.argv[2])
print(optimizer.state_dict()["state"][0]["master_weight"].double().sum().item())
"""
    load = ["model.load_state_dict(state[0])\n", "optimizer.load_state_dict(state[1])\n"]
    path = str(tmp_path / "saved.pt")
    run(tmp_path, HEAD + LOOP + evaluate + save, "3", path)
    before = capsys.readouterr().out.splitlines()[-2:]
    body = HEAD + "state = torch.load(sys.argv[2])\n" + "".join(load if model_first else load[::-1])
    outcome = run(tmp_path, body + evaluate + save + LOOP, "1", path)
    assert capsys.readouterr().out.splitlines()[:2] == before
    assert "before AdamW loads its masters" in outcome.message


def test_a_model_in_bf16_is_said_to_be_and_gets_fp32_masters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    body = HEAD + "model.bfloat16()\n" + LOOP.replace("model(x)", "model(x.bfloat16())")
    body += "assert optimizer.state[model.head.weight]['exp_avg'].dtype is torch.float32\n"
    assert run(tmp_path, body, "2").status == 0
    assert "Net is held in bfloat16: the plan's FP32 masters start as copies" in caplog.text


@pytest.mark.parametrize("option", [BF16_O2, FP32])
def test_a_model_in_bf16_meets_the_tensors_that_it_met_without_the_plan(
    tmp_path: Path, option: Option
) -> None:
    """Inputs and a buffer of its own in BF16, and what its loss multiplies the output by."""
    body = HEAD.replace("self.head(F.dropout(", "self.head(F.dropout(self.own *")
    body = body.replace("model = Net()", "Net.own = torch.rand(64).bfloat16(); model = Net()")
    body += "model.bfloat16()\nweights = torch.rand(16, 16).bfloat16()\n"
    product = "F.linear(model(x.bfloat16()) @ weights, weights)"
    called = product if option == BF16_O2 else "model(x.bfloat16())"
    outcome = run(
        tmp_path, body + LOOP.replace("model(x)", called), "2", plan=plan_for(Net(), option)
    )
    assert (outcome.status, outcome.was_applied) == (0, True)


def test_a_whole_model_is_saved_as_the_script_has_it_without_a_plan(tmp_path: Path) -> None:
    body = f"""{HEAD}
model.memory = nn.LSTM(16, 16)  # which has a __getstate__ of its own
model.head.weight.requires_grad = False  # it has no master
frozen = model.head.weight.detach().clone()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
{LOOP}
exact = {{**model.state_dict(), "head.weight": frozen}}
named = model.state_dict()
for name, parameter in model.named_parameters():
    named[name] = parameter  # as guided-diffusion fills its checkpoints
whole = {{"epoch": 1, "models": [model], "alone": model.memory, "named": named,
         "own": model.state_dict(), "data": model.head.weight.data}}
torch.save(whole, sys.argv[2])
classes = [Net, nn.Linear, nn.LayerNorm, nn.LSTM]
with torch.serialization.safe_globals(classes):
    saved = torch.load(sys.argv[2], weights_only=True)
loaded, = saved["models"]
assert set(map(type, loaded.modules())) == set(classes)
assert all(torch.equal(exact[name], value) for name, value in loaded.named_parameters())
assert torch.equal(saved["alone"].weight_hh_l0, exact["memory.weight_hh_l0"])
assert all(torch.equal(exact[name], value) for name, value in saved["named"].items())
assert all(torch.equal(exact[name], value) for name, value in saved["own"].items())
assert saved["named"]._metadata == named._metadata and torch.equal(saved["data"], frozen)
assert model.first.weight.dtype is named["first.weight"].dtype is torch.bfloat16
assert loaded(x).isfinite().all()
"""
    net = Net()
    net.memory = nn.LSTM(16, 16)
    assert run(tmp_path, body, "2", str(tmp_path / "model.pt"), plan=plan_for(net)).status == 0


def test_weights_and_gradients_become_numpy_arrays_as_without_a_plan(tmp_path: Path) -> None:
    """Histograms, `np.save` and prints take them; an array is no way into a weight's memory."""
    arrays = """
import numpy as np
weight, gradient = np.asarray(model.first.weight.detach()), model.first.weight.grad.cpu().numpy()
assert weight.dtype == gradient.dtype == np.float32
assert np.abs(weight - model.state_dict()["first.weight"].numpy()).max() < 1e-2
x = model.norm.weight.detach().numpy()
x[:] = 0
"""
    first = LOOP.replace("print(", "break\n    print(")
    assert run(tmp_path, HEAD + first + arrays, "1").status == 1
    assert run(tmp_path, HEAD + first + arrays.rpartition("x[:]")[0], "1").status == 0


def test_an_average_that_begins_after_the_plan_is_fp32(tmp_path: Path) -> None:
    """As in scripts that wrap their model in DDP first, when the plan comes, and average then."""
    own = "average = [p.data.clone() for p in model.parameters()]\n"
    own += "average = [0.9 * a + 0.1 * p.data for a, p in zip(average, model.parameters())]\n"
    own += "assert {a.dtype for a in average} == {torch.float32}\n"
    assert run(tmp_path, HEAD + LOOP + own, "1").status == 0


def test_a_copy_of_the_model_is_as_without_the_plan_until_it_is_trained(tmp_path: Path) -> None:
    """As EDM's average, which begins after DDP has wrapped the model, and its pickled files."""
    own = """
import copy, pickle
exact = {name: value.clone() for name, value in model.state_dict().items()}
average = copy.deepcopy(model).eval().requires_grad_(False)
assert {*map(type, average.modules())} == {Net, nn.Linear, nn.LayerNorm}
assert all(torch.equal(value, exact[name]) for name, value in average.state_dict().items())
for a, p in zip(average.parameters(), model.parameters()):
    a.add_(1)
    expected = p.float().lerp(a, 0.9)
    a.copy_(p.detach().lerp(a, 0.9))
    assert a.dtype is torch.float32 and torch.allclose(a, expected, atol=1e-2)
with open(sys.argv[2], "wb") as file:
    pickle.dump({"own": model, "average": average}, file)
with open(sys.argv[2], "rb") as file:
    saved = pickle.load(file)
assert all(torch.equal(value, exact[name]) for name, value in saved["own"].state_dict().items())
assert type(saved["own"].first) is nn.Linear
model = copy.deepcopy(model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
"""
    trained = "assert model.first.weight.dtype is torch.bfloat16\n"
    body = HEAD + LOOP + own + LOOP + trained
    assert run(tmp_path, body, "2", str(tmp_path / "saved.pkl")).status == 0


def test_a_weight_that_the_script_multiplies_itself_is_said_to_be_bf16(tmp_path: Path) -> None:
    """A queue of features times prototypes, as SwAV's."""
    told: list[str] = []
    hook, itself = sys.excepthook, "torch.ones(16, 16) @ model.head.weight.detach()\n"
    assert run(tmp_path, HEAD + LOOP + itself, "1", tell=told.append).status == 1
    assert "keep that layer in FP32" in told[-1]
    assert sys.excepthook is hook
    told.clear()
    assert run(tmp_path, HEAD + LOOP + "raise RuntimeError\n", "1", tell=told.append).status == 1
    assert [line.partition(" ")[0] for line in told] == ["plan"]
    kept = plan_for(Net(), others={"head": FP32})
    assert run(tmp_path, HEAD + LOOP + itself, "1", plan=kept).status == 0


def test_what_transformers_saves_is_loaded_in_the_dtype_of_its_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 16)
    made = f"BertModel(BertConfig(num_hidden_layers=1, num_attention_heads=1, **{sizes}))"
    body = (
        HEAD.replace(
            "model = Net()", f"from transformers import BertConfig, BertModel; model = {made}"
        )
        + """
model(torch.zeros(1, 4, dtype=int)).last_hidden_state.sum().backward()
optimizer.step()
model.save_pretrained(sys.argv[1])
print(BertModel.from_pretrained(sys.argv[1]).dtype, model.dtype)
"""
    )
    from transformers import BertConfig, BertModel

    plan = plan_for(BertModel(BertConfig(num_hidden_layers=1, num_attention_heads=1, **sizes)))
    run(tmp_path, body, str(tmp_path / "saved"), plan=plan)
    assert capsys.readouterr().out == "torch.float32 torch.bfloat16\n"


def test_an_average_that_is_older_than_the_plan_stays_fp32_and_follows(tmp_path: Path) -> None:
    body = f"""{HEAD}
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
{LOOP}
    ema.update_parameters(model)
average, weight = ema.module.first.weight, model.first.weight
assert average.dtype is torch.float32 and weight.dtype is torch.bfloat16
assert 0 < (average - weight).abs().max() < 0.02
"""
    assert run(tmp_path, body, "3").status == 0


def test_an_optimizer_made_late_loads_its_masters(tmp_path: Path) -> None:
    body = f"""{HEAD}
{LOOP}
saved = optimizer.state_dict()
late = torch.optim.AdamW(model.parameters(), lr=1e-2)
late.load_state_dict(saved)
again = late.state_dict()["state"]
for index, state in saved["state"].items():
    assert torch.equal(state["master_weight"], again[index]["master_weight"])
    assert again[index]["exp_avg"].dtype is torch.float32
"""
    assert run(tmp_path, body, "2").status == 0


def test_a_script_without_a_fitting_model_is_stopped_at_its_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Net()
    other.first = nn.Linear(32, 64, bias=False)
    plan = plan_for(other)
    del other  # a model of the plan that is alive might still be trained
    with pytest.raises(PlanMismatchError, match="seen: Net") as refused:
        run(tmp_path, HEAD + LOOP, "2", plan=plan)
    assert capsys.readouterr().out == ""  # no step was made
    message = str(refused.value)
    assert "'first' has shapes 64x32, 64 in the model, 64x32 in the plan" in message
    assert "\n" not in message
    assert "no model was called" in run(tmp_path, "print(1)").message


def test_a_script_that_trains_copies_of_the_weights_is_stopped_at_its_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copies = "[p.detach().clone().requires_grad_() for p in model.parameters()]"
    body = HEAD.replace("model.parameters()", copies) + LOOP
    with pytest.raises(PlanMismatchError, match="nearest is Net: AdamW trains tensors that no mod"):
        run(tmp_path, body, "2")
    assert capsys.readouterr().out == ""  # no step was made


ON_THE_OBJECT = {
    "Accelerate's": """
from accelerate import Accelerator
accelerator = Accelerator(cpu=True, mixed_precision="bf16")
model, optimizer = accelerator.prepare(model, optimizer)
""",
    "autocast alone": """
model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
""",
}


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("which", ON_THE_OBJECT)
def test_a_forward_under_autocast_on_the_object_makes_way_for_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], which: str
) -> None:
    """And the outputs of a model in BF16 stay FP32 where Accelerate makes them so."""
    losses = []
    for wrapping in ("", ON_THE_OBJECT[which]):
        assert run(tmp_path, HEAD + wrapping + LOOP, "3").was_applied
        losses.append(capsys.readouterr().out)
    assert losses[0] == losses[1]
    forget_accelerators()
    seen = "model.register_forward_hook(lambda m, a, out: print(out.dtype, file=sys.stderr))\n"
    plain = "with torch.no_grad(): model(torch.ones(1, 32))\n"
    run(tmp_path, HEAD + "model.bfloat16()\n" + ON_THE_OBJECT[which] + seen + plain + LOOP, "1")
    before, within = re.findall(r"torch\.\w+", capsys.readouterr().err)
    assert before == within == ("torch.float32" if "Acc" in which else "torch.bfloat16")


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("which", ON_THE_OBJECT)
def test_any_other_forward_on_the_object_stays_without_autocast(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], which: str
) -> None:
    """As TRL's head that is fused with its loss, under `bf16=True`."""
    losses = []
    other = "model.forward = types.MethodType(lambda self, x: Net.forward(self, x) * 2, model)\n"
    by_class = "forward = Net.forward\nNet.forward = lambda self, x: forward(self, x) * 2\n"
    for wrapping in (by_class, other + ON_THE_OBJECT[which]):
        assert run(tmp_path, "import types\n" + HEAD + wrapping + LOOP, "3").was_applied
        losses.append(capsys.readouterr().out)
    assert losses[0] == losses[1]


def test_a_plan_that_cannot_be_applied_is_one_error(tmp_path: Path) -> None:
    twice = HEAD + "import autoprec\nautoprec.apply(sys.argv[2], model, optimizer)\n" + LOOP
    plan_for(Net()).save(tmp_path / "plan.json")
    with pytest.raises(PlanMismatchError, match="one plan at a time"):
        run(tmp_path, twice, "2", str(tmp_path / "plan.json"))


def test_a_script_ends_as_python_ends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = "import sys, pickle\nclass A: pass\nprint(sys.argv[1:], __name__, sys.path[0])\n"
    body += "pickle.loads(pickle.dumps(A()))\n"
    assert run(tmp_path, body + "sys.exit(7)", "--lr", "3").status == 7
    assert capsys.readouterr().out == f"['--lr', '3'] __main__ {tmp_path}\n"
    assert run(tmp_path, body + "sys.exit('no data')").status == 1
    assert capsys.readouterr().err == "no data\n"
    failing = HEAD + "Net.forward = lambda self, x: 1 / 0\nmodel(torch.ones(1))\n"
    assert run(tmp_path, failing).status == 1
    trace = capsys.readouterr().err
    assert trace.startswith("Traceback (most recent call last):\n  File ")
    assert "integrations/launch" not in trace
    assert "ZeroDivisionError" in trace


def test_a_module_runs_as_python_m_runs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "launched_package"
    package.mkdir()
    write_script(package, "", name="__init__.py")
    write_script(package, "rate = 3\n", name="settings.py")
    names = "__name__, __package__, __spec__.name, __file__, __cached__"
    body = f"import sys\nfrom .settings import rate\nprint({names}, sys.argv, rate)\n"
    write_script(package, body, name="__main__.py")
    monkeypatch.chdir(tmp_path)
    command = [sys.executable, "-m", "launched_package", "--lr"]
    expected = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    script = Script("launched_package", ("--lr",), is_module=True)
    assert run_with_plan(script, plan_for(Net())).status == 0
    assert capsys.readouterr().out == expected
    with pytest.raises(WorkloadError, match=r"'launched_package\.no' is none that Python finds"):
        run_with_plan(Script("launched_package.no", is_module=True), plan_for(Net()))


SPAWNED = (
    HEAD.partition("model = Net()")[0]
    + """
def train(rank, seed):
    torch.manual_seed(seed + rank)
    model = Net() if len(sys.argv) < 4 else nn.Linear(32, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for x, y in batches(2):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    torch.save(model.state_dict(), f"{sys.argv[1]}/{rank}.pt")
    with open(f"{sys.argv[1]}/{rank}", "w") as file:
        print({p.dtype for p in model.parameters()}, file=file)

if __name__ == "__main__":
    import torch.multiprocessing as mp
    mp.start_processes(train, (3,), 2, start_method=sys.argv[2])
"""
)


@pytest.mark.parametrize("how", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_what_a_script_spawns_trains_with_the_plan(how: str, tmp_path: Path) -> None:
    outcome = run(tmp_path, SPAWNED, str(tmp_path), how)
    assert (outcome.status, outcome.was_applied) == (0, True)
    for rank in "01":
        assert (tmp_path / rank).read_text() == "{torch.bfloat16}\n"
        saved = torch.load(tmp_path / f"{rank}.pt")
        assert all(value.dtype is torch.float32 for value in saved.values())


def test_a_plan_that_fits_nothing_that_is_spawned_stops_the_script(tmp_path: Path) -> None:
    plan = plan_for(nn.Sequential(nn.Linear(5, 3)))
    with pytest.raises(PlanMismatchError, match="nearest is Linear"):
        run(tmp_path, SPAWNED, str(tmp_path), "fork", "other", plan=plan)
    assert not (tmp_path / "0").exists()


def test_a_guard_runs_the_schedule_of_a_plan(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_for(Net()).model_copy(update={"schedule": (Phase(start_step=2, fp8=False),)})
    assert run(tmp_path, HEAD + LOOP, "3", plan=plan).status == 0
    assert "the plan's schedule" in caplog.text
    assert "call autoprec.Guard" not in caplog.text
    poisoned = HEAD + LOOP.replace(
        "    optimizer.step()",
        "    model.head.weight.grad[0] = float('nan')\n"
        "    nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n"
        "    optimizer.step()",
    )
    poisoned += "assert model.head.weight.isfinite().all()\n"
    assert run(tmp_path, poisoned, "2", guard=True).status == 0
    with pytest.raises(PlanMismatchError, match="finite gradients, but it does not; it begins in"):
        run(tmp_path, poisoned, "2")


CLOSURES = """
for step in range(int(sys.argv[1])):
    def closure(poison=step == 1):
        optimizer.zero_grad()
        loss = F.mse_loss(model(torch.randn(16, 32)), torch.ones(16, 16))
        loss.backward()
        if poison:
            model.head.weight.grad[0] = float("nan")
        return loss
    optimizer.step(closure)
assert model.head.weight.isfinite().all()
"""


def test_a_guard_skips_a_bad_step_that_is_taken_with_a_closure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As Lightning's automatic optimization takes all of them."""
    assert run(tmp_path, HEAD + CLOSURES, "3", guard=True).status == 0
    assert "step skipped" in caplog.text
    failed = run(tmp_path, HEAD + CLOSURES, "3")
    assert failed.status == 1  # the script's own assertion


def _flat(value: object) -> list[object]:
    if isinstance(value, Tensor):
        return [value.dtype, *value.double().flatten().tolist()]
    if isinstance(value, dict):
        return [item for key, found in value.items() for item in (key, *_flat(found))]
    if isinstance(value, list | tuple):
        return [item for found in value for item in _flat(found)]
    return [value]
