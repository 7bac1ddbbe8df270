"""What the makers say of each device: names, FP8 recipes and data-sheet constants with sources.

`bench/data/devices.csv` is read; a sheet's `extra` holds what it lacks or has otherwise for the
variant, from the makers' data sheets and architecture papers. Bandwidths of links are one way, so
half of what the sheets print.
"""

import csv
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

DATA = Path(__file__).parent / "data"
SHEET = "maker's data sheet"
PAPER = "maker's architecture paper"
ASSUMED = "usual machine: 8 devices, a 400 Gb/s network port for each"
BLOCKWISE_ELSEWHERE = (
    "torch._scaled_mm takes blockwise scales on capability 9.0 only; times are of vLLM's kernels"
)
HOST = "usual host: PCIe 5.0 x16 (4.0 on Ada), a 100 Gb/s network port for four devices"

HOPPER = ("tensorwise", "rowwise", "rowwise_with_gw_hp", "delayed", "blockwise")
ADA = ("tensorwise", "rowwise", "rowwise_with_gw_hp", "delayed")
BLACKWELL = (*HOPPER, "mxfp8")
BLACKWELL_RTX = (*ADA, "mxfp8")
QUANTITIES = {  # our constant -> quantity in devices.csv
    "fp32_peak_tflops": "fp32_peak",
    "tf32_peak_tflops": "tf32_peak",
    "bf16_peak_tflops": "bf16_peak",
    "fp8_peak_tflops": "fp8_peak",
    "memory_bandwidth_tbs": "memory_bandwidth",
    "memory_capacity_gb": "memory_capacity",
    "power_limit_w": "power",
    "sm_count": "sm_count",
    "l2_cache_mb": "l2_cache",
}
PUBLISHED = "published"
DATASHEET = "datasheet"


@dataclass(frozen=True)
class Sheet:
    """One device; `rows` are its names in devices.csv, the first that has a quantity counts."""

    name: str
    title: str
    architecture: str
    capability: str
    recipes: tuple[str, ...]
    rows: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    extra: dict[str, tuple[float, str]] = field(default_factory=dict)
    link: tuple[float, float, float, str] = (450, 50, 8, ASSUMED)
    fp8_reason: str = ""
    parent: str = "h100-sxm"  # whose GEMM constants it starts from
    is_power_free: bool = False  # no kernel meets the power limit, so one kernel tells of all
    is_wgmma: bool = True  # tensor cores fed from shared memory; before and beside: mma.sync
    notes: tuple[str, ...] = ()


