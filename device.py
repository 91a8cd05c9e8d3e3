"""The machine: on which device a script runs, in which dtype, and what the device can do.

    device = choose_device(None)                    # the best there is
    dtype = choose_dtype(device, None)              # "bfloat16" where that is fast
    flops, source = peak_flops(device, dtype)       # for the share of peak that a training step reaches
"""
import contextlib
import importlib.util
import os
import re
import shutil
import sys
import tempfile
import time

import torch

from files import UserError


def choose_device(name=None):
    """cpu, cuda, cuda:1, mps, xpu, or None for the best there is -> torch.device, tried out and made current. Under
    torchrun each process gets the device of its local rank. UserError if the device cannot be used."""
    if name is None:
        name = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type in ("cuda", "xpu"):
            index = os.environ.get("LOCAL_RANK", 0) if device.index is None else device.index
            if device.index is not None and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
                raise RuntimeError(f"all processes would share it; name {device.type}, and each takes its own")
            device = torch.device(device.type, int(index))
            count = torch.get_device_module(device).device_count()  # 0 if PyTorch was built without them
            if 0 < count <= device.index:
                few = f"this machine has {count}; start torchrun with --nproc_per_node={count}"
                last = f"the last one of this machine is {device.type}:{count - 1}"
                raise RuntimeError(few if name == device.type else last)
            torch.accelerator.set_device_index(device.index)
        torch.zeros(1, device=device).item()  # the device "meta" has no numbers
    except (RuntimeError, AssertionError, ValueError) as e:  # torch raises any of these, depending on the device
        reason = (str(e) or type(e).__name__).splitlines()[0][:200]
        reason = "not one of cpu, cuda, cuda:1, mps, xpu" if reason.startswith("Expected one of") else reason
        raise UserError(f"device {name!r} cannot be used: {reason}") from None
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32
    return device


def has_fast_bfloat16(device):
    """Whether the hardware multiplies matrices in bfloat16, instead of emulating that in float32. On a Mac and on an
    Intel GPU, whether there is a bfloat16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    try:
        return torch.ones(1, device=device, dtype=torch.bfloat16).item() == 1.0
    except (RuntimeError, TypeError):  # a Mac before macOS 14
        return False


def choose_dtype(device, name=None, training=True):
    """The name of a dtype, or None for the fastest that is safe -> the name. Generation is in float32 unless asked
    otherwise, except on CUDA: on a CPU, 16 bits gain much only if decoding is compiled."""
    if name is None and (training or device.type == "cuda"):
        name = "bfloat16" if has_fast_bfloat16(device) else "float16" if device.type == "cuda" else "float32"
    return name or "float32"


def missing_compiler(device):
    """What torch.compile needs on this device and does not find, in words; None if it is all there."""
    def found(variable, *programs):
        return os.environ.get(variable) or any(map(shutil.which, programs))

    if device.type == "cpu" and not found("CXX", "g++", "c++", "clang++", "cl"):
        return "a C++ compiler (as from apt install g++)"
    # PyTorch does not quote the paths that it passes to the compiler.
    spaced = [path for path in (os.path.dirname(torch.__file__), tempfile.gettempdir()) if " " in path]
    if device.type == "cpu" and os.name != "nt" and spaced:
        return f"a path without spaces instead of {spaced[0]}"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton"
    # triton compiles a little C for each kernel. Under Windows it brings its own compiler.
    if device.type == "cuda" and os.name != "nt" and not found("CC", "gcc", "clang"):
        return "a C compiler (as from apt install gcc)"
    return None


def can_compile(device, wanted=None):
    """Whether to compile the model: as wanted or, if that is None, on a GPU of 2017 or later (Volta) if what compiling
    needs is there. UserError if it is wanted on a CPU and there is no compiler."""
    if wanted is not None:
        if wanted and device.type == "cpu" and (missing := missing_compiler(device)):
            raise UserError(f"--compile=True needs {missing}")
        return wanted
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (7, 0):
        return False
    missing = missing_compiler(device)
    if missing and os.environ.get("RANK", "0") == "0":
        print(f"running without torch.compile, which is slower: it needs {missing}", flush=True)
    return not missing


def to_device(ids, device):
    """A numpy array of ids -> a tensor on the device. On CUDA it may still be on its way."""
    ids = torch.from_numpy(ids.astype("int64"))
    return ids.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else ids.to(device)


def synchronize(device):
    """Waits until the device has done all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


