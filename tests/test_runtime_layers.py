"""A plan on layers that are more than a matrix: fast paths, states, parametrizations, layouts."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import autoprec
from autoprec.model.layers import find_layers
from autoprec.records import BF16_O2, FP32, Option, Recipe, fp8_option
from autoprec.runtime import trace_step, uniform_plan
from autoprec.runtime.activations import ActivationMode
from autoprec.runtime.install import is_chain
from tests.plans import plan_for

TENSORWISE = fp8_option(Recipe.TENSORWISE)


def trained(
    model: nn.Module,
    *inputs: Any,
    option: Option = BF16_O2,
    others: dict[str, Option] | None = None,
    steps: int = 3,
) -> torch.optim.Optimizer:
    """Apply a plan, train, prove what ran."""
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    autoprec.apply(plan_for(model, option, others), model, optimizer)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(*inputs)
        loss = output.square().mean()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    assert output.dtype is torch.float32
    assert losses[-1] < losses[0]
    assert all(check.is_good for check in autoprec.verify_applied(model, inputs))
    return optimizer


def is_close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())


# --- sequences of several lengths ------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of dynamo itself
@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_fp8_layers_take_jagged_tensors_as_the_matrix_of_their_rows(is_compiled: bool) -> None:
    rows, offsets = torch.randn(32, 32), torch.tensor([0, 9, 32])
    gradients = []
    for is_jagged in (False, True):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        autoprec.apply(plan_for(model, TENSORWISE), model)
        x = rows
        if is_jagged:
            x = torch.nested.nested_tensor_from_jagged(rows, offsets, min_seqlen=9, max_seqlen=23)
            if is_compiled:
                model.compile(backend="aot_eager", fullgraph=True)
        output = model(x)
        torch.autograd.backward((output.values() if is_jagged else output).square().sum())
        gradients.append([p.grad for p in model.parameters()])
    torch._dynamo.reset()
    assert output._maybe_max_seqlen == 23
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


# --- attention -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # the FP32 fast path's own
@pytest.mark.parametrize("option", [FP32, BF16_O2, TENSORWISE], ids=str)
@pytest.mark.parametrize("is_padded", [False, True])
def test_torchs_encoder_runs_the_plan_in_eval_whose_fast_path_knows_none(
    option: Option, is_padded: bool
) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2)
    x = torch.randn(4, 16, 32)
    padding = torch.arange(16).expand(4, -1) >= 12 if is_padded else None
    run = functools.partial(model, x, src_key_padding_mask=padding)
    trained(model, x, option=option)
    expected = autoprec.master_view(model).eval()(x, src_key_padding_mask=padding)
    model.eval()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            kept = slice(12) if is_padded else slice(None)
            assert is_close(run()[:, kept], expected[:, kept], 0.1)
    if option is not FP32:
        traces = trace_step(model, run)
        kernel = "_scaled_mm float8_e4m3fn" if option.is_fp8 else "addmm bfloat16"
        assert kernel in traces["layers.1.linear1"].forward


@pytest.mark.parametrize("option", [BF16_O2, TENSORWISE], ids=str)
def test_torchs_whole_transformer_trains_with_causal_masks(option: Option) -> None:
    class Translate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = nn.Transformer(32, 4, 1, 1, 64, dropout=0.0, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            mask = nn.Transformer.generate_square_subsequent_mask(16)
            return self.transformer(x, x, tgt_mask=mask)

    model, x = Translate(), torch.randn(2, 16, 32)
    trained(model, x, option=option, steps=4)
    model.eval()
    with torch.no_grad():
        assert is_close(model(x), autoprec.master_view(model)(x), 0.1)


# --- in place --------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [8, 5])  # of 4 sequences: 20 rows are padded to 32
def test_a_models_code_changes_in_place_what_an_fp8_layer_without_bias_gives(tokens: int) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = (nn.Linear(32, 32, bias=False) for _ in range(2))

        def forward(self, x: Tensor) -> Any:
            hidden = F.relu(self.up(x), inplace=True)
            output = self.down(hidden)
            output += x
            return output

    model, x = InPlace(), torch.randn(4, tokens, 32)
    expected = model(x).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    autoprec.apply(plan_for(model, TENSORWISE), model, optimizer)
    output = model(x)
    assert is_close(output, expected, 0.1)
    output.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


# --- recurrence ------------------------------------------------------------------------------


class Sequence(nn.Module):
    """A recurrent layer and a linear; packed if asked."""

    def __init__(self, recurrent: Any, *, is_packed: bool = False) -> None:
        super().__init__()
        self.recurrent, self.is_packed = recurrent, is_packed
        self.head = nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Any:
        if not self.is_packed:
            return self.head(self.recurrent(x)[0])
        packed = nn.utils.rnn.pack_padded_sequence(x, [8, 7, 5, 2], batch_first=True)
        output, _ = self.recurrent(packed)
        return self.head(nn.utils.rnn.pad_packed_sequence(output, batch_first=True)[0])


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_train_and_come_back(cls: Any, is_packed: bool) -> None:
    recurrent = cls(32, 32, 2, bidirectional=True, batch_first=True)
    model, x = Sequence(recurrent, is_packed=is_packed), torch.randn(4, 8, 32)
    optimizer = trained(model, x, option=TENSORWISE)
    assert {p.dtype for p in model.recurrent.parameters()} == {torch.bfloat16}
    model.eval()
    with torch.no_grad():
        in_bf16 = model(x)
    autoprec.undo(model, optimizer)
    assert is_close(in_bf16, model(x), 0.1)


def test_cells_carry_their_state_in_fp32_or_bf16() -> None:
    class Cells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.gru = nn.LSTMCell(32, 32), nn.GRUCell(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            hidden = state = torch.zeros(len(x), 32)
            for step in range(x.shape[1]):
                hidden, state = self.lstm(x[:, step], (hidden, state))
                hidden = self.gru(x[:, step], hidden)
            return hidden

    cells = Cells()
    trained(cells, torch.randn(4, 8, 32))
    assert {parameter.dtype for parameter in cells.parameters()} == {torch.bfloat16}


# --- dtypes and layouts ----------------------------------------------------------------------


class Asking(nn.Module):
    """Casts to whatever dtype a layer's weight has, as T5, Mamba and many others do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.asked: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Any:
        self.asked = [self.first.weight.dtype, next(self.parameters()).dtype]
        x = self.first(x.to(self.first.weight.dtype)).float()
        lowest = torch.finfo(self.second.weight.dtype).min
        mask = torch.full((16, 1), lowest, dtype=self.second.weight.dtype).clamp(min=0.0)
        return self.second((x + mask).to(self.second.weight.dtype))


