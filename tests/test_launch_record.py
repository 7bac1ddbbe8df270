"""`autoprec tune --script`: a training script recorded, and tuned as if it had a model.py."""

import copy
import json
import logging
import math
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autoprec.cli.main import main
from autoprec.errors import WorkloadError
from autoprec.integrations.launch import Script, record_workload
from autoprec.integrations.launch.calls import RecordedBatch
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.records import BF16_O2, FP32, Plan
from autoprec.runtime import install_options
from autoprec.sensitivity.preconditioner import read_preconditioner
from autoprec.workload.functions import Workload, check_batches
from autoprec.workload.optimizers import name_of, optimizers_in
from autoprec.workload.training import Training
from tests.accelerate_state import fresh_accelerate
from tests.launch_scripts import APART, HEAD, LOOP, PARTS, SHARDED, own_main, write_script

__all__ = ["fresh_accelerate", "own_main"]
pytestmark = pytest.mark.usefixtures("own_main")
STEPS = 8
HF_STYLE = HEAD.replace(
    "    def forward(self, x):\n        return self.head(",
    "    def forward(self, x, labels):\n        logits = (self.head(",
).replace(
    "self.training))\n\ndef",
    "self.training)))\n"
    "        return {'logits': logits, 'loss': F.cross_entropy(logits, labels)}\n\ndef",
)


def record(folder: Path, body: str, *args: str, steps: int = STEPS) -> Workload:
    """Record a script of this text."""
    return record_workload(Script(write_script(folder, body), args or ("99",)), steps=steps)


def first_loss(workload: Workload) -> float:
    """Return the recorded loss of a first training batch on the recorded weights."""
    model = workload.build_model()
    torch.manual_seed(3)
    return float(workload.loss_fn(model, next(workload.train_batches(0))).detach())


def recorded(workload: Workload) -> list[RecordedBatch]:
    """Return every batch of the workload, each once."""
    training = list(islice(workload.train_batches(0), STEPS - 2))
    return [*training, *workload.eval_batches()]


def test_tensors_that_the_model_keeps_as_attributes_are_parts_of_the_loss(tmp_path: Path) -> None:
    """As llama2.c's loss is one, and the balance of many mixtures of experts, deep in the model."""
    kept = HF_STYLE.replace("        return {'logits': logits, 'loss':", "        self.loss = (")
    kept = kept.replace("labels)}", "labels))\n        return logits")
    balance = kept.replace("F.gelu(self.first(x))", "self.act(self.first(x))") + (
        "class Act(nn.Module):\n"
        "    def forward(self, x):\n"
        "        self.balance = x.pow(2).mean()\n"
        "        return F.gelu(x)\n"
        "model.act = Act()\n"
    )
    call = "logits = model(x, labels=y); loss = model.loss"
    for body, loss in (
        (kept, call),
        (balance, f"{call} + model.act.balance - F.relu(logits[0, 0])"),
    ):
        workload = record(
            tmp_path, body + LOOP.replace("loss = F.cross_entropy(model(x), y)", loss)
        )
        model, batch = workload.build_model().eval(), next(workload.train_batches(0))
        before = float(workload.loss_fn(model, batch).detach())
        torch.autograd.backward(workload.loss_fn(model, batch))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(parameter.grad, alpha=0.1)  # type: ignore[arg-type]  # all have one
        assert float(workload.loss_fn(model, batch).detach()) < before


def test_a_weight_beside_the_parts_of_a_model_is_the_model_s(tmp_path: Path) -> None:
    """As the log_std of a policy whose method calls its mean: PPO's on continuous actions."""
    head, _, tail = HEAD.partition("model = Net()")
    agent = """
class Agent(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.log_std = Net(), nn.Parameter(torch.zeros(16))
    def log_prob(self, x, y):
        mean = self.mean(x)
        normal = torch.distributions.Normal(mean, self.log_std.expand_as(mean).exp())
        return normal.log_prob(F.one_hot(y, 16).float()).sum(1)
model = Agent()
"""
    loop = LOOP.replace("F.cross_entropy(model(x), y)", "-model.log_prob(x, y).mean()")
    workload = record(tmp_path, head + agent + tail + loop)
    model = workload.build_model()
    torch.autograd.backward(workload.loss_fn(model, next(workload.train_batches(0))))
    assert model.get_parameter("log_std").grad is not None
    alone = "model = Net(); sigma = nn.Parameter(torch.ones(()))"
    loop = LOOP.replace("y)\n", "y) * sigma\n", 1)
    with pytest.raises(WorkloadError, match="a tensor that is one number that requires gradients"):
        record(tmp_path, head + alone + tail + loop)


def test_what_a_script_switches_on_for_its_process_is_off_behind_it(tmp_path: Path) -> None:
    switches = "torch.autograd.set_detect_anomaly(True)\ntorch.set_default_device('cpu')\n"
    switches += "import logging\nlogging.getLogger().setLevel(1)\n"
    level = logging.getLogger().level
    record(tmp_path, HEAD + switches + LOOP)
    assert logging.getLogger().level == level  # libraries tell of their locks at the lowest
    assert not torch.is_anomaly_enabled()  # every stage would take half as long again
    assert torch.utils._device.CURRENT_DEVICE is None


