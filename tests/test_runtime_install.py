import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.utils.checkpoint import checkpoint

import autoprec
from autoprec.errors import PlanMismatchError, RecordError
from autoprec.records import (
    APPLICABLE_RECIPES,
    BF16_O2,
    FP32,
    Option,
    Recipe,
    fp8_option,
    with_gemms_hp,
)
from autoprec.runtime import install_options, uniform_plan

TENSORWISE = fp8_option(Recipe.TENSORWISE)


class MixingNet(nn.Module):
    """Mixes FP32 tables, masks and tied weights with whatever its layers give."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 32)
        self.norm = nn.LayerNorm(32)
        self.qkv = nn.Linear(32, 96)
        self.out = nn.Linear(32, 32)
        self.head = nn.Linear(32, 32, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.3)
        self.scale = nn.Parameter(torch.ones(32))
        self.register_buffer("table", torch.randn(16, 32))

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Any:
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k = q * self.table, k * self.table
        mask = torch.zeros(16, 16).masked_fill(torch.ones(16, 16).triu(1).bool(), float("-inf"))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)) * self.scale
        logits = F.linear(x.float(), self.embed.weight) + self.head(x)
        if targets is None:
            return logits
        return {"logits": logits, "loss": F.cross_entropy(logits.flatten(0, 1), targets.flatten())}


LAYERS = ("embed", "norm", "qkv", "out", "head")


def tokens() -> Tensor:
    return torch.randint(0, 32, (2, 16))


def uniform(option: Option) -> dict[str, Option]:
    fp8 = ("qkv", "out", "head")
    return {n: option if n in fp8 or not option.is_fp8 else BF16_O2 for n in LAYERS}


@pytest.mark.parametrize("option", [FP32, BF16_O2, TENSORWISE], ids=str)
def test_a_mixing_model_trains_under_every_uniform_plan(option: Option) -> None:
    model, batch = MixingNet(), tokens()
    expected = model(batch, batch)["loss"]
    with install_options(model, uniform(option), uncovered=["scale"]):
        result = model(batch, batch)
        result["loss"].backward()
    assert result["loss"].dtype is torch.float32
    assert result["logits"].dtype is torch.float32
    assert result["loss"].item() == pytest.approx(expected.item(), rel=0.05)
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_all_fp32_plan_is_an_exact_no_op() -> None:
    model, batch = MixingNet(), tokens()
    expected = model(batch)
    with install_options(model, uniform(FP32)) as installed:
        assert torch.equal(model(batch), expected)
        assert installed.originals == {}
        assert type(model.qkv) is nn.Linear


def test_identity_of_modules_parameters_and_keys_survives() -> None:
    model = MixingNet()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    keys = list(model.state_dict())
    with install_options(model, uniform(TENSORWISE)):
        assert dict(model.named_modules()) == modules
        assert all(dict(model.named_parameters())[n] is p for n, p in parameters.items())
        assert list(model.state_dict()) == keys
        assert isinstance(model.qkv, nn.Linear)
        assert model.qkv.weight.dtype is torch.bfloat16
        assert model.get_buffer("table").dtype is torch.float32


def test_undo_gives_the_exact_values_and_classes_back() -> None:
    model, batch = MixingNet(), tokens()
    before, expected = copy.deepcopy(model.state_dict()), model(batch)
    install_options(model, uniform(TENSORWISE), uncovered=["scale"]).undo()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(batch), expected)
    assert all(
        type(m) in (nn.Linear, nn.Embedding, nn.LayerNorm, MixingNet) for m in model.modules()
    )
    assert not any("fp8_active" in vars(m) for m in model.modules())


@pytest.mark.parametrize(
    "option", with_gemms_hp(list(map(fp8_option, APPLICABLE_RECIPES))), ids=str
)
def test_every_fp8_option_trains_a_layer(option: Option) -> None:
    layer = nn.Linear(32, 48)
    x = torch.randn(64, 32, requires_grad=True)
    expected = layer(x)
    with install_options(layer, {"": option}):
        output = layer(x)
        output.square().sum().backward()
    assert output.dtype is torch.float32
    assert (output - expected).norm() < 0.1 * expected.norm()
    assert x.grad is not None
    assert layer.weight.grad is not None


@pytest.mark.parametrize("rows", [32, 27])
@pytest.mark.parametrize("recipe", APPLICABLE_RECIPES, ids=str)
def test_fp8_takes_inputs_of_any_layout(recipe: Recipe, rows: int) -> None:
    layer = nn.Linear(32, 48)
    image, hidden = torch.randn(2, 32, rows), torch.randn(2, rows, 64)
    inputs = {
        "transposed": image.transpose(1, 2),
        "sliced": hidden[..., :32],
        "expanded": hidden[:1, :, :32].expand(2, -1, -1),
        "matrix": image[0].t(),
    }
    with install_options(layer, {"": fp8_option(recipe)}):
        for name, x in inputs.items():
            grads = []
            for value in (x, x.contiguous()):
                layer.zero_grad()
                layer(value).square().sum().backward()
                grads.append([p.grad for p in layer.parameters()])
            assert all(map(torch.equal, *grads)), name


WITHOUT_BF16_KERNEL: dict[str, Callable[[Tensor], Tensor]] = {
    "fft": lambda x: torch.fft.fftn(x, dim=(-2, -1)).real,
    "rfft": lambda x: torch.fft.irfft(torch.fft.rfft(x), n=x.shape[-1]),
    "cdist": lambda x: torch.cdist(x, torch.ones(1, 8, 32)),
    "inverse": lambda x: (x.mT @ x + torch.eye(32)).inverse(),
    "linalg": lambda x: torch.linalg.qr(x)[1],
    "svd": lambda x: torch.linalg.svdvals(x),
    "quantile": lambda x: x.quantile(0.9),
    "complex": lambda x: torch.view_as_complex(x.reshape(-1, 2)).abs(),
    "avg_pool3d": lambda x: F.avg_pool3d(x[None], 2),
    "sparse": lambda x: torch.sparse.mm(torch.eye(48).to_sparse(), x[0]),
    "sparse matmul": lambda x: torch.eye(48).to_sparse_csr() @ x[0],
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("name", WITHOUT_BF16_KERNEL)
def test_functions_without_a_bf16_kernel_run_in_fp32(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return WITHOUT_BF16_KERNEL[name](self.linear(x))

    model, x = Net(), torch.randn(2, 48, 32)
    expected = model(x)
    with install_options(model, {"linear": BF16_O2}):
        result = model(x)
        result.sum().backward()
    assert result.dtype is torch.float32
    assert model.linear.weight.grad is not None
    error = (result - expected).norm() / expected.norm()
    assert error < 0.05


def test_one_layer_in_an_fp32_flow_leaves_the_others_in_fp32() -> None:
    model = MixingNet()
    seen: dict[str, torch.dtype] = {}
    for name in LAYERS:
        model.get_submodule(name).register_forward_hook(
            lambda _m, _a, out, name=name: seen.__setitem__(name, out.dtype)
        )
    with install_options(model, {"qkv": BF16_O2}, activation_dtype=torch.float32):
        model(tokens()).sum().backward()
        assert {p.dtype for p in model.out.parameters()} == {torch.float32}
        assert {p.dtype for p in model.qkv.parameters()} == {torch.bfloat16}
    assert set(seen.values()) == {torch.float32}


def test_autocast_around_the_model_changes_nothing() -> None:
    model, batch = MixingNet(), tokens()
    with install_options(model, {**uniform(BF16_O2), "out": FP32}):
        expected = model(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = model(batch)
            assert torch.is_autocast_enabled("cpu")
    assert torch.equal(inside, expected)


def test_a_failing_forward_leaves_no_mode_behind() -> None:
    model = MixingNet()
    with install_options(model, uniform(BF16_O2)):
        with pytest.raises(IndexError):
            model(torch.full((2, 16), 99))
        assert torch._C._len_torch_function_stack() == 0
        model(tokens())


def test_batch_norm_keeps_fp32_parameters_and_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    with install_options(model, {"0": BF16_O2, "1": BF16_O2, "3": BF16_O2}):
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        assert model[1].weight.dtype is torch.float32
        assert model[1].get_buffer("running_mean").dtype is torch.float32
        gradient = model.get_parameter("3.weight").grad
        assert gradient is not None
        assert gradient.dtype is torch.bfloat16


@pytest.mark.parametrize("functional", [False, True])
def test_running_statistics_move_as_in_fp32(functional: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

        def forward(self, images: Tensor) -> Tensor:
            if not functional:
                output: Tensor = self.norm(self.conv(images))
                return output
            n, x = self.norm, self.conv(images)
            return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, training=True)

    plain, images = Net(), torch.randn(16, 3, 8, 8) + 2.0
    model = copy.deepcopy(plain)
    for _ in range(20):
        plain(images)
    with install_options(model, {"conv": BF16_O2, "norm": BF16_O2}):
        for _ in range(20):
            model(images).sum().backward()
    for name in ("running_mean", "running_var"):
        expected, found = plain.norm.get_buffer(name), model.norm.get_buffer(name)
        assert (found - expected).norm() < 0.005 * expected.norm(), name


def test_recurrent_and_attention_layers_take_tuples_and_keywords() -> None:
    lstm, attention = nn.LSTM(16, 16, batch_first=True), nn.MultiheadAttention(16, 2)
    x = torch.randn(4, 5, 16)
    with install_options(lstm, {"": BF16_O2}):
        output, (h, _c) = lstm(x, (torch.zeros(1, 4, 16), torch.zeros(1, 4, 16)))
        assert output.dtype is h.dtype is torch.float32
        packed, _ = lstm(nn.utils.rnn.pack_padded_sequence(x, [5, 4, 3, 2], batch_first=True))
        assert packed.data.dtype is torch.float32
    with install_options(attention, {"": BF16_O2}):
        mask = torch.zeros(4, 4)
        output, _ = attention(query=x, key=x, value=x, attn_mask=mask)
        output.sum().backward()
        assert output.dtype is torch.float32
        assert attention.out_proj.weight.dtype is torch.bfloat16


class Lookup(nn.Module):
    """Reads its embedding's weight itself, as AWD-LSTM does, in front of a recurrent layer."""

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.embed, self.recurrent, self.head = nn.Embedding(8, 16), recurrent, nn.Linear(16, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.recurrent(F.embedding(tokens, self.embed.weight))
        result: Tensor = self.head(hidden[0] if isinstance(hidden, tuple) else hidden)
        return result


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRUCell])
def test_recurrent_layers_in_fp32_take_what_a_bf16_weight_gives(
    recurrent: type[nn.Module], named: bool
) -> None:
    model = Lookup(recurrent(16, 16))
    options = {"embed": BF16_O2, **({"recurrent": FP32, "head": FP32} if named else {})}
    with install_options(model, options, activation_dtype=torch.float32):
        model(torch.tensor([3, 5])).sum().backward()
    assert type(model.recurrent) is recurrent


