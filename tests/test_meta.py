"""Planning for models that do not fit here: capture without storage, then a predicted plan."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autoprec.errors import CaptureError, DeviceError, WorkloadError
from autoprec.model.capture import capture_model
from autoprec.model.context import Context
from autoprec.model.meta import capture_on_meta
from autoprec.predict.layers import Setting
from autoprec.predict.parallel import Parallel
from autoprec.predict.registry import find_profile
from autoprec.predict.step import StepTimes, step_times
from autoprec.records import BF16_O2, Basis, ModelSpec, Plan, Precision
from autoprec.tuning.run import Run
from autoprec.tuning.settings import Settings
from autoprec.workload.functions import Workload, workload_from
from autoprec.workload.loading import load_workload
from tests.models import conv_workload, mlp_workload, token_workload
from tests.test_workload import workload_with

CPU = torch.device("cpu")
NOT_SEEN = {
    "loss": None,
    "is_deterministic": False,
    "device": "meta",
    "saved_bytes": None,
    "backward_bytes": None,
    "batch_bytes": None,
}
TINY = str(Path(__file__).parent / "workloads" / "tiny.py")
EXAMPLE = Path(__file__).parent.parent / "examples" / "llama_meta.py"


def llama_workload(blocks: int = 2, *, tied: bool = False) -> Workload:
    from transformers import LlamaConfig, LlamaForCausalLM

    def build_model() -> nn.Module:
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=blocks,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
            use_cache=False,
        )
        model: nn.Module = LlamaForCausalLM(config)
        return model

    def train_batches(seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield torch.randint(64, (2, 17), generator=generator)[:, :16]  # a view, with strides

    def loss_fn(model: nn.Module, tokens: Tensor) -> Tensor:
        loss: Tensor = model(input_ids=tokens, labels=tokens).loss
        return loss

    functions = {"build_model": build_model, "train_batches": train_batches, "loss_fn": loss_fn}
    return workload_from(SimpleNamespace(**functions), name="llama")


# --- capture -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_llama_has_the_same_spec_on_meta_as_for_real(tied: bool) -> None:
    real = capture_model(Context(llama_workload(tied=tied), CPU))
    check_same(capture_on_meta(llama_workload(tied=tied)), real)
    heads = {layer.name.rpartition(".")[2]: layer.heads for layer in real.layers}
    assert [heads[f"{name}_proj"] for name in "qkvo"] == [2, 1, 1, 2]
    assert (heads["up_proj"], heads["lm_head"]) == (None, None)


@pytest.mark.parametrize(
    "workload",
    [mlp_workload(), conv_workload(), token_workload(dropout=0.1)],
    ids=["mlp", "conv", "tokens"],
)
def test_toy_models_have_the_same_spec_on_meta_as_for_real(workload: Workload) -> None:
    real = capture_model(Context(workload, CPU))
    check_same(capture_on_meta(workload), real)


def check_same(found: ModelSpec, real: ModelSpec) -> None:
    """On meta attention keeps its scores, which the CPU's fused kernel does not."""
    assert found.model_copy(update=NOT_SEEN) == real.model_copy(update=NOT_SEEN)
    assert real.saved_bytes is not None
    assert found.saved_bytes is not None
    assert 0.95 * real.saved_bytes < found.saved_bytes < 2.0 * real.saved_bytes


class Repeated(nn.Module):
    """A linear, another one under no_grad for a target, or the first one checkpointed."""

    def __init__(self, how: str, width: int) -> None:
        super().__init__()
        self.how, self.own, self.other = how, nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "plain":
            return self.own(x).square().mean()  # type: ignore[no-any-return]  # a tensor
        if self.how == "teacher":
            with torch.no_grad():
                target = self.other(x)
            return (self.own(x) - target).square().mean()  # type: ignore[no-any-return]  # as above
        run, again = (lambda x: self.own(x).square()), self.how == "reentrant"
        return checkpoint(run, x, use_reentrant=again).mean()  # type: ignore[no-any-return]


def repeated_workload(how: str, width: int) -> Workload:
    def train_batches(seed: int) -> Iterator[Tensor]:
        while True:
            yield torch.full((2 * width, width), float(seed)).requires_grad_()

    functions = {
        "build_model": lambda: Repeated(how, width),
        "train_batches": train_batches,
        "loss_fn": lambda model, x: model(x),
    }
    return workload_from(functions, name=how)