@pytest.mark.parametrize("option", [FP32, BF16_O2, TENSORWISE], ids=str)
def test_a_model_may_ask_for_the_dtype_of_a_weight(option: Option) -> None:
    model = Asking()
    trained(model, torch.randn(16, 32), option=option)
    assert set(model.asked) == {torch.float32 if option is FP32 else torch.bfloat16}


@pytest.mark.parametrize("as_array", [np.asarray, lambda x: x.cpu().numpy()])
def test_a_model_may_give_activations_to_numpy_as_matchers_do(as_array: Any) -> None:
    class Matched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(32, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Any:
            hidden = self.first(x)
            costs = as_array(hidden.detach())
            assert costs.dtype == np.float32
            return self.second(hidden[torch.from_numpy(costs.argsort(0)[:, 0])])

    trained(Matched(), torch.randn(16, 32), option=BF16_O2)


@pytest.mark.parametrize("order", ["layout first", "plan first"])
def test_channels_last_stays_and_loses_no_bit(order: str) -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3))
    layout: Any = {"memory_format": torch.channels_last}
    x = torch.randn(4, 16, 8, 8).to(**layout)
    weight = model.get_parameter("0.weight")
    if order == "layout first":
        model.to(**layout)
    optimizer = trained(model, x)
    exact = [p.detach().clone() for p in autoprec.master_view(model).parameters()]
    if order == "plan first":
        model.to(**layout)
    now = autoprec.master_view(model).parameters()
    assert all(torch.equal(a, b) for a, b in zip(exact, now, strict=True))
    torch.autograd.backward(model(x).square().mean())
    optimizer.step()
    assert weight.dtype is torch.bfloat16
    assert weight.is_contiguous(**layout)
    assert model(x).is_contiguous(**layout)
    if order == "layout first":
        assert optimizer.state[weight]["exp_avg"].is_contiguous(**layout)
        autoprec.undo(model, optimizer)
        assert weight.is_contiguous(**layout)


# --- parametrizations ------------------------------------------------------------------------

PARAMETRIZED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    **{
        f"orthogonal {name}": functools.partial(parametrizations.orthogonal, orthogonal_map=name)
        for name in ("matrix_exp", "cayley", "householder")
    },
}


@pytest.mark.parametrize("name", PARAMETRIZED)
def test_parametrized_layers_train_in_bf16_and_come_back(name: str) -> None:
    model: Any = nn.Sequential(PARAMETRIZED[name](nn.Linear(32, 32)), nn.Linear(32, 32))
    x = torch.randn(16, 32)
    optimizer = trained(model, x, option=TENSORWISE, others={"0": BF16_O2})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    weight = model[0].weight.float()  # read outside of forward
    if name.startswith("orthogonal"):
        assert is_close(weight @ weight.T, torch.eye(32), 0.05)
    autoprec.undo(model, optimizer)
    assert parametrize.is_parametrized(model[0])
    assert is_close(weight, model[0].weight, 0.05)
    parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("option", [BF16_O2, TENSORWISE], ids=str)
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_norms_by_hooks_train_too(norm: Callable[[nn.Module], nn.Module], option: Option) -> None:
    model, x = nn.Sequential(norm(nn.Linear(32, 32)), nn.Linear(32, 32)), torch.randn(16, 32)
    optimizer = trained(model, x, option=option)
    view = autoprec.master_view(model)
    assert is_close(model(x), view(x), 0.1)
    autoprec.undo(model, optimizer)
    assert F.linear(model(x), torch.eye(32)).dtype is torch.float32