SHEETS = (
    Sheet(
        "a100",
        "NVIDIA A100 SXM 80GB",
        "ampere",
        "8.0",
        (),
        ("A100 SXM",),
        ("A100", "A100 SXM"),
        link=(300, 25, 8, "NVLink 3, 600 GB/s both ways; a 200 Gb/s network port for each"),
        fp8_reason="the A100 has no FP8 units (compute capability 8.0, FP8 needs 8.9)",
        is_wgmma=False,
    ),
    Sheet(
        "h100-sxm",
        "NVIDIA H100 SXM 80GB",
        "hopper",
        "9.0",
        HOPPER,
        ("H100 SXM",),
        ("H100", "H100 SXM", "H100 80GB", "H100 700W", "DGX H100", "H100 SXM 700W 3.35TB/s"),
        extra={"l2_cache_mb": (50, PAPER)},
        parent="h100-sxm-500w",
    ),
    Sheet(
        "h100-sxm-500w",
        "NVIDIA H100 SXM 96GB, 500 W, 2.4 TB/s",
        "hopper",
        "9.0",
        HOPPER,
        ("H100 SXM",),
        (
            "H100 Meta",
            "H100 SXM Meta",
            "H100 96GB",
            "H100 500W",
            "H100 SXM 500W",
            "H100 SXM 96GB",
            "H100 SXM Meta 500W 2.4TB/s",
            "H100 96GB 2.4TB/s 500W",
            "H100 Meta 500W 2.4TB/s",
            "H100 500W 2.4TB/s",
        ),
        extra={
            "memory_bandwidth_tbs": (2.4, "torchtitan benchmarks/llama3_h100_202412, torchao"),
            "memory_capacity_gb": (96, "torchtitan benchmarks/llama3_h100_202412"),
            "power_limit_w": (500, "torchtitan benchmarks/llama3_h100_202412"),
        },
        notes=("most H100 figures that torchao and torchtitan publish are of this variant",),
        parent="",
    ),
    Sheet(
        "h100-pcie",
        "NVIDIA H100 PCIe 80GB",
        "hopper",
        "9.0",
        HOPPER,
        ("H100 PCIe",),
        ("H100 PCIe", "H100 350W"),
        extra={"power_limit_w": (350, SHEET), "sm_count": (114, PAPER), "l2_cache_mb": (50, PAPER)},
        link=(63, 25, 8, HOST),
    ),
    Sheet(
        "h800",
        "NVIDIA H800 SXM 80GB",
        "hopper",
        "9.0",
        HOPPER,
        ("H800", "H100 SXM"),
        ("H800", "H800 SXM"),
        link=(200, 50, 8, "NVLink cut to 400 GB/s both ways; a 400 Gb/s network port for each"),
        notes=("an H100 SXM with a slower NVLink; no BF16 GEMM of an H800 is published",),
    ),
    Sheet(
        "h20",
        "NVIDIA H20 96GB",
        "hopper",
        "9.0",
        HOPPER,
        ("H20",),
        ("H20", "H20 SXM"),
        extra={
            "fp8_peak_tflops": (296, "INT8 peak, which Hopper's FP8 equals"),
            "power_limit_w": (400, SHEET),
            "l2_cache_mb": (60, "secondary pages"),
        },
        is_power_free=True,
    ),
    Sheet(
        "h200",
        "NVIDIA H200 SXM 141GB",
        "hopper",
        "9.0",
        HOPPER,
        ("H200 SXM",),
        ("H200", "H200 SXM", "GH200", "GH200 SXM"),
    ),
    Sheet(
        "b200",
        "NVIDIA B200 SXM 180GB",
        "blackwell",
        "10.0",
        BLACKWELL,
        ("B200 SXM", "B200"),
        ("B200", "B200 SXM", "B200 1000W", "SM100", "SM100 B200", "GB200", "GB200 SXM"),
        extra={"l2_cache_mb": (126, "GB200's, of the same dies")},
        link=(900, 50, 8, "NVLink 5, 1800 GB/s both ways; a 400 Gb/s network port for each"),
        notes=(BLOCKWISE_ELSEWHERE,),
    ),
    Sheet(
        "b300",
        "NVIDIA B300 SXM 288GB",
        "blackwell",
        "10.3",
        BLACKWELL,
        ("B300 SXM", "B300"),
        ("B300", "B300 SXM", "GB300", "GB300 SXM"),
        extra={"l2_cache_mb": (126, "GB200's, of the same dies")},
        link=(900, 100, 8, "NVLink 5, 1800 GB/s both ways; an 800 Gb/s network port for each"),
        notes=(BLOCKWISE_ELSEWHERE,),
        parent="b200",
    ),
    Sheet(
        "l4",
        "NVIDIA L4 24GB",
        "ada",
        "8.9",
        ADA,
        ("L4",),
        ("L4",),
        extra={"fp32_peak_tflops": (30.3, SHEET)},
        link=(32, 12.5, 4, HOST),
        notes=("no GEMM of an L4 is published here; at 72 W large ones run slower than this",),
        parent="l40s",
        is_wgmma=False,
    ),
    Sheet(
        "l40s",
        "NVIDIA L40S 48GB",
        "ada",
        "8.9",
        ADA,
        ("L40S",),
        ("L40S",),
        extra={"l2_cache_mb": (96, SHEET)},
        link=(32, 12.5, 8, HOST),
        is_wgmma=False,
    ),
    Sheet(
        "rtx-4090",
        "NVIDIA GeForce RTX 4090 24GB",
        "ada",
        "8.9",
        ADA,
        ("RTX 4090",),
        ("RTX 4090", "4090"),
        extra={"memory_capacity_gb": (24, SHEET)},
        link=(32, 12.5, 4, HOST),
        parent="l40s",
        is_wgmma=False,
    ),
    Sheet(
        "rtx-5090",
        "NVIDIA GeForce RTX 5090 32GB",
        "blackwell",
        "12.0",
        BLACKWELL_RTX,
        ("RTX 5090",),
        ("RTX 5090", "5090"),
        extra={"memory_capacity_gb": (32, SHEET), "tf32_peak_tflops": (104.8, SHEET)},
        link=(63, 12.5, 4, HOST),
        parent="rtx-pro-6000",
        is_wgmma=False,
    ),
    Sheet(
        "rtx-pro-6000",
        "NVIDIA RTX PRO 6000 Blackwell 96GB",
        "blackwell",
        "12.0",
        BLACKWELL_RTX,
        ("RTX PRO 6000",),
        ("RTX PRO 6000", "PRO 6000", "RTX 6000 PRO"),
        extra={"memory_capacity_gb": (96, SHEET)},
        link=(63, 12.5, 8, HOST),
        is_wgmma=False,
    ),
    Sheet(
        "mi300x",
        "AMD Instinct MI300X 192GB",
        "cdna3",
        "gfx942",
        ADA,
        ("MI300X",),
        ("MI300X", "MI300X OAM"),
        extra={
            "sm_count": (304, "compute units; maker's data sheet"),
            "l2_cache_mb": (256, "Infinity Cache; maker's data sheet"),
        },
        link=(448, 50, 8, "Infinity Fabric, 896 GB/s both ways; a 400 Gb/s port for each"),
        notes=("its FP8 is the fnuz kind (bias one higher): numerics differ from NVIDIA's",),
    ),
)
BY_NAME = {sheet.name: sheet for sheet in SHEETS}


def sheet_constants(sheet: Sheet) -> dict[str, tuple[float, str, str]]:
    """Return constant -> (value, kind, source) of what is not fitted.

    Raises:
        KeyError: neither devices.csv nor `extra` has a constant.
    """
    link, network, per_node, source = sheet.link
    found = {
        "interconnect_gbs": (link, DATASHEET, source),
        "network_gbs": (network, DATASHEET, source),
        "devices_per_node": (per_node, DATASHEET, source),
    }
    for constant, quantity in QUANTITIES.items():
        if constant in sheet.extra:
            value, source = sheet.extra[constant]
            found[constant] = (value, DATASHEET, source)
            continue
        row = next(r for name in sheet.rows for r in (device_row(name, quantity),) if r)
        kind = DATASHEET if row["kind"].startswith("data sheet") else PUBLISHED
        found[constant] = (float(row["value"]), kind, row["source"])
    return found


def device_row(device: str, quantity: str) -> dict[str, str] | None:
    """Return the row of devices.csv, or None."""
    return _device_rows().get((device, quantity))


@cache
def _device_rows() -> dict[tuple[str, str], dict[str, str]]:
    with (DATA / "devices.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {(row["device"], row["quantity"]): row for row in reversed(rows)}