def test_a_copy_and_a_pickle_compute_the_same() -> None:
    model, batch = MixingNet(), tokens()
    with install_options(model, uniform(TENSORWISE)):
        expected = model(batch)
        assert torch.equal(copy.deepcopy(model)(batch), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(batch), expected)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        assert torch.equal(torch.load(buffer, weights_only=False)(batch), expected)


def test_a_subclass_of_linear_keeps_its_attributes_in_fp8() -> None:
    class Named(nn.Linear):
        label = "mine"

    layer = Named(32, 32)
    with install_options(layer, {"": TENSORWISE}):
        assert layer.label == "mine"
        assert isinstance(layer, Named)
        layer(torch.randn(16, 32)).sum().backward()
    assert type(layer) is Named


def test_a_library_that_registers_subclasses_sees_none_of_ours() -> None:
    class Registered(nn.Linear):
        known: ClassVar[dict[str, type]] = {}

        def __init_subclass__(cls, name: str) -> None:
            cls.known[name] = cls

    class Own(Registered, name="own"):
        pass

    layer = Own(32, 32)
    for option in (BF16_O2, TENSORWISE):
        with install_options(layer, {"": option}):
            assert isinstance(layer, Own)
            layer(torch.randn(16, 32)).sum().backward()
    assert Registered.known == {"own": Own}
    assert type(layer) is Own