CHAINS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(
        nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Dropout(0.1), nn.Linear(32, 16)
    ),
    "convolutions": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)),
        nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 16),
    ),
}


def counted_calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return a list that gets every function that the mode is called for."""
    calls: list[object] = []
    original = ActivationMode.__torch_function__

    def counting(self: ActivationMode, func: Any, *args: Any) -> Any:
        calls.append(func)
        return original(self, func, *args)

    monkeypatch.setattr(ActivationMode, "__torch_function__", counting)
    return calls


@pytest.mark.parametrize("option", [BF16_O2, fp8_option(Recipe.TENSORWISE)])
@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_of_torchs_own_modules_needs_no_mode_and_loses_no_bit(
    name: str, option: Option, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = counted_calls(monkeypatch)

    def run() -> tuple[list[torch.Tensor], int]:
        torch.manual_seed(0)
        model = CHAINS[name]()
        others = {name: FP32 for name, _ in model.named_modules() if name == "0.0"}
        autoprec.apply(uniform_plan(model, option, others), model)
        calls.clear()
        output = model(torch.randn(32, 16))
        torch.autograd.backward(output.square().mean())
        return [output, *(p.grad for p in model.parameters() if p.grad is not None)], len(calls)

    without, none = run()
    monkeypatch.setattr("autoprec.runtime.install.is_chain", lambda *_: False)
    with_mode, some = run()
    assert none == 0
    assert some > 0
    assert all(map(torch.equal, without, with_mode))


def test_user_code_between_layers_keeps_the_mode() -> None:
    class Mine(nn.Sequential):
        pass

    chain = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert is_chain(chain, find_layers(chain))
    own = Mine(nn.Linear(4, 4), nn.ReLU())
    assert not is_chain(own, find_layers(own))
    chain.register_forward_hook(lambda _module, _args, output: output + 1.0)
    assert not is_chain(chain, find_layers(chain))
    weighted = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)))
    assert not is_chain(weighted, find_layers(weighted))


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_least_number_of_fp32_masks_scores_in_bf16(is_compiled: bool) -> None:
    """A mask made in BF16 meets a value that is asked of FP32 activations, behind FP32 layers."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones(16, 16).triu(1).bool()
            least = torch.finfo(torch.float32).min
            scores: Tensor = self.inner(x).masked_fill(mask, least)
            return scores.softmax(-1)

    model: Any = Masked()
    autoprec.apply(uniform_plan(model, BF16_O2), model)
    if is_compiled:
        model.compile(backend="aot_eager", fullgraph=True)
    found = model(torch.randn(16, 16))
    torch._dynamo.reset()
    assert not found.triu(1).any()
    assert torch.allclose(found.sum(-1), torch.ones(16), atol=0.02)


class Between(nn.Module):
    """Layers of torch.nn and one of the user's, and an FP32 table that meets what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.own = nn.Linear(16, 32), nn.LayerNorm(32), Scale()
        self.register_buffer("table", torch.randn(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.norm(self.up(x)) @ self.table)  # type: ignore[no-any-return]  # a tensor


class Scale(nn.Module):
    """A layer of the user's: it may mix what it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.eye(16)) * self.weight


@pytest.mark.parametrize("option", [BF16_O2, TENSORWISE], ids=str)
def test_only_layers_of_torch_run_without_the_mode(
    option: Option, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, found, counts = counted_calls(monkeypatch), [], []
    for changed in (False, True):
        if changed:
            monkeypatch.setattr(
                "autoprec.runtime.classes.without_mode", lambda _, run, *given: (run(*given), False)
            )
        torch.manual_seed(0)
        model = Between()
        autoprec.apply(plan_for(model, option), model)
        calls.clear()
        with torch.no_grad():
            found.append(model(torch.randn(32, 16)))
        counts.append(
            [calls.count(function) for function in (F.linear, F.layer_norm, Tensor.matmul)]
        )
        with pytest.raises(RuntimeError, match=r"shapes|size"):
            model(torch.randn(32, 15))
        assert torch._C._len_torch_function_stack() == 0
    assert torch.equal(*found)
    (linear, norm, _), with_mode = counts
    assert (linear, norm) == (1, 0)  # the user's own layer
    assert with_mode[1] == 1
