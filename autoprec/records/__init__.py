"""The records that stages exchange. This package imports no torch.

model         what a model is: options, layers, shapes
cost          what it costs: times, bytes, device facts
sensitivity   what a precision does to loss and gradient
plan          the choice, and the search that made it
verification  the proof
checks        what doctor, check and compare say
"""

from autoprec.common.recipes import APPLICABLE_RECIPES, Gemm, Precision, Recipe
from autoprec.records.base import FileRecord, Record
from autoprec.records.checks import Change, Check, Comparison, Diagnosis, DifferenceRow, PlanCheck
from autoprec.records.cost import (
    Conditions,
    DeviceFacts,
    LayerTiming,
    Profile,
    ProfileRows,
    StepTiming,
    SumCheck,
    Timing,
)
from autoprec.records.model import (
    BF16_O2,
    FP32,
    AsWritten,
    Basis,
    CallSpec,
    GemmShape,
    LayerKind,
    LayerSpec,
    ModelSpec,
    Option,
    ParameterSpec,
    Refusal,
    TensorSpec,
    fp8_option,
    with_gemms_hp,
)
from autoprec.records.plan import (
    Assignment,
    Certificate,
    Constraint,
    Fingerprint,
    FrontPoint,
    Phase,
    Plan,
    PredictedStep,
    Search,
    SearchTrial,
)
from autoprec.records.sensitivity import (
    BatchEffect,
    Estimate,
    Island,
    JointMeasurement,
    LayerSensitivity,
    Operand,
    OperandStatistics,
    Sensitivity,
    StepError,
)
from autoprec.records.verification import (
    Branch,
    ExpectedGap,
    HorizonGap,
    LossGap,
    MetricTolerance,
    Proxy,
    Verdict,
    Verification,
)
