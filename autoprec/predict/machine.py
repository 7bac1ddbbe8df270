"""A device profile's constants as plain floats, named as in the profile: what the formulas read."""

from dataclasses import dataclass, fields

from autoprec.records.devices import DeviceProfile


@dataclass(frozen=True)
class Machine:
    """The constants of a `DeviceProfile`; `records.devices.CONSTANTS` gives meaning and unit."""

    fp32_peak_tflops: float
    tf32_peak_tflops: float
    bf16_peak_tflops: float
    fp8_peak_tflops: float
    memory_bandwidth_tbs: float
    memory_capacity_gb: float
    power_limit_w: float
    sm_count: float
    l2_cache_mb: float
    interconnect_gbs: float
    network_gbs: float
    devices_per_node: float
    fp32_fraction: float
    bf16_fraction: float
    fp8_fraction: float
    fp8_slow_fraction: float
    fp8_rowwise_fraction: float
    fp8_block_fraction: float
    memory_fraction: float
    attention_fraction: float
    link_fraction: float
    wave_share: float
    small_tile_factor: float
    overlap_share: float
    rowwise_swizzle_from: float
    bf16_gemm_floor_us: float
    tensorwise_gemm_floor_us: float
    rowwise_gemm_floor_us: float
    kernel_floor_us: float
    eager_host_us: float
    tensorwise_cast_bytes: float
    amax_bytes: float
    rowwise_cast_bytes: float
    block_cast_bytes: float
    mx_cast_bytes: float
    cast_share_input: float
    cast_share_grad: float
    direct_cast_share: float
    tensorwise_cast_kernels: float
    rowwise_cast_kernels: float
    eager_cast_bytes: float
    eager_cast_kernels: float
    neighbour_kernels: float
    glue_bytes: float
    loss_bytes: float
    optimizer_bytes: float
    step_overhead: float
    communication_overlap: float
    gemm_error_low: float
    gemm_error_high: float
    speedup_error_low: float
    speedup_error_high: float
    time_error: float
    step_error: float

    @property
    def bytes_per_us(self) -> float:
        """What a streaming kernel moves."""
        return self.memory_bandwidth_tbs * 1e6 * self.memory_fraction


def machine_of(profile: DeviceProfile) -> Machine:
    """Return the profile's constants."""
    return Machine(**{field.name: profile.value(field.name) for field in fields(Machine)})