@pytest.mark.parametrize(
    "how",
    [
        "teacher",
        *(pytest.param(how, marks=pytest.mark.slow) for how in ("reentrant", "not reentrant")),
    ],
)
def test_forwards_without_a_backward_are_a_third_of_a_layer_in_a_predicted_step(how: str) -> None:
    """A teacher's, and those that checkpointing makes once more."""

    def times(how: str) -> StepTimes:
        spec = capture_on_meta(repeated_workload(how, 2048))
        own = spec.layer("own")
        assert own.calls_per_step == 1
        setting = Setting(find_profile("h100-sxm").machine, Parallel(), True, 2.0)
        return step_times(spec, lambda _: BF16_O2, setting)

    found, plain = times(how), times("plain")
    assert found.layers == pytest.approx(plain.layers)  # rows of layers have these calls alone
    more = (found.total - plain.total) / plain.layers
    assert 0.95 / 3 < more < 0.5  # with what is between them
    real, meta = (
        capture(repeated_workload(how, 8))
        for capture in (lambda workload: capture_model(Context(workload, CPU)), capture_on_meta)
    )
    counts = [
        [(x.name, x.calls, x.forward_calls, x.input_elements) for x in spec.layers]
        for spec in (real, meta)
    ]
    assert counts[0] == counts[1]


def test_a_model_larger_than_any_memory_is_captured() -> None:
    width = 1 << 20
    workload = workload_with(
        build_model=lambda: nn.Sequential(*(nn.Linear(width, width) for _ in range(4))),
        train_batches=lambda seed: iter([torch.ones(1, 16)]),
        loss_fn=lambda model, batch: model(torch.ones(16, width)).sum(),
    )
    spec = capture_on_meta(workload)
    assert sum(p.numel for p in spec.parameters()) > 4e12
    assert spec.tokens_per_step == 16


def test_parameters_made_on_another_device_move_and_stay_tied() -> None:
    def build_model() -> nn.Module:
        model = nn.Sequential(*(nn.Linear(32, 32, bias=False, device="cpu") for _ in range(2)))
        model[1].weight = model[0].weight
        return model

    workload = workload_with(
        build_model=build_model, train_batches=lambda seed: iter([torch.ones(16, 32)])
    )
    assert capture_on_meta(workload).layer("1").tied_to == "0"


def test_a_constructor_may_read_what_it_made_of_numbers_and_move_the_model() -> None:
    """As vision models with stochastic depth do, here and in transformers and timm."""

    def build_model() -> nn.Module:
        rates = [rate.item() for rate in torch.linspace(0, 0.5, 3)]
        widths = (16 * torch.arange(1, 4, device="cpu")).tolist()
        blocks = [
            (nn.Linear(16, width), nn.Dropout(p)) for p, width in zip(rates, widths, strict=True)
        ]
        return nn.Sequential(*blocks[0], blocks[2][0]).bfloat16().float()

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        loss: Tensor = model(batch).square().mean()
        return loss

    given = {"build_model": build_model, "loss_fn": loss_fn}
    workload = workload_with(train_batches=lambda seed: iter([torch.ones(32, 16)]), **given)
    check_same(capture_on_meta(workload), capture_model(Context(workload, CPU)))


