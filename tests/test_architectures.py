"""One architecture of each family, from `transformers`; bench/architectures.py takes them all."""

from collections.abc import Iterator

import pytest
import torch

from autoprec.device.torchao import import_torchao
from autoprec.sensitivity.gemm import fast_gemms
from tests.architecture_checks import try_architecture
from tests.architecture_zoo import ARCHITECTURES

pytest.importorskip("transformers")
CHOSEN = (  # each with something of its own
    "GPT2LMHead",  # Conv1D, a tied head
    # 3-D experts, a router that computes in FP32
    pytest.param("DeepseekV3ForCausalLM", marks=pytest.mark.slow),
    "MambaForCausalLM",  # a scan between layers, parameters outside of them
    "FNetForMaskedLM",  # Fourier transforms, which have no BF16 kernel
    pytest.param("T5ForConditionalGeneration", marks=pytest.mark.slow),  # an FP32 residual
    "ConvNextForImageClassification",  # convolutions, norms and linears over channels
    pytest.param("Wav2Vec2ForCTC", marks=pytest.mark.slow),  # a parametrized convolution, CTC
    pytest.param("SegformerForSemanticSegmentation", marks=pytest.mark.slow),  # transposed images
)


@pytest.fixture(autouse=True)
def _fast() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    import_torchao()
    with fast_gemms():
        yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore")  # other people's code: theirs to mend
@pytest.mark.parametrize("name", CHOSEN)
def test_an_architecture_lives_through_a_random_plan(name: str) -> None:
    (architecture,) = (known for known in ARCHITECTURES if known.name == name)
    outcome = try_architecture(architecture.workload())
    assert outcome.result == "passed"
    assert outcome.layers > outcome.fp8_layers > 0
