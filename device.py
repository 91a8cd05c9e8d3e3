"""The machine: which device a script runs on and in which dtype, and what the device can do.

    device = choose_device(None)                    # the best there is
    dtype = choose_dtype(device, None)              # "bfloat16" where that is fast
    flops, source = peak_flops(device, dtype)       # for the share of peak that a training step reaches
"""
import importlib.util
import os
import sys
import time

import torch

from files import UserError


def choose_device(name=None):
    """cpu, cuda, cuda:1, mps, xpu, or None for the best there is -> torch.device, checked and made current. Under
    torchrun each process gets the device of its local rank. UserError if the device cannot be used."""
    if name is None:
        name = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
        name += f":{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ and name in ("cuda", "xpu") else ""
    try:
        device = torch.device(name)
        if device.type in ("cuda", "xpu"):
            device = torch.device(device.type, device.index or 0)
            torch.accelerator.set_device_index(device.index)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as e:  # torch raises any of these, depending on the device
        raise UserError(f"device {name!r} cannot be used: {str(e).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    return device


def has_fast_bfloat16(device):
    """Whether matrix multiplications in bfloat16 are faster than in float32, and not only emulated."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    try:
        return torch.ones(1, device=device, dtype=torch.bfloat16).item() == 1.0
    except (RuntimeError, TypeError):  # a Mac before macOS 14
        return False


def choose_dtype(device, name=None):
    """float32, bfloat16, float16, or None for the fastest in which training is safe -> its name."""
    if name is None:
        name = "bfloat16" if has_fast_bfloat16(device) else "float16" if device.type == "cuda" else "float32"
    return name


def can_compile(device):
    """Whether to compile the model unless told otherwise: on CUDA, if the compiler, triton, is installed."""
    found = importlib.util.find_spec("triton") is not None
    if device.type == "cuda" and not found:
        print("triton is not installed: running without torch.compile, which is slower", flush=True)
    return device.type == "cuda" and found


def synchronize(device):
    """Waits until the device has done all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


# FLOP/s of matrix multiplications in 16 bits, without sparsity, as NVIDIA's data sheets give them.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12, "3090": 71e12, "L4": 121e12,
         "V100": 125e12, "T4": 65e12}


def peak_flops(device, dtype):
    """FLOP/s of the device's matrix multiplications, and where the figure comes from; None for an unknown device."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        return next((peak for key, peak in PEAKS.items() if key in name), None), f"{name}'s data sheet"
    if device.type != "cpu":
        return None, ""
    a, times = torch.ones(1024, 1024, dtype=getattr(torch, dtype)), []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - start)
    return 2 * 1024 ** 3 / min(times), "measured now"


def peak_memory(device):
    """The most bytes that the device, or on a CPU this process, has held at once; 0 where that is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