class Chosen(nn.Module):
    """Computes its head for chosen tokens alone, as sparse masked language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(64, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 64)

    def forward(self, tokens: Tensor, is_chosen: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.embedding(tokens))[is_chosen])
        return logits


def test_integers_of_a_batch_are_known_where_they_decide_shapes_or_are_checked() -> None:
    def train_batches(seed: int) -> Iterator[dict[str, Tensor]]:
        for batch in range(12):
            tokens = torch.arange(64).roll(batch + seed).reshape(2, 32)
            yield {"tokens": tokens, "is_chosen": tokens % 4 == 0}

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        tokens, is_chosen = batch["tokens"], batch["is_chosen"]
        if tokens.max() >= 64 or len(is_chosen.nonzero()) != 16:
            raise ValueError("tokens beyond the vocabulary, or other tokens chosen than were given")
        counted = torch.zeros(2, 32)
        counted[is_chosen] = 1.0  # a write of what is known
        logits = model(tokens, is_chosen) * counted.sum().item()
        return nn.functional.cross_entropy(logits, tokens.masked_select(is_chosen))

    workload = workload_with(build_model=Chosen, train_batches=train_batches, loss_fn=loss_fn)
    spec = capture_on_meta(workload)
    check_same(spec, capture_model(Context(workload, CPU)))
    assert str(spec.layer("head").gemm) == "16x32x64"


def test_integers_that_a_model_lists_are_known() -> None:
    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        sizes = torch.tensor([3, 5], device=batch.device)  # as of patches
        rows = [torch.arange(n, device=batch.device) for n in (sizes.expand(2, 2) + 1)[0].tolist()]
        return torch.stack([model(batch[row % len(batch)]).sum() for row in rows]).sum()

    assert sizes_of(capture_on_meta(workload_with(loss_fn=loss_fn))) == [4, 6]
    assert sizes_of(capture_model(Context(workload_with(loss_fn=loss_fn), CPU))) == [4, 6]


def sizes_of(spec: ModelSpec) -> list[int]:
    (layer,) = spec.layers
    return sorted(call.inputs[0].shape[0] for call in layer.calls)


def test_a_ctc_loss_has_the_same_spec_on_meta_as_for_real() -> None:
    def train_batches(seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            sound = torch.randn(4, 32, 16, generator=generator)
            letters = torch.randint(1, 16, (4, 8), generator=generator)
            yield sound, letters, torch.tensor([8, 5, 6, 3])

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        sound, letters, lengths = batch
        log_probs = model(sound).float().log_softmax(-1).transpose(0, 1)
        steps = torch.full((4,), 32)
        return F.ctc_loss(log_probs, letters, steps, lengths, zero_infinity=True)

    functions = {"train_batches": train_batches, "loss_fn": loss_fn}
    workload = workload_with(
        build_model=lambda: nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16)), **functions
    )
    check_same(capture_on_meta(workload), capture_model(Context(workload, CPU)))


def test_autocast_for_the_device_of_a_tensor_is_taken_on_meta() -> None:
    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.autocast(batch.device.type, torch.bfloat16):
            y: Tensor = model(batch)
            with torch.autocast(y.device.type, enabled=False):  # as rotary embeddings do
                return y.float().square().sum()

    workload = workload_with(loss_fn=loss_fn)
    spec, before = capture_on_meta(workload), torch.autocast.__init__
    real = capture_model(Context(workload_with(loss_fn=loss_fn), CPU))
    check_same(spec, real)
    assert spec.as_written is not None
    assert spec.as_written.autocast == "bfloat16"
    assert torch.autocast.__init__ is before


def test_the_integers_of_a_batch_are_not_written_into() -> None:
    tokens = torch.arange(32).reshape(2, 16)

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        batch[batch == 3] = 0
        loss: Tensor = model(batch.float()).square().mean()
        return loss

    given = {"build_model": lambda: nn.Linear(16, 16), "loss_fn": loss_fn}
    capture_on_meta(workload_with(train_batches=lambda seed: iter([tokens] * 12), **given))
    assert torch.equal(tokens.flatten(), torch.arange(32))


def test_no_value_is_told_of_numbers_that_were_overwritten() -> None:
    def build_model() -> nn.Module:
        numbers = torch.zeros(4)
        numbers[1:].copy_(torch.randn(3))
        return nn.Linear(16, 16 if numbers.tolist() else 32)

    with pytest.raises(CaptureError, match="must not look at values"):
        capture_on_meta(workload_with(build_model=build_model))


def test_a_loss_that_looks_at_values_is_told_how_to_go_on() -> None:
    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        loss: Tensor = model(batch).square().mean()
        return loss / loss.item()

    with pytest.raises(CaptureError, match=r"with --meta nothing is computed.*loss_fn"):
        capture_on_meta(workload_with(loss_fn=loss_fn))


def test_an_error_of_the_users_own_stays_what_it_is() -> None:
    def build_model() -> nn.Module:
        raise ValueError("no such size")

    with pytest.raises(WorkloadError, match="no such size"):
        capture_on_meta(workload_with(build_model=build_model))


def test_a_loss_without_gradient_is_refused() -> None:
    with pytest.raises(CaptureError, match="needs no gradient"):
        capture_on_meta(workload_with(loss_fn=lambda model, batch: model(batch).sum().detach()))


def test_an_optimizer_that_reads_values_is_refused_with_the_way_out() -> None:
    class Reader(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            float(self.param_groups[0]["params"][0].grad.sum())

    workload = workload_with(build_optimizer=lambda model: Reader(model.parameters(), lr=0.1))
    with pytest.raises(CaptureError, match=r"Reader raised.*leave build_optimizer out"):
        capture_on_meta(workload)


def test_an_optimizer_may_read_its_count_of_steps() -> None:
    """Adam does (torch 2.11): the count is its own, no value of the model."""

    class Counting(torch.optim.Adam):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            assert torch.tensor(3.0).item() == 3.0
            super().step()

    workload = workload_with(build_optimizer=lambda model: Counting(model.parameters(), lr=0.1))
    assert capture_on_meta(workload).optimizer_state_numel_ratio == pytest.approx(2.0)


def test_a_backward_that_meta_lacks_gives_every_parameter_a_gradient(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            raise RuntimeError("no meta kernel")

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        out: Tensor = Kernel.apply(model(batch))  # type: ignore[no-untyped-call]
        return out.mean()

    spec = capture_on_meta(workload_with(loss_fn=loss_fn))
    assert spec.optimizer_state_numel_ratio == pytest.approx(2.0)
    assert "no meta kernel" in caplog.text


def test_the_examples_have_the_published_sizes() -> None:
    sizes = {"llama2_7b": 6_738_415_616, "llama3_8b": 8_030_261_248}
    for name, numel in sizes.items():
        with torch.device("meta"):
            model = load_workload(f"{EXAMPLE}:{name}").build_model()
        assert sum(parameter.numel() for parameter in model.parameters()) == numel


# --- the stages ----------------------------------------------------------------------------------


def llama_settings(out: Path, *, resume: bool = False) -> Settings:
    """Return the settings of a tune of two blocks of Llama 3 8B."""
    model = out.with_name("model.py")
    model.write_text(f"{EXAMPLE.read_text()}\nshort = llama(4096, 14336, 2, 32, 8, 128256)\n")
    return Settings(
        workload=f"{model}:short",
        target="h100-sxm",
        out=out,
        meta=True,
        parallel="tp=8",
        trials=2,
        resume=resume,
    )


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("meta") / "run"
    settings = llama_settings(out)
    run = Run(settings).make()
    assert run.verification is None
    assert run.exit_code == 0
    return out


def test_a_plan_for_a_model_that_is_not_here_says_what_is_not_known(planned: Path) -> None:
    plan = Plan.load(planned / "plan.json")
    assert plan.count(Precision.FP8_O1) > 0
    assert (plan.grad_error, plan.grad_error_basis) == (None, Basis.UNKNOWN)
    assert plan.certificate is None
    made = plan.fingerprint
    assert (made.time_basis, made.sensitivity_basis) == (Basis.PREDICTED, Basis.UNKNOWN)
    assert (made.compile_mode, made.parallel) == ("default", "tp=8")
    head = next(layer for layer in plan.layers if layer.name == "lm_head")
    assert head.precision is Precision.BF16_O2
    assert "stays out of FP8 while its gradient error is unknown" in head.reason
    assert "arXiv 2412.19437" in head.reason
    assert any("no sensitivity was measured" in note for note in plan.notes)
    assert any("not verified" in note for note in plan.notes)


def test_narrow_projections_stay_in_bf16_under_tensor_parallelism(planned: Path) -> None:
    plan = Plan.load(planned / "plan.json")
    narrow = [layer for layer in plan.layers if layer.name.endswith(("k_proj", "v_proj"))]
    assert narrow
    assert all(layer.precision is Precision.BF16_O2 for layer in narrow)
    assert all("K=4096 N=128" in layer.reason for layer in narrow)


def test_the_report_of_such_a_plan_claims_no_error_and_no_proof(planned: Path) -> None:
    from autoprec.report import load_run, summary_object

    found = summary_object(load_run(planned), planned)
    assert (found["grad_error"], found["grad_error_basis"], found["verdict"]) == (
        None,
        "unknown",
        "not_run",
    )
    assert found["extra_steps"] is None
    assert "not verified" in (planned / "report.html").read_text()


def test_resuming_repeats_nothing(planned: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in planned.glob("*.json")}
    settings = llama_settings(planned, resume=True)
    Run(settings).make()
    for name in ("profile.json", "sensitivity.json", "search.json"):
        assert (planned / name).stat().st_mtime_ns == before[name]


def test_a_kept_head_is_let_out_of_the_lock(tmp_path: Path, planned: Path) -> None:
    for name in ("profile.json", "sensitivity.json"):
        shutil.copy(planned / name, tmp_path)
    settings = Settings(out=tmp_path, trials=0, keep=("lm_head=fp8_o1",))
    plan = Run(settings, stages=("search",)).plan
    assert plan.layers[-1].name == "lm_head"
    assert plan.layers[-1].precision is Precision.FP8_O1


def test_meta_without_a_device_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="--meta needs a device profile"):
        Settings(workload=TINY, out=tmp_path, meta=True)


def test_compile_is_the_default_of_device_profiles(tmp_path: Path) -> None:
    settings = Settings(workload=TINY, target="h100-sxm", out=tmp_path, meta=True)
    assert Run(settings, stages=("profile",)).profile.device.compile_mode == "default"
    eager = Run(replace(settings, compile=False), stages=("profile",)).profile
    assert eager.device.compile_mode == "eager"


def test_the_flags_are_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from autoprec.cli.main import main

    arguments = ["profile", TINY, "--target", "h100-sxm", "--meta", "--eager", "--json"]
    with pytest.raises(SystemExit) as leaving:
        main([*arguments, "--out", str(tmp_path)])
    assert leaving.value.code in (0, None)
    found = json.loads(capsys.readouterr().out)
    assert found["device"]["compile_mode"] == "eager"
    assert found["model"]["device"] == "meta"