Shape = TypeVar("Shape")


class GenericFirst(Generic[Shape], nn.Module):
    """As tianshou's networks, which are laid out otherwise than plain modules."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Any:
        return Independent(Normal(self.layer(x), F.softplus(x)), 1), x


def test_a_generic_class_runs_a_plan_and_its_distributions_are_in_fp32() -> None:
    model, x = GenericFirst[int](), torch.randn(16, 32)
    wanted, _ = model(x)
    with install_options(model, {"layer": BF16_O2}):
        given, _ = model(x)
        assert type(given) is Independent
        assert (given.mean.dtype, given.stddev.dtype) == (torch.float32, torch.float32)
        torch.testing.assert_close(given.mean, wanted.mean, rtol=2**-6, atol=2**-6)
    assert type(model) is GenericFirst


def test_unknown_names_and_containers_are_refused() -> None:
    with pytest.raises(PlanMismatchError, match=r"'lm_head' does not.*its layers: embed, norm"):
        install_options(MixingNet(), {"lm_head": BF16_O2})
    with pytest.raises(PlanMismatchError, match="'' does not"):
        install_options(MixingNet(), {"": BF16_O2})


def test_tied_layers_with_two_storages_are_refused_and_nothing_is_changed() -> None:
    model = MixingNet()
    with pytest.raises(PlanMismatchError, match=r"'embed' is fp32 and 'head' is bf16_o2"):
        install_options(model, {"embed": FP32, "head": BF16_O2, "qkv": BF16_O2})
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_fp8_on_what_torchao_cannot_replace_is_refused() -> None:
    class Doubling(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            return 2 * super().forward(input)

    with pytest.raises(PlanMismatchError, match=r"Doubling.s forward does more"):
        install_options(Doubling(16, 16), {"": TENSORWISE})
    with pytest.raises(PlanMismatchError, match=r"LayerNorm is no nn\.Linear"):
        install_options(MixingNet(), {"norm": TENSORWISE})


class _Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


def test_models_that_share_an_activation_take_a_plan_each() -> None:
    """As in transformers, whose OpenAI GPTs share one object of all activations."""

    class Branch(nn.Module):
        def __init__(self, shared: nn.Module) -> None:
            super().__init__()
            self.layer, self.act = nn.Linear(16, 16), shared

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.act(self.layer(x))
            return out

    shared, x = _Squared(), torch.randn(16, 16)
    first, second = Branch(shared), Branch(shared)
    with install_options(first, {"layer": BF16_O2}):
        assert type(shared) is _Squared
        assert torch.equal(second(x), F.relu(second.layer(x)).square())
        autoprec.apply(uniform_plan(second, TENSORWISE), second)
        assert second(x).dtype is torch.float32
        autoprec.undo(second)


class _BackProjection(nn.Module):
    """Projects by another layer's weight, as Perceiver's decoder does."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(32))

    def forward(self, x: Tensor, other: nn.Module) -> Tensor:
        return x @ other.get_parameter("weight") + self.bias