def test_a_plain_script_becomes_a_workload(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = torch.get_rng_state()
    workload = record(tmp_path, HEAD + LOOP)
    assert torch.equal(torch.get_rng_state(), before)  # the script seeds and draws for itself
    captured = capsys.readouterr()
    assert captured.out == ""
    losses = [float(line) for line in captured.err.splitlines()]
    assert len(losses) == STEPS - 1  # stopped in its last step
    check_batches(workload, seed=1)
    model = workload.build_model(seed=5)
    assert all(torch.equal(a, b) for a, b in _parameters(model, workload.build_model(seed=6)))
    optimizer = workload.build_optimizer(model)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert optimizer.state == {}
    for batch in islice(workload.train_batches(0), 200):
        optimizer.zero_grad()
        loss = workload.loss_fn(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert float(loss.detach()) < min(losses)
    one, other = (list(islice(workload.train_batches(seed), 6)) for seed in (1, 2))
    assert [id(batch) for batch in one] != [id(batch) for batch in other]
    assert {id(batch) for batch in one} == {id(batch) for batch in other}
    assert not {id(batch) for batch in one} & {id(batch) for batch in workload.eval_batches()}


def test_the_recorded_loss_is_that_of_the_script(tmp_path: Path) -> None:
    plain = record(tmp_path, HEAD + LOOP)
    net = plain.build_model()
    batch = next(plain.train_batches(0))
    torch.manual_seed(3)
    target = batch.constants[0]
    expected = nn.functional.cross_entropy(net(*batch.calls[0].args), target)
    assert first_loss(plain) == float(expected.detach())
    returned = LOOP.replace("F.cross_entropy(model(x), y)", "model(x, labels=y)['loss']")
    hf_style = record(tmp_path, HF_STYLE + returned)
    assert first_loss(hf_style) == first_loss(plain)
    found = [node.op for node in recorded(hf_style)[0].graph.nodes]
    assert found == ["call_module", "call_function", "output"]  # the model, and its tensor
    frozen = HEAD.replace("nn.LayerNorm(64)", "nn.BatchNorm1d(64).eval()")  # the rest trains
    built = record(tmp_path, frozen + LOOP).build_model()
    assert built.training
    assert not built.get_submodule("norm").training


def test_accumulation_and_scaling_are_taken_out_of_the_loss(tmp_path: Path) -> None:
    body = f"""{HEAD}
scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
for step in range(99):
    for x, y in batches(2):
        loss = F.cross_entropy(model(x), y) / 2
        scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
"""
    workload = record(tmp_path, body)
    assert len(workload.eval_batches()) == 4
    plain = record(tmp_path, HEAD + LOOP)
    assert 0.5 < first_loss(workload) / first_loss(plain) < 2


@pytest.mark.parametrize("to_none", [True, False])
def test_steps_that_a_scaler_skips_at_first_are_no_part_of_a_step(
    tmp_path: Path, *, to_none: bool
) -> None:
    body = f"""{HEAD}
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
for step in range(99):
    for x, y in batches(2):
        loss = F.cross_entropy(100 * model(x), y) / 2
        scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update(1024.0)
    optimizer.zero_grad(set_to_none={to_none})
"""
    workload = record(tmp_path, body)
    assert workload.accumulation_steps == 2
    assert len(recorded(workload)) == STEPS + 4 - 2


def test_losses_that_a_step_adds_up_are_worth_their_sum(tmp_path: Path) -> None:
    """A workload's step takes the mean of its batches, transformers' Trainer the sum."""
    body = """
for _ in range(99):
    for x, y in batches(2):
        (F.cross_entropy(model(x), y)FACTOR).backward()
    optimizer.step()
    optimizer.zero_grad()
"""
    added, averaged = (
        first_loss(record(tmp_path, HEAD + body.replace("FACTOR", factor)))
        for factor in ("", "/ 2")
    )
    assert added == 2 * averaged


STATE = """
import pathlib
import torch
from torch import nn
import torch.nn.functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.GRUCell(16, 16), nn.Linear(16, 4)
        self.hidden, self.sharpness = None, 1.0

    def forward(self, x):
        for step in x:
            self.hidden = self.cell(step, self.hidden)
        return self.head(self.hidden) * self.sharpness

torch.manual_seed(0)
model, generator, losses = Net(), torch.Generator().manual_seed(1), []
optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)
for step in range(99):
    x = torch.randn(3, 8, 16, generator=generator)
    with torch.no_grad():
        model(x)  # leaves a state behind
    model.hidden, model.sharpness = RESET, 1 + step
    loss = F.cross_entropy(model(x), torch.arange(8) % 4)
    losses.append(loss.item())
    pathlib.Path(__file__).with_name("losses.txt").write_text(repr(losses))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


@pytest.mark.parametrize("reset", ["None", "model.hidden.detach()"])
def test_what_a_script_sets_on_its_model_before_a_call_is_an_input_of_it(
    reset: str, tmp_path: Path
) -> None:
    """A hidden state that is reset for each batch (spikingjelly's too), and a schedule's value."""
    workload = record(tmp_path, STATE.replace("RESET", reset))
    wanted = json.loads((tmp_path / "losses.txt").read_text())
    model = workload.build_model()
    found = [float(workload.loss_fn(model, batch).detach()) for batch in recorded(workload)]
    assert sorted(found) == pytest.approx(sorted(wanted), rel=1e-5)
    training = Training(workload, model, workload.build_optimizer(model))
    for batch in recorded(workload):  # no graph of the batch before is in the way
        training.step([batch])


DISTRIBUTION = """
import torch
from torch import nn
from torch.distributions import Categorical

class Value:
    def __init__(self, value):
        self.value, self.itself = value, self

class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.actions, self.value = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(32, 1)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return Categorical(logits=self.actions(h)), Value(self.value(h)[:, 0])

torch.manual_seed(0)
policy = Policy()
optimizer = torch.optim.Adam(policy.parameters())
for step in range(99):
    x = torch.randn(16, 16)
    actions, found = policy(x)
    action = actions.sample()
    better = (action == x.argmax(1)).float() - found.value
    loss = -(actions.log_prob(action) * better.detach()).mean() + better.pow(2).mean()
    loss = loss - 0.01 * actions.entropy().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


def test_a_loss_may_come_from_what_an_object_holds(tmp_path: Path) -> None:
    """A distribution, and an object of the script's own."""
    workload = record(tmp_path, DISTRIBUTION)
    model = workload.build_model()
    torch.manual_seed(0)
    loss = workload.loss_fn(model, next(workload.train_batches(0)))
    loss.backward()  # type: ignore[no-untyped-call]  # torch's own stub
    assert all(parameter.grad is not None for parameter in model.parameters())
    torch.manual_seed(0)
    with install_options(model, {"body": BF16_O2, "actions": BF16_O2, "value": FP32}):
        low = workload.loss_fn(model, next(workload.train_batches(0)))
    assert float(low.detach()) == pytest.approx(float(loss.detach()), abs=0.05)


def test_a_penalty_on_the_slope_at_the_inputs_is_repeated(tmp_path: Path) -> None:
    penalty = """
    x.requires_grad_()
    slope, = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    loss = F.cross_entropy(model(x), y) + slope.square().sum(1).mean()
"""
    body = HEAD + LOOP.replace("    loss = F.cross_entropy(model(x), y)\n", penalty)
    workload = record(tmp_path, body)  # its first loss and gradient are the script's
    batch = next(workload.train_batches(0))
    for _ in range(2):  # no gradient stays in the batch
        torch.autograd.backward(workload.loss_fn(workload.build_model(), batch))
    assert all(constant.grad is None for constant in batch.constants)


def test_an_autograd_function_between_output_and_loss_is_repeated(tmp_path: Path) -> None:
    """A reversed gradient, as of an adversarial domain; the function may write behind versions."""
    function = """
class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor, scratch):
        ctx.factor, scratch.data[:] = factor, x
        return x.view_as(x)
    @staticmethod
    def backward(ctx, gradient):
        return -ctx.factor * gradient, None, None
reverse, scratch = Reversed.apply, torch.empty(16, 16)
"""
    before = vars(torch.autograd.Function).get("apply")  # inherited from torch 2.15 on
    body = LOOP.replace("model(x)", "reverse(model(x), 0.5, scratch)")
    workload = record(tmp_path, HEAD + function + body)
    assert vars(torch.autograd.Function).get("apply") is before
    plain = record(tmp_path, HEAD + LOOP)
    gradients = []
    for each in (workload, plain):
        model = each.build_model()
        torch.manual_seed(3)
        loss = each.loss_fn(model, each.eval_batches()[0])
        gradients.append(torch.autograd.grad(loss, [*model.parameters()]))
    for reversed_, usual in zip(*gradients, strict=True):
        torch.testing.assert_close(reversed_, -0.5 * usual)


def test_layers_whose_weights_a_script_multiplies_itself_are_fp32_alone(tmp_path: Path) -> None:
    """As a tied head or prototypes outside of the model; a penalty takes BF16 as it is."""
    own = "    loss = F.cross_entropy(model(x) @ model.head.weight[:, :16], y)\n"
    own += "    loss = loss + 1e-3 * model.first.weight.square().sum()\n"
    body = HEAD + LOOP.replace("    loss = F.cross_entropy(model(x), y)\n", own)
    workload = record(tmp_path, body)
    assert workload.written.multiplied == {"head.weight"}
    spec = capture_model(Context(workload, torch.device("cpu")))
    assert spec.layer("head").options == (FP32,)
    assert BF16_O2 in spec.layer("first").options


def test_weights_that_a_later_step_thaws_are_trained_in_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    by_step = "model.first.requires_grad_(thaw := 'thaw' in globals())\n    model.norm"
    loop = LOOP.replace("    loss =", f"    {by_step}.requires_grad_(False)\n    loss =")
    model = record(tmp_path, HEAD + loop).build_model()
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["norm.weight", "norm.bias"]  # in the optimizer, and frozen in all steps
    assert "2 parameters are frozen in the script's first step" in caplog.text


def test_a_hook_that_only_looks_at_a_gradient_is_no_hindrance(tmp_path: Path) -> None:
    looks = "out = model(x); out.register_hook(lambda g: print(g.dtype)); "
    looks += "out.register_hook(lambda g: g); "
    body = LOOP.replace(
        "loss = F.cross_entropy(model(x), y)", looks + "loss = F.cross_entropy(out, y)"
    )
    assert first_loss(record(tmp_path, HEAD + body)) == first_loss(record(tmp_path, HEAD + LOOP))


def test_a_model_in_16_bit_is_measured_in_fp32_behind_its_output_too(tmp_path: Path) -> None:
    body = HEAD + "model.to(torch.bfloat16)\nweights = torch.rand(16).bfloat16()\n" + LOOP
    body = body.replace("model(x), y)", "model(x.bfloat16()) @ weights.diag(), y)")
    workload = record(tmp_path, body)
    assert {p.dtype for p in workload.written_model().parameters()} == {torch.bfloat16}
    model, batch = workload.build_model(), next(workload.train_batches(0))
    loss = workload.loss_fn(model, batch)
    assert (loss.dtype, workload.written.dtypes) == (torch.float32, {torch.bfloat16})
    torch.autograd.backward(loss)
    written = workload.written_loss(workload.written_model(), batch)
    assert written.dtype is torch.bfloat16


def test_what_is_written_for_no_loss_is_not_repeated(tmp_path: Path) -> None:
    """As in an evaluation between the model's call and backward, of inputs with gradients."""
    looks = """
    out = model(x)
    with torch.no_grad():
        seen = model.first(torch.ones(2, 32, requires_grad=True))
        seen += model.first.bias
        half = out[:, :8]
        half *= 2.0  # but this is
"""
    body = LOOP.replace("    loss = F.cross_entropy(model(x), y)\n", looks + REST)
    workload = record(tmp_path, HEAD + body)
    names = [str(node.target) for node in recorded(workload)[0].graph.nodes]
    assert (sum("add_" in name for name in names), sum("mul_" in name for name in names)) == (0, 1)


REST = "    loss = F.cross_entropy(out.clone(), y)\n"
TRIALS = {
    "a dry run": "model(torch.zeros(2, 32))\n",
    "a part between parts that evaluate": "model.eval()\nmodel.head.train()\n"
    "model.head(model.norm(model.first(torch.zeros(2, 32))))\nmodel.train()\n",
    "lazy layers": "model.head = nn.LazyLinear(16)\nmodel(torch.zeros(2, 32))\n"
    "optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)\n",
}


@pytest.mark.parametrize("what", TRIALS)
def test_a_call_on_trial_before_training_is_not_recorded(tmp_path: Path, what: str) -> None:
    workload = record(tmp_path, HEAD + TRIALS[what] + LOOP)
    assert [
        len(args[0]) for batch in recorded(workload) for _, args, *_ in batch.calls.values()
    ] == [16] * STEPS
    assert math.isfinite(first_loss(workload))


def test_weights_that_are_initialized_after_a_call_on_trial_are_so_once(tmp_path: Path) -> None:
    body = """
model(torch.zeros(2, 32))
nn.init.xavier_uniform_(model.first.weight)  # drawn again, the first loss would be another one
model.head.bias.data[:4] += 1
model.head.bias = nn.Parameter(model.head.bias.view(-1))  # as YOLO's are
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
"""
    workload = record(tmp_path, HEAD + body + LOOP)
    net = workload.build_model()
    before = [parameter.clone() for parameter in net.parameters()]
    workload.loss_fn(net, recorded(workload)[0])
    assert all(map(torch.equal, before, net.parameters()))


def test_calls_that_one_loss_compares_are_one_batch(tmp_path: Path) -> None:
    """`record` runs the first step again: dropout must draw what it drew in each call."""
    views = "a, b = model(x), model(x + torch.rand_like(x)); loss = F.cross_entropy(a + b, y)"
    both = views + " + F.mse_loss(a, b)"
    body = "model(torch.zeros(2, 32))\n" + LOOP.replace("loss = F.cross_entropy(model(x), y)", both)
    workload = record(tmp_path, HEAD + body)
    batches = recorded(workload)
    assert [[len(call.args[0]) for call in batch.calls.values()] for batch in batches] == [
        [16, 16]
    ] * STEPS
    net, batch = workload.build_model().eval(), batches[0]
    a, b = (net(*call.args) for call in batch.calls.values())
    y = next(c for c in batch.constants if c.dtype is torch.int64)
    expected = nn.functional.cross_entropy(a + b, y) + nn.functional.mse_loss(a, b)
    torch.testing.assert_close(workload.loss_fn(net, batch), expected)


def test_a_model_that_goes_on_from_its_own_output_is_one_batch(tmp_path: Path) -> None:
    on = "for _ in range(3): z = z + F.pad(model(z), (8, 8)).tanh()"
    rolled = f"z = x\n    {on}\n    loss = F.cross_entropy(model(z), y)"
    workload = record(tmp_path, HEAD + LOOP.replace("loss = F.cross_entropy(model(x), y)", rolled))
    net, batch = workload.build_model().eval(), recorded(workload)[0]
    z = batch.calls[0].args[0]
    for _ in range(3):
        z = z + nn.functional.pad(net(z), (8, 8)).tanh()
    y = next(c for c in batch.constants if c.dtype is torch.int64)
    torch.testing.assert_close(
        workload.loss_fn(net, batch), nn.functional.cross_entropy(net(z), y), rtol=1e-6, atol=0
    )


def test_parts_that_a_method_of_their_model_calls_are_recorded_as_that_model(
    tmp_path: Path,
) -> None:
    workload = record(tmp_path, PARTS)
    assert type(workload.build_model()).__name__ == "Net"
    assert [call.path for call in recorded(workload)[0].calls.values()] == ["first", "norm", "head"]
    assert first_loss(workload) == first_loss(record(tmp_path, HEAD + LOOP))


def test_a_parametrized_weight_that_is_read_is_no_model(tmp_path: Path) -> None:
    read = "nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)).weight\n"
    record(tmp_path, HEAD + read + LOOP)


def test_a_model_that_keeps_what_has_no_copy_is_recorded(tmp_path: Path) -> None:
    body = HEAD + (
        "import multiprocessing, threading\n"
        "class Config(dict):\n"
        "    __getattr__ = dict.__getitem__\n"  # so it has no __deepcopy__, with a KeyError
        "model.config, model.head.lock = Config(width=64), threading.Lock()\n"
        "model.first.shared = multiprocessing.Lock()\n"
    )
    workload = record(tmp_path, body + LOOP)
    one, other = workload.build_model(), workload.build_model()
    assert one.config is other.config
    assert all(a is not b for a, b in _parameters(one, other))
    Training(workload, one, workload.build_optimizer(one)).step(
        list(islice(workload.train_batches(0), 1))
    )
    assert not torch.equal(one.head.weight, other.head.weight)  # type: ignore[union-attr,arg-type]


def test_a_function_that_closes_over_layers_is_that_of_each_copy(tmp_path: Path) -> None:
    closure = (
        "def closing_over(layer):\n    return lambda x, *, scale=2: scale * layer(x)\n"
        "model.first_of = closing_over(model.first)\n"
    )
    workload = record(tmp_path, HEAD.replace("self.first(x)", "self.first_of(x)") + closure + LOOP)
    before = first_loss(workload)
    model = workload.build_model()
    Training(workload, model, workload.build_optimizer(model)).step(
        list(islice(workload.train_batches(0), 1))
    )
    assert first_loss(workload) == before


def test_weights_that_are_pruned_stay_pruned(tmp_path: Path) -> None:
    prune = "from torch.nn.utils import prune\nprune.l1_unstructured(model.first, 'weight', 0.5)\n"
    workload = record(tmp_path, HEAD + prune + LOOP)
    models = [workload.build_model() for _ in range(2)]
    for model in models:  # each trains weights of its own behind the mask
        loss = workload.loss_fn(model, next(workload.train_batches(0)))
        torch.autograd.backward(loss)
        gradient = model.get_parameter("first.weight_orig").grad
        assert gradient is not None
        assert gradient.count_nonzero() == gradient.numel() // 2


def test_the_wrapper_of_fabric_is_not_the_model(tmp_path: Path) -> None:
    """It rounds the model's inputs; `record` runs the first step again with them as they were."""
    head = HEAD.replace("self.first(x)", "self.first(x + 64 * torch.finfo(x.dtype).eps)")
    body = f"""{head}
import lightning as L
fabric = L.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
model, optimizer = fabric.setup(model, optimizer)
{LOOP.replace("loss.backward()", "fabric.backward(loss)")}"""
    workload = record(tmp_path, body)
    assert type(workload.build_model()).__name__ == "Net"
    assert workload.written.script_autocast is torch.bfloat16
    assert {t.dtype for batch in recorded(workload) for t in batch.calls[0].args} == {torch.float32}
    assert math.isfinite(first_loss(workload))


def test_an_engine_around_the_model_is_not_the_model(tmp_path: Path) -> None:
    """DeepSpeed's has a `zero_grad` of its own and locks, so that it is no module to copy."""
    engine = """
import threading
class Engine(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module, self.lock = module, threading.Lock()
    def forward(self, x):
        return self.module(x)
    def zero_grad(self):
        raise NotImplementedError
engine = Engine(model)
"""
    plain = record(tmp_path, HEAD + LOOP)
    wrapped = record(tmp_path, HEAD + engine + LOOP.replace("model(x)", "engine(x)"))
    assert type(wrapped.build_model()).__name__ == "Net"
    assert first_loss(wrapped) == first_loss(plain)


def test_what_a_solver_makes_around_the_model_at_each_call_is_not_the_model(tmp_path: Path) -> None:
    solver = """
class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner
    def forward(self, x):
        return self.inner(x)
def solve(function, x):
    function = Wrapper(Wrapper(function))
    return function(x)
"""
    plain = record(tmp_path, HEAD + LOOP)
    wrapped = record(tmp_path, HEAD + solver + LOOP.replace("model(x)", "solve(model, x)"))
    assert type(wrapped.build_model()).__name__ == "Net"
    assert first_loss(wrapped) == first_loss(plain)
    own = record(tmp_path, HEAD + solver + "model = Wrapper(model)\n" + LOOP)
    assert type(own.build_model()).__name__ == "Wrapper"
    apart = APART.replace("class Trainer", f"{solver}class Trainer").replace("BEFORE", "pass")
    apart = apart.replace("self.head(self.body(x))", "solve(self.head, self.body(x))")
    names = [name for name, _ in record(tmp_path, apart).build_model().named_children()]
    assert names == ["body", "head"]


def test_a_model_that_fsdp_shards_in_one_process_is_recorded_whole(tmp_path: Path) -> None:
    """`record` itself repeats the first step, in the dtypes of FSDP's policy."""
    try:
        workload = record(tmp_path, SHARDED + LOOP)
    finally:
        torch.distributed.destroy_process_group()
    model = workload.build_model()
    assert {type(p) for p in model.parameters()} == {nn.Parameter}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert [type(m).__name__ for m in (model, model.first)] == ["Net", "Linear"]
    assert workload.written.script_autocast is torch.bfloat16
    optimizer = workload.build_optimizer(model)
    torch.autograd.backward(workload.loss_fn(model, next(workload.train_batches(0))))
    optimizer.step()
    assert all(len(optimizer.state[p]) == 3 for p in model.parameters())


def test_a_gradient_that_fsdp_reduces_with_a_later_one_is_the_first_one_s(tmp_path: Path) -> None:
    """`record` compares the first backward's gradient, which FSDP keeps back here."""
    loop = """
for step in range(9):
    for last in (False, True):
        model.set_requires_gradient_sync(last)
        x, y = next(batches(1))
        (0.5 * F.cross_entropy(model(x), y)).backward()
    optimizer.step()
    optimizer.zero_grad()
"""
    try:
        workload = record(tmp_path, SHARDED + loop)
    finally:
        torch.distributed.destroy_process_group()
    assert workload.accumulation_steps == 2


def test_what_happens_between_output_and_loss_is_repeated(tmp_path: Path) -> None:
    loss = """
    logits = model(x)
    with torch.no_grad():
        weight = logits.softmax(-1).amax(-1)
        accuracy = (logits.argmax(-1) == y).float().mean().item()
    picked = torch.zeros(16)
    picked[:] = logits[torch.arange(16), y]
    picked[0] *= 2.0
    rows = torch.logsumexp(logits, -1) - picked
    total = torch.zeros(())
    total += (rows * weight).sum() / weight.sum()
    stop = torch.tensor(8)
    total += 0.1 * logits[:, :stop].max(-1).values.mean()
    total += 1e-3 * sum(p.square().sum() for p in model.parameters())
    loss = total + 0.0 * nn.functional.mse_loss(logits, torch.zeros_like(logits))
"""
    body = HEAD + LOOP.replace("\n    loss = F.cross_entropy(model(x), y)\n", loss)
    workload = record(tmp_path, body)
    for scale in (1.0, 0.5):  # other weights than the recorded ones
        net = workload.build_model()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.mul_(scale)
        net.eval()
        batch = recorded(workload)[0]
        logits, y = (
            net(*batch.calls[0].args),
            next(c for c in batch.constants if c.dtype is torch.int64),
        )
        y = next(c for c in batch.constants if c.dtype is torch.int64 and (c.diff() != 1).any())
        picked = logits[torch.arange(16), y] * torch.tensor([2.0] + [1.0] * 15)
        weight = logits.detach().softmax(-1).amax(-1)
        rows = torch.logsumexp(logits, -1) - picked
        penalty = sum(float(p.detach().square().sum()) for p in net.parameters())
        best = float(logits[:, :8].max(-1).values.mean().detach())
        expected = float(((rows * weight).sum() / weight.sum()).detach())
        expected += 0.1 * best + 1e-3 * penalty
        for _ in range(2):  # constants that are written into start afresh
            assert math.isclose(
                float(workload.loss_fn(net, batch).detach()), expected, rel_tol=1e-5
            )


def test_a_step_with_a_closure_is_recorded_as_one_without(tmp_path: Path) -> None:
    """As Lightning's automatic optimization steps: forward and backward are in the closure."""
    step = """
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss
    optimizer.step(closure=closure)
"""
    in_closure = record(tmp_path, HEAD + LOOP[: LOOP.index("    loss")] + step)
    plain = record(tmp_path, HEAD + LOOP)
    assert [len(in_closure.eval_batches()), first_loss(in_closure)] == [2, first_loss(plain)]
    one, other = (w.build_optimizer(w.build_model()) for w in (in_closure, plain))
    assert one.state_dict() == other.state_dict()


MUON = """
matrices = [model.first.weight, model.head.weight]
others = [p for p in model.parameters() if not any(p is m for m in matrices)]
optimizers = torch.optim.AdamW(others, lr=1e-2), torch.optim.Muon(matrices, lr=0.02)
"""


def test_optimizers_that_step_in_turn_train_as_in_the_script(tmp_path: Path) -> None:
    """And so after their state was saved and loaded."""
    script = HEAD + MUON + LOOP.replace("optimizer.step()", "[each.step() for each in optimizers]")
    workload = record(tmp_path, script.replace("optimizer.zero_grad()", "model.zero_grad()"))
    model, again = workload.build_model(), workload.build_model()
    training = Training(workload, model, workload.build_optimizer(model))
    by_hand: dict[str, Any] = {"model": again, "torch": torch}
    exec(MUON, by_hand)
    for step, batch in enumerate(recorded(workload)[:4]):
        if step == 2:
            state = copy.deepcopy(training.optimizer.state_dict())
            training.optimizer = workload.build_optimizer(model)
            training.optimizer.load_state_dict(state)
        torch.manual_seed(step)
        training.step([batch])
        torch.manual_seed(step)
        again.zero_grad()
        torch.autograd.backward(workload.loss_fn(again, batch))
        for each in by_hand["optimizers"]:
            each.step()
        assert all(map(torch.equal, model.parameters(), again.parameters()))
    names = {type(each).__name__ for each in optimizers_in(training.optimizer)}
    assert names == {"AdamW", "Muon", "SeveralOptimizers"}
    assert name_of(training.optimizer) == "AdamW and Muon"
    assert read_preconditioner(training.optimizer).name == "adam+measured"


def test_an_optimizer_of_optimizers_is_one(tmp_path: Path) -> None:
    own = "from tests.optimizer_zoo import TwoOptimizers\noptimizer = TwoOptimizers(*optimizers)\n"
    workload = record(tmp_path, HEAD + MUON + own + LOOP)
    assert type(workload.build_optimizer(workload.build_model())).__name__ == "TwoOptimizers"


@pytest.mark.parametrize(
    ("change", "is_told"),
    [
        ("nn.utils.clip_grad_value_(model.parameters(), 1e-3)", True),
        ("nn.utils.clip_grad_norm_(model.head.parameters(), 1e-3)", True),
        ("nn.utils.clip_grad_norm_(model.parameters(), 1e-3)", False),
        ("[p.grad.mul_(0.5) for p in model.parameters()]", False),
        ("[p.grad.mul_(1e-4 / p.grad.norm()) for p in model.parameters()]", True),
        ("loss < 2.9 and nn.utils.clip_grad_value_(model.parameters(), 1e-3)", True),
        ("model.head.weight.grad = None", True),
    ],
)
def test_gradients_that_a_script_changes_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str, is_told: bool
) -> None:
    record(tmp_path, HEAD + LOOP.replace("optimizer.step()", f"{change}; optimizer.step()"))
    assert ("changes gradients before a step" in caplog.text) is is_told
    if "1e-4" in change:
        assert "takes one of 8.3e-05 times the norm" in caplog.text


def test_gradients_that_are_zeroed_before_backward_are_not_the_losss(tmp_path: Path) -> None:
    workload = record(tmp_path, HEAD + LOOP.replace("zero_grad()", "zero_grad(set_to_none=False)"))
    net = workload.build_model()  # it has no gradients to zero
    for batch in recorded(workload):
        assert workload.loss_fn(net, batch).isfinite()


def test_a_warm_up_does_not_decide_the_learning_rate(tmp_path: Path) -> None:
    by_epoch = """
schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: min(1.0, epoch / 100))
"""
    workload = record(tmp_path, HEAD + by_epoch + LOOP)  # not stepped in what is recorded
    optimizer = workload.build_optimizer(workload.build_model())
    assert optimizer.param_groups[0]["lr"] == 1e-2
    assert not workload.defines("build_scheduler")
    optimizer.step()


def test_rates_that_a_script_sets_by_hand_count_at_their_highest(tmp_path: Path) -> None:
    rise = "optimizer.param_groups[0]['lr'] = min(rate := rate + 1e-3, 5e-3); optimizer.step()"
    workload = record(tmp_path, HEAD + "rate = 0.0" + LOOP.replace("optimizer.step()", rise))
    optimizer = workload.build_optimizer(workload.build_model())
    assert optimizer.param_groups[0]["lr"] == 5e-3


@pytest.mark.usefixtures("fresh_accelerate")
def test_the_autocast_of_accelerate_is_not_the_models(tmp_path: Path) -> None:
    body = HEAD + "from accelerate import Accelerator\n"
    body += "accelerator = Accelerator(cpu=True, mixed_precision='bf16')\n"
    body += "model, optimizer = accelerator.prepare(model, optimizer)\n"
    workload = record(
        tmp_path, body + LOOP.replace("loss.backward()", "accelerator.backward(loss)")
    )
    net = workload.build_model()
    batch = next(workload.train_batches(0))
    seen = []
    net.get_submodule("head").register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    workload.loss_fn(net, batch)
    assert seen == [torch.float32]


def test_checkpointing_and_a_compiled_model_are_recorded(tmp_path: Path) -> None:
    """`record` itself runs the first step again and raises where it is not the script's."""
    body = HEAD.replace(
        "F.gelu(self.first(x))",
        "torch.utils.checkpoint.checkpoint(self.first, x, use_reentrant=True)",
    ).replace("import sys", "import sys, torch.utils.checkpoint")
    body = body.replace("x = torch.randn(16, 32)", "x = torch.randn(16, 32, requires_grad=True)")
    body = body.replace("yield x, x[", "yield x, x.detach()[")
    record(tmp_path, body + LOOP)
    record(tmp_path, HEAD + "model = torch.compile(model, backend='eager')\n" + LOOP)


def test_models_that_are_trained_side_by_side_become_one(tmp_path: Path) -> None:
    """`record` itself runs the first step again and raises where it is not the script's."""
    workload = record(tmp_path, APART.replace("BEFORE", "pass"))
    model = workload.build_model()
    assert type(model) is nn.ModuleDict
    assert [*model.keys()] == ["body", "head"]
    (group,) = workload.build_optimizer(model).param_groups
    assert group["params"] == list(model.parameters())
    lines = APART.replace("BEFORE", "pass").replace(
        "nn.Linear(16, 16)", "nn.Linear(16, 16); self.tail = nn.Linear(16, 16)"
    )
    lines = lines.replace("*self.head.p", "*self.tail.parameters(), *self.head.p")
    lines = lines.replace("self.head(self.body(x))", "self.tail(self.head(self.body(x)))")
    names = [name for name, _ in record(tmp_path, lines).build_model().named_children()]
    assert names == ["body", "head", "tail"]


def test_models_in_a_dict_of_the_script_have_its_keys_for_names(tmp_path: Path) -> None:
    lines = "parts = {'body': Net(), 'top': nn.Linear(16, 16)}\n"
    lines += "optimizer = torch.optim.SGD([p for m in parts.values() for p in m.parameters()])\n"
    body = HEAD + lines + LOOP.replace("model(x)", "parts['top'](parts['body'](x))")
    names = [name for name, _ in record(tmp_path, body).build_model().named_children()]
    assert names == ["body", "top"]


REFUSALS = {
    "a second phase": (
        "    loss = F.cross_entropy(model(x), y)",
        "    if optimizer.state and optimizer.state[model.head.bias]['step'] == 2:\n"
        "        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)\n"
        "    loss = F.cross_entropy(model(x), y)",
        r"a new SGD takes over weights of AdamW after 2 steps \(--script-steps 2 tunes",
    ),
    "steps within backward": (
        "    loss.backward()",
        "    model.head.bias.register_post_accumulate_grad_hook(lambda _: optimizer.step())\n"
        "    loss.backward()",
        "must step after backward, but AdamW steps within it",
    ),
    "too many calls": (
        "loss = F.cross_entropy(model(x), y)",
        "loss = sum(F.cross_entropy(model(x), y) for _ in range(17))",
        "at most 16 times before a backward",
    ),
    "two models": (
        "loss = F.cross_entropy(model(x), y)",
        "loss = F.cross_entropy(other(model(x)), y)",
        r"no optimizer has the weights of Linear: call it under torch.no_grad\(\)",
    ),
    "models without a name": (
        "loss = F.cross_entropy(model(x), y)",
        "loss = F.cross_entropy(unnamed[0](model(x)), y)",
        "models that are variables of the script, but it calls Net and Linear",
    ),
    "models that take turns": (
        "optimizer.step()",
        "optimizer.step(); (other(x[:, :16]).sum() + model(x).sum()).backward()",
        "but Linear is called after a step of Net alone, as an actor and its critic or the two",
    ),
    "no backward": ("loss.backward()", "pass", "neither was seen"),
    "two backward passes": (
        "loss.backward()",
        "loss.backward(retain_graph=True); loss.backward()",
        "or twice",
    ),
    "no step": ("optimizer.step()", "pass", "but none did"),
    "steps by hand": (
        "optimizer.step()",
        "[p.data.sub_(p.grad) for p in model.parameters()]",
        "takes the next at other weights",
    ),
    "a sharpness-aware step": (
        "loss.backward()",
        "loss.backward(); [p.data.add_(p.grad, alpha=0.1) for p in model.parameters()]; "
        "optimizer.zero_grad(); loss = F.cross_entropy(model(x), y); loss.backward()",
        "or SAM",
    ),
    "a line search": (
        "optimizer.step()",
        "torch.optim.LBFGS(model.parameters()).step("
        "lambda: [loss := model(x).sum(), loss.backward()][0])",
        "closure again and again",
    ),
    "another optimizer": (
        "optimizer.step()",
        "optimizer.step(); torch.optim.SGD(model.parameters(), lr=0.1).step()",
        "steps two",
    ),
    "optimizers that take turns": (
        "optimizer.step()",
        "turns.reverse(); turns[0].step()",
        "not so Adam and SGD",
    ),
    "weights apart from layers": (
        "loss = F.cross_entropy(model(x), y)",
        "loss = F.cross_entropy(Apart()(x), y) + Apart()(x).sum()",
        "but Apart has them elsewhere",
    ),
    "copies of the weights": (
        "optimizer.step()",
        "copies.step()",
        "ZeRO makes: set its stage to 0",
    ),
    "another's weights": ("optimizer.step()", "others.step()", "has others"),
    "an unseen function": (
        "loss = F.cross_entropy(model(x), y)",
        "loss = Doubled.apply(model(x), len).sum()",
        "DoubledBackward, of an autograd function of its own",
    ),
    "a learned weight of the loss": (
        "loss = F.cross_entropy(model(x), y)",
        "loss = other.bias[:4].exp().sum() * F.cross_entropy(model(x), y)",
        r"also depends on a weight of shape \(16,\) of Linear that is not the model's",
    ),
    "a penalty from before the call": (
        "loss = F.cross_entropy(model(x), y)",
        "penalty = model.head.weight.square().sum(); loss = F.cross_entropy(model(x), y) + penalty",
        "SumBackward0 of the model's weights, from before the model's call",
    ),
    "a scripted model": (
        "loss = F.cross_entropy(model(x), y)",
        "model = torch.jit.script(nn.Linear(32, 16)); loss = F.cross_entropy(model(x), y)",
        "torch.jit has scripted it",
    ),
    "lazy layers": (
        "loss = F.cross_entropy(model(x), y)",
        "model.head = nn.LazyLinear(16); loss = F.cross_entropy(model(x), y)",
        "run a batch through it before",
    ),
    "a hook": (
        "loss = F.cross_entropy(model(x), y)",
        "out = model(x); out.register_hook(lambda g: 2 * g); loss = F.cross_entropy(out, y)",
        "gradient hook",
    ),
    "a batch without a copy": (
        "loss = F.cross_entropy(model(x), y)",
        "import threading; model(x, threading.Lock()); loss = F.cross_entropy(model(x), y)",
        "can be copied",
    ),
    "computed weights": (
        "loss = F.cross_entropy(model(x), y)",
        "new = {n: 2 * p for n, p in model.named_parameters()}; "
        "loss = F.cross_entropy(torch.func.functional_call(model, new, x), y)",
        r"first\.weight, first\.bias, .* are computed from others",
    ),
    "a closure in the place of forward": (
        "loss = F.cross_entropy(model(x), y)",
        "model.forward = lambda x: Net.forward(main, 2 * x); loss = F.cross_entropy(model(x), y)",
        "make that a method",
    ),
    "hidden inputs": (
        "loss = F.cross_entropy(model(x), y)",
        "model.shift = y[0].item(); loss = F.cross_entropy(model(x), y)",
        "repeat the script's first step",
    ),
}
EXTRA = """
main, other, unnamed = model, nn.Linear(16, 16), [nn.Linear(16, 16)]
copies = torch.optim.SGD([p.detach().clone() for p in model.parameters()], lr=0.1)
others = torch.optim.SGD([*model.parameters(), *unnamed[0].parameters()], lr=0.1)
turns = [torch.optim.SGD(model.first.parameters()), torch.optim.Adam(model.head.parameters())]
class Apart(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterDict({"kernel": torch.ones(16, 32)})
    def forward(self, x):
        return F.linear(x, self.weights["kernel"])
class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, function):
        return 2 * x
    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient, None
shift = [0]
Net.forward_ = Net.forward
def forward(self, x):
    shift[0] += 1
    return self.forward_(x) + (shift[0] if hasattr(self, "shift") else 0) * x[:, :16]
Net.forward = forward
"""


@pytest.mark.parametrize("case", REFUSALS)
def test_a_script_that_cannot_be_recorded_gets_one_clear_line(case: str, tmp_path: Path) -> None:
    before, after, word = REFUSALS[case]
    with pytest.raises(WorkloadError, match=word) as refused:
        record(tmp_path, HEAD + EXTRA + LOOP.replace(before, after), "10", steps=4)
    assert "\n" not in str(refused.value)
    assert type(nn.Module.__call__).__name__ == "function"
    assert nn.Module.__call__ is nn.Module._wrapped_call_impl


def test_a_script_that_ends_early_or_fails_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = HEAD.index("model = ")
    for body in (HEAD + LOOP, HEAD + LOOP + HEAD[made:] + LOOP):  # the next fold is another model
        with pytest.raises(WorkloadError, match="trained its model for 9; ask for fewer, or let"):
            record(tmp_path, body, "9", steps=10)
    with pytest.raises(WorkloadError, match="trained its model for 5; let it train longer"):
        record(tmp_path, HEAD + LOOP, "5")  # fewer than 8 cannot be asked for
    with pytest.raises(WorkloadError, match="none was in this process"):
        record(tmp_path, "print(1)")
    with pytest.raises(WorkloadError, match="exit status 1"):
        record(tmp_path, "raise KeyError('data')")
    assert "KeyError: 'data'" in capsys.readouterr().err


def test_tune_of_a_script_writes_the_records_resumes_and_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The script counts its runs in a file: a resumed tune does not run it again."""
    count = "with open(__file__ + '.runs', 'a') as runs:\n    runs.write('.')\n"
    script, out = write_script(tmp_path, count + HEAD + LOOP), tmp_path / "out"
    tune = ["tune", "--script", script, "--script-steps", "16", "--target", "h100-sxm", "--json"]
    tune += ["--no-verify", "--trials", "1", "--recipes", "tensorwise", "--out", str(out)]

    def run_command(*arguments: str) -> tuple[str, str]:
        with pytest.raises(SystemExit) as leaving:
            main([*arguments])
        captured = capsys.readouterr()
        assert leaving.value.code == 0, captured.err
        return captured.out, captured.err

    printed, _ = run_command(*tune, "--", "99")
    assert "train.py was stopped after 16 training steps" in caplog.text
    assert sum(json.loads(printed)["layers"].values()) == 3
    names = [layer.name for layer in Plan.load(out / "plan.json").layers]
    assert names == ["first", "norm", "head"]
    assert (out / "report.html").exists()
    runs = Path(f"{script}.runs")
    assert len(runs.read_text()) == 1
    run_command(*tune, "--resume", "--", "99")
    assert len(runs.read_text()) == 1
    _, logged = run_command("run", "--plan", str(out / "plan.json"), script, "3")
    assert len(runs.read_text()) == 2
    assert logged.splitlines()[-1].startswith("autoprec: plan applied to Net")


def test_a_module_is_tuned_as_python_m_runs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "recorded_package"
    package.mkdir()
    write_script(package, HEAD, name="net.py")
    write_script(package, "from .net import *\nfrom .net import sys\n" + LOOP, name="__main__.py")
    monkeypatch.chdir(tmp_path)
    workload = record_workload(Script.of("-m", ("recorded_package", "99")), steps=STEPS)
    assert math.isfinite(first_loss(workload))
    with pytest.raises(WorkloadError, match="nothing follows it"):
        Script.of("-m", ())


def test_training_in_a_thread_is_said_to_be(tmp_path: Path) -> None:
    loop = LOOP.replace("\n", "\n    ")
    start = "import threading\nt = threading.Thread(target=train)\nt.start()\nt.join()"
    with pytest.raises(WorkloadError, match="main thread, but runs in another"):
        record(tmp_path, f"{HEAD}\ndef train():{loop}\n{start}\n")


def test_one_process_that_a_script_spawns_is_recorded(tmp_path: Path) -> None:
    loop = LOOP.replace("sys.argv[1]", "steps").replace("\n", "\n    ")
    spawn = "torch.multiprocessing.spawn(train, (99,), int(sys.argv[1]))"
    body = f"{HEAD}\ndef train(rank, steps):{loop}\n{spawn}\n"
    assert math.isfinite(first_loss(record(tmp_path, body, "1")))
    with pytest.raises(WorkloadError, match="but the script spawns 2 "):
        record(tmp_path, body, "2")


def _parameters(*models: nn.Module) -> list[tuple[nn.Parameter, ...]]:
    return list(zip(*(model.parameters() for model in models), strict=True))