# FLOP/s of dense matrix multiplications in float16, in bfloat16 (0: not in hardware) and in float32 (as TF32, if there
# is that), from NVIDIA's data sheets. A pattern must match the device's name to its end.
PEAKS = {
    r"H200": (989e12, 989e12, 494e12), r"H100 (80GB HBM3|SXM5.*)": (989e12, 989e12, 494e12),
    r"H100 PCIe": (756e12, 756e12, 378e12),
    r"A100(-\w+)+|A100 80GB PCIe": (312e12, 312e12, 156e12), r"L40S": (362e12, 362e12, 183e12),
    r"L4": (121e12, 121e12, 60e12), r"RTX 4090": (165e12, 165e12, 83e12), r"RTX 3090": (71e12, 71e12, 36e12),
    r"V100-SXM2-(16|32)GB": (125e12, 0, 15.7e12), r"T4": (65e12, 0, 8.1e12)}


def peak_flops(device, dtype):
    """FLOP/s of the device's matrix multiplications in a dtype, and where the figure comes from; None for a device or a
    dtype that is not known."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        peaks = next((p for pattern, p in PEAKS.items() if re.search(rf"(^|[ ])({pattern})$", name)), (0, 0, 0))
        return dict(zip(("float16", "bfloat16", "float32"), peaks, strict=True))[dtype] or None, f"{name}'s data sheet"
    if device.type != "cpu":
        return None, ""
    return matmul_flops(device, dtype), "measured now"


def matmul_flops(device, dtype):
    """FLOP/s of linear layers with square weights, the best of five or more. (In 16 bits, a CPU is much slower with
    a @ a.) The matrices grow until one multiplication takes 2 ms, or to a size of 8192. A fixed size would take seconds
    where a dtype is slow, as float16 is on most CPUs. If other programs use the CPU, too, only the best of many is
    right, so each size is tried for a tenth of a second."""
    n = 128
    while True:
        n, times = 2 * n, []
        a = torch.randn(n, n, device=device).to(getattr(torch, dtype))
        while len(times) < 5 or (sum(times) < 0.1 and device.type == "cpu"):
            synchronize(device)
            start = time.perf_counter()
            torch.nn.functional.linear(a, a)
            synchronize(device)
            times.append(time.perf_counter() - start)
        if min(times) > 0.002 or n == 8192:
            return 2 * n ** 3 / min(times)


def memory_size(device):
    """The bytes of memory that the device has, or on a CPU this machine or container; None where that is not known."""
    if device.type in ("cuda", "xpu"):
        return torch.get_device_module(device).get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    if not hasattr(os, "sysconf"):  # on Windows
        return None
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError), open(limit) as f:  # there may be no such file, or it says "max"
            size = min(size, int(f.read()))
    return size


def check_memory(device, needed, advice):
    """UserError if these bytes are more than the device has. Say so before they are allocated: some systems end the
    program without a word when memory runs out."""
    size = memory_size(device)
    if size is not None and needed > size:
        raise UserError(f"this takes at least {needed / 1e9:,.1f} GB of memory, and {device} has {size / 1e9:,.1f} GB; "
                        f"{advice}")


def check_training_memory(device, config, micro_steps, micro_batch, block_size, dtype, strategy, eval_only=False):
    """UserError if training a model of this config cannot fit on the device. This counts what is always needed: weights
    and gradients, the optimizer's averages (fsdp divides them, but starts from whole weights), and what a forward pass
    in 16 bits keeps for the backward pass. Evaluating takes only the weights and the logits of a micro-step.
    The estimate of bench_train.py counts more."""
    c, dropout = config, getattr(config, "dropout", 0)  # a changed model.py may have none
    layer = 20 * c.n_embd  # bytes a token
    if device.type == "cpu" and (dtype == "bfloat16" or dropout):  # fast.py then writes the attention's weights out
        layer += (4 if dtype == "float32" else 2) * c.n_head * block_size
    parameters = 12 * c.n_layer * c.n_embd ** 2 + (c.vocab_size + c.block_size) * c.n_embd
    activations = micro_batch * block_size * (c.n_layer * layer * (not eval_only) + 2 * c.vocab_size)
    ids = micro_steps * micro_batch * (block_size + 1) * 8
    check_memory(device, (4 if eval_only or strategy == "fsdp" else 12) * parameters + activations + ids,
                 "choose a smaller model, or a smaller batch_size, gradient_accumulation_steps or block_size")


def check_generation_memory(device, model, rows, length, temperature, advice):
    """UserError if generating `rows` texts at once with a cache of `length` positions cannot fit on the device. This
    counts the weights, the cache, and the logits, of which the samplers make two copies."""
    c, weights = model.config, [*model.parameters(), *model.buffers()]
    cache = 2 * c.n_layer * length * c.n_embd * model.wte.weight.element_size()
    logits = c.vocab_size * (model.wte.weight.element_size() + (8 if temperature > 1e-8 else 0))
    check_memory(device, sum(t.nbytes for t in weights) + rows * (cache + logits), advice)


def peak_memory(device):
    """The most bytes that the device, or on a CPU this process, has held at once; 0 where that is not known."""
    if device.type in ("cuda", "xpu"):
        return torch.accelerator.max_memory_allocated()
    try:
        import resource
    except ImportError:  # on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
