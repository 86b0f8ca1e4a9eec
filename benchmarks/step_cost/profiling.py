"""Where a step's time goes, by kind of work."""

import re
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

PRODUCTS = "matrix products and convolutions"
ATTENTION = "fused attention"
NORMS = "norms, softmax and activations"
COPIES = "copies and memory"
ELEMENTWISE = "element-wise and sums"
REST = "generated kernels and Python"
KINDS = (PRODUCTS, ATTENTION, NORMS, ELEMENTWISE, COPIES, REST)
_PATTERNS = (
    (REST, r"^triton_(poi|per|red)"),
    (ATTENTION, r"flash|efficient_attention|cudnn_attention|fmha"),
    (NORMS, r"layer_norm|softmax|gelu|native_norm|batch_norm|relu|silu|tanh|erf|nll_loss"),
    (PRODUCTS, r"mm$|bmm|addmm|conv|gemm|cutlass|xmma|mkldnn|linear"),
    (COPIES, r"copy|cat$|empty|contiguous|clone|zero|fill|gather|index|stack|select|slice|memcpy"
             r"|memset|expand|view|reshape|transpose|resize|as_strided|scatter|pad$"),
    (ELEMENTWISE, r"^aten::|elementwise|reduce"),
)  # fmt: skip


def kind_of(name: str) -> str:
    """The kind of work that an operation or kernel does, by its name."""
    lowered = name.lower()
    return next((kind for kind, pattern in _PATTERNS if re.search(pattern, lowered)), REST)


def time_by_kind(step: Callable[[], None], device: torch.device) -> dict[str, float]:
    """Share of a step's time in each kind of work, 0 to 1.

    On CUDA by kernels; time in which no kernel runs is not in it. On the CPU by operations, where
    compiled graphs and Python between the operations are what remains.
    """
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as recorded:
        step()
    seconds: dict[str, float] = defaultdict(float)
    for event in recorded.key_averages():
        on_device = event.device_type.name != "CPU"
        if on_device and event.is_user_annotation:
            continue
        if on_device == (device.type == "cuda"):
            own = event.self_device_time_total if on_device else event.self_cpu_time_total
            seconds[kind_of(event.key)] += own
    total = sum(seconds.values()) or 1.0
    return {kind: seconds[kind] / total for kind in KINDS if seconds[kind] > 0}
