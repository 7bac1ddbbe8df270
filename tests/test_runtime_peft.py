"""LoRA by PEFT around and inside a plan: frozen weights in FP8, adapters with FP32 masters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autoprec
from autoprec.model.layers import comes_from_plan
from autoprec.records import BF16_O2, Option, Recipe, fp8_option
from autoprec.runtime import check_applied
from autoprec.runtime.masters import masters_of
from tests.plans import plan_for

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

TENSORWISE = fp8_option(Recipe.TENSORWISE)
ORDERS = pytest.mark.parametrize("order", ["plan first", "peft first"])
pytestmark = pytest.mark.filterwarnings(  # PEFT 0.21 calls what transformers 5 deprecates
    "ignore:.*gradient_checkpointing.*:FutureWarning",
    "ignore:`gradient_checkpointing_enable`:FutureWarning",
)


def llama() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, **heads, num_hidden_layers=2)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(**sizes, **no_dropout, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config)


TOKENS = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": TOKENS, "labels": TOKENS}


def plan(model: nn.Module, option: Option = TENSORWISE) -> Any:
    names = (name for name, _ in model.named_modules())
    return plan_for(model, option, {n: BF16_O2 for n in names if n.endswith("embed_tokens")})


class Tuned:
    """A LoRA model under a plan; `inner` is what the plan was applied to."""

    def __init__(
        self, order: str, model: Any = None, *, option: Option = TENSORWISE, **lora: Any
    ) -> None:
        base = model if model is not None else llama()
        config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "up_proj"], **lora})
        if order == "plan first":
            autoprec.apply(plan(base, option), base)
        self.model: Any = peft.get_peft_model(base, config)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-2)
        self.inner = base if order == "plan first" else self.model
        if order == "peft first":
            autoprec.apply(plan(self.model, option), self.model, self.optimizer)

    def train(self, steps: int = 4) -> list[float]:
        losses = []
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = self.model(**BATCH).loss
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses

    def logits(self) -> Tensor:
        logits: Tensor = self.model(input_ids=TOKENS).logits
        return logits.detach()


def is_close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())


@ORDERS
@pytest.mark.parametrize(
    ("make", "targets"), [(llama, ["q_proj", "up_proj"]), (gpt2, ["c_attn"])], ids=["llama", "gpt2"]
)
def test_adapters_train_and_frozen_weights_stay(make: Any, targets: list[str], order: str) -> None:
    tuned = Tuned(order, make(), target_modules=targets, fan_in_fan_out=make is gpt2)
    frozen = {n: p.detach().clone() for n, p in tuned.model.named_parameters() if "lora" not in n}
    losses = tuned.train(4)
    assert losses[-1] < losses[0]
    now = dict(tuned.model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    assert all(now[name].grad is None for name in frozen)
    states = tuned.optimizer.state.values()
    assert all(state["exp_avg"].dtype is torch.float32 for state in states)
    assert all(check.is_good for check in autoprec.verify_applied(tuned.inner, BATCH))


@ORDERS
def test_what_ran_is_proven_under_the_names_of_the_plan(order: str) -> None:
    tuned = Tuned(order)
    tuned.train(1)
    checks = {check.name: check for check in autoprec.verify_applied(tuned.inner, BATCH)}
    base = "model.layers.1.self_attn.q_proj"
    name = base if order == "plan first" else f"base_model.model.{base}.base_layer"
    assert "fp8_o1:tensorwise: forward _scaled_mm float8_e4m3fn" in checks[name].detail
    vars(tuned.model.get_base_model().get_submodule(f"{base}.base_layer"))["fp8_active"] = False
    wrong = [check.name for check in check_applied(tuned.inner, BATCH) if not check.is_good]
    assert wrong == [name]


def test_frozen_weights_keep_no_fp32_copy_and_adapters_have_masters() -> None:
    tuned = Tuned("peft first")
    tuned.train(2)
    masters = masters_of(tuned.model).values
    for name, parameter in tuned.model.named_parameters():
        assert (masters[parameter] is None) == ("lora_" not in name)
    tiny = next(p for n, p in tuned.model.named_parameters() if "lora_A" in n)
    master = masters[tiny]
    assert master is not None
    assert not torch.equal(master, tiny.float())  # it holds bits that BF16 has not


@ORDERS
def test_a_disabled_adapter_gives_the_base_model(order: str) -> None:
    torch.manual_seed(1)
    base = llama()
    base.eval()
    expected = base(input_ids=TOKENS).logits.detach()
    tuned = Tuned(order, base)
    tuned.train(4)
    tuned.model.eval()
    assert not is_close(tuned.logits(), expected, 0.1)
    with tuned.model.disable_adapter():
        assert is_close(tuned.logits(), expected, 0.08)


@ORDERS
@pytest.mark.parametrize("merges", ["after undo", "before undo"])
def test_a_merged_model_computes_what_the_adapted_one_does(order: str, merges: str) -> None:
    tuned = Tuned(order)
    tuned.train(4)
    if merges == "after undo":
        autoprec.undo(tuned.inner, tuned.optimizer)
        expected = tuned.logits()
        merged = tuned.model.merge_and_unload()
    else:
        expected = tuned.logits()
        merged = tuned.model.merge_and_unload()
        autoprec.undo(tuned.inner, tuned.optimizer)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert not any(comes_from_plan(type(module)) for module in merged.modules())
    tolerance = 1e-5 if merges == "after undo" else 0.08
    assert is_close(merged(input_ids=TOKENS).logits.detach(), expected, tolerance)


@ORDERS
def test_a_saved_adapter_has_plain_keys_and_loads_without_autoprec(
    order: str, tmp_path: Path
) -> None:
    load_file = pytest.importorskip("safetensors.torch").load_file
    tuned = Tuned(order)
    plain = peft.get_peft_model(llama(), tuned.model.peft_config["default"])
    tuned.train(2)
    tuned.model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == peft.get_peft_model_state_dict(plain).keys()
    assert not peft.set_peft_model_state_dict(plain, saved).unexpected_keys
    if order == "peft first":  # BF16 as everything; in FP32 from the view
        view: Any = autoprec.master_view(tuned.model)
        view.save_pretrained(tmp_path / "exact")
        exact = load_file(tmp_path / "exact" / "adapter_model.safetensors")
        assert all(torch.equal(exact[key].bfloat16(), value) for key, value in saved.items())
        saved = exact
    autoprec.undo(tuned.inner, tuned.optimizer)
    trained = peft.get_peft_model_state_dict(tuned.model)
    assert all(torch.equal(trained[key], value) for key, value in saved.items())


@ORDERS
def test_layers_that_peft_copies_train_with_masters_and_come_back(order: str) -> None:
    tuned = Tuned(order, modules_to_save=["lm_head"])
    tuned.optimizer.param_groups[0]["lr"] = 1e-5  # below what BF16 weights can follow
    tuned.train(4)
    assert all(check.is_good for check in autoprec.verify_applied(tuned.inner, BATCH))
    head = tuned.model.get_base_model().lm_head.modules_to_save["default"]
    assert head.weight.dtype is torch.bfloat16
    autoprec.undo(tuned.inner, tuned.optimizer)
    assert {p.dtype for p in tuned.model.parameters()} == {torch.float32}
    assert not torch.equal(head.weight, head.weight.bfloat16().float())
    tuned.logits()


@ORDERS
@pytest.mark.slow
def test_dora_and_rank_16_in_fp8_train(order: str) -> None:
    tuned = Tuned(order, r=16, target_modules="all-linear", use_dora=True)
    losses = tuned.train(4)
    assert losses[-1] < losses[0]
    checks = autoprec.verify_applied(tuned.inner, BATCH)
    adapters = [check for check in checks if "lora_A" in check.name]
    assert all("_scaled_mm" in check.detail for check in adapters)
    assert bool(adapters) == (order == "peft first")