def test_a_layer_of_user_code_makes_its_operands_agree_when_it_runs_alone() -> None:
    layer, other, x = _BackProjection(), nn.Linear(32, 16), torch.randn(4, 16)
    with install_options(layer, {"": BF16_O2}, activation_dtype=torch.float32, root=False):
        found = layer(x, other)
    expected = (x.bfloat16() @ other.weight.bfloat16()).float()
    assert found.dtype is torch.float32
    assert torch.equal(found, expected)


def test_a_buffer_that_forward_binds_anew_has_its_dtype_back_without_the_plan() -> None:
    """As CTRL's table of positions, which its forward casts, or a state that goes on."""

    class Positioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(16, 16)
            self.table = nn.Buffer(torch.randn(4, 16))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x)
            self.table = nn.Buffer(self.table.to(out.dtype))
            total: Tensor = out + self.table
            return total

    model, x = Positioned(), torch.randn(4, 16)
    with install_options(model, {"layer": BF16_O2}):
        model(x)
        assert model.table.dtype is torch.bfloat16
    assert model.table.dtype is torch.float32
    autoprec.apply(uniform_plan(model, BF16_O2), model)
    model(x)
    table = model.table.clone()
    autoprec.undo(model)
    assert torch.equal(model.table, table.float())


class Parts(nn.Module):
    """A model whose method calls its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(32, 32), nn.LayerNorm(32)
        self.body = nn.Sequential(nn.Linear(32, 32), nn.Sigmoid())

    def loss(self, x: Tensor) -> Tensor:
        """Return a loss that takes operands of one dtype only."""
        return F.binary_cross_entropy(self.body(self.norm(self.first(x))), x.sigmoid())


class PartsWithForward(Parts):
    """The same, with a forward as well."""

    def forward(self, x: Tensor) -> Tensor:
        """Return what flows inside, to see its dtype, and the output."""
        inside = self.first(x)
        assert inside.dtype is self.first.weight.dtype
        output: Tensor = self.body(self.norm(inside))
        return output


@pytest.mark.parametrize("model", [Parts, PartsWithForward])
def test_parts_that_are_called_on_their_own_give_fp32_as_a_model_does(model: type[Parts]) -> None:
    net, x = model(), torch.randn(4, 32)
    expected = net.loss(x)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    autoprec.apply(uniform_plan(net, BF16_O2), net, optimizer)
    assert {net.first(x).dtype, net.norm(x).dtype, net.body(x).dtype} == {torch.float32}
    assert net.first.weight.dtype is torch.bfloat16
    torch.autograd.backward(net.loss(x))
    optimizer.step()
    torch.testing.assert_close(net.loss(x), expected, rtol=0.02, atol=0)
    again = checkpoint(net.body, net.first(x), use_reentrant=True)
    torch.autograd.backward(again.sum())
    if model is PartsWithForward:
        assert net(x).dtype is torch.float32
    autoprec.undo(net, optimizer)
    assert type(net.first) is nn.Linear
    assert net.body[0](x).dtype is net.first(x).dtype is torch.float32


def test_a_uniform_plan_of_what_is_not_there_is_one_clear_line() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    for option in ("fp8_o1", "fp8", "fp8_o1:rowwise-nothing"):
        with pytest.raises(RecordError, match=rf"e\.g\. fp8_o1:rowwise, but it is '{option}'$"):
            uniform_plan(model, option)
    with pytest.raises(RecordError, match="must name layers of the model, but 9 is none"):
        uniform_plan(model, "bf16_o2", {"9": FP32})
