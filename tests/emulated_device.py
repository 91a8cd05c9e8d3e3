"""Runs a script on an NVIDIA GPU or on a Mac's GPU that is not there.

    python tests/emulated_device.py train.py --device=cuda --max_iters=5
    EMULATE=mps python tests/emulated_device.py sample.py
    EMULATED_GPU="Tesla T4" EMULATED_CAPABILITY=7.5 python tests/emulated_device.py train.py   # what does it choose?
    EMULATED_SYNCS=syncs.json python tests/emulated_device.py train.py   # where does the program wait for the device?

Tensors say that they lie on cuda:0 (or mps:0). The CPU computes their numbers. An operator that mixes them with CPU
tensors fails as it does on the device. Functions of torch.cuda check their arguments as the real ones do. MPS has no
float64. Under autocast, matrix multiplications round to the dtype, and norms, softmax and the loss stay in float32.

EMULATED_SYNCS names a file for a list of [step, call, where]: every call that makes the program wait until the device
has done its work, such as .item(), bool() or nonzero(). The step is the script's iter_num, or null.

This shows crashes, wrong devices, wrong arguments, wrong choices and unwanted waiting. In float32 the losses are the
CPU's. It cannot show speed, the device's own kernels, torch.compile, CUDA graphs or NCCL: those need the device.
"""
import importlib.util
import json
import os
import runpy
import sys
import types

import torch
import torch.utils._foreach_utils
import torch.utils._pytree as pytree
from torch.overrides import TorchFunctionMode

KIND = os.environ.get("EMULATE", "cuda")
HERE = torch.device(KIND, 0)
NAME = os.environ.get("EMULATED_GPU", "NVIDIA A100-SXM4-80GB")
CAPABILITY = tuple(int(n) for n in os.environ.get("EMULATED_CAPABILITY", "8.0").split("."))


# --- waiting for the device ---

syncs = []  # [step, call, where], in order
WAITING = {"aten._local_scalar_dense": "item", "aten.nonzero": "nonzero", "aten.equal": "equal",
           "aten.masked_select": "masked_select", "aten._unique2": "unique", "aten.repeat_interleave": "repeats"}


def count_sync(call):
    """Notes that the program waits for the device, and where: the innermost function that is not this file's or
    torch's."""
    frame = sys._getframe(1)
    library = os.path.dirname(torch.__file__)
    while frame and (frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith((library, "<"))):
        frame = frame.f_back
    where = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_code.co_name}" if frame else "?"
    syncs.append([getattr(sys.modules.get("__main__"), "iter_num", None), call, where])


# --- tensors ---

def is_here(device):
    """Whether `device`, as a caller may write it, is the emulated one."""
    if device is None or isinstance(device, bool):
        return False
    if isinstance(device, int):
        return KIND == "cuda"
    try:
        return torch.device(device).type == KIND
    except (RuntimeError, TypeError):
        return False


class DeviceTensor(torch.Tensor):
    """A tensor that says it lies on the device. Underneath it is a meta tensor; `raw` holds its numbers."""
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: HERE)
    is_cuda = property(lambda self: KIND == "cuda")
    is_mps = property(lambda self: KIND == "mps")
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    @staticmethod
    def __new__(cls, raw, requires_grad=False):
        if KIND == "mps" and raw.dtype in (torch.float64, torch.complex128):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support it.")
        t = torch.Tensor._make_wrapper_subclass(
            cls, raw.size(), strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device="meta",
            requires_grad=requires_grad)
        t.raw = raw
        return t

    def get_device(self):
        return 0

    def __repr__(self, **kwargs):
        return f"{KIND}({self.raw!r})"

    def __format__(self, spec):
        if self.dim():
            return repr(self)
        return format(self.item(), spec)

    def __tensor_flatten__(self):
        return ["raw"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return DeviceTensor(inner["raw"])

    @classmethod
    def __torch_dispatch__(cls, func, types_, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), str(func).rpartition(".")[0]  # without the overload
        if name == "aten._has_compatible_shallow_copy_type":  # Module.to asks; no is the answer that swaps the tensors
            return False
        tensors = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        copies = name in ("aten.copy_", "aten._to_copy")
        check_devices(name, tensors, copies)
        if name in WAITING or (name in ("aten.index", "aten.index_put_") and any(
                t is not None and t.dtype == torch.bool for t in args[1])):
            count_sync(WAITING.get(name, "index by a mask"))
        to_cpu = copies and kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
        into_cpu = name == "aten.copy_" and not isinstance(args[0], DeviceTensor)
        if (to_cpu or into_cpu) and not kwargs.get("non_blocking"):
            count_sync("copy to the CPU")
        if name == "aten.copy_" and isinstance(args[0], DeviceTensor) and not isinstance(args[1], DeviceTensor):
            count_upload(args[1], args[2] if len(args) > 2 else False)
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        args_, kwargs_ = pytree.tree_map(raw_of, (args, kwargs))
        if name in PRODUCTS and args_[0].dtype == torch.float16:  # a CPU is slow here, and a GPU adds in float32 too
            widened = pytree.tree_map(lambda t: t.float() if isinstance(t, torch.Tensor) else t, args_)
            out = func(*widened, **kwargs_).to(torch.float16)
        else:
            out = func(*args_, **kwargs_)
        if to_cpu:
            return out
        if into_cpu:
            return args[0]
        changed = {id(a.raw): a for a in tensors if isinstance(a, DeviceTensor)}  # what an in-place operator gives back
        return pytree.tree_map(lambda o: changed.get(id(o)) if id(o) in changed else onto(o), out)


PRODUCTS = {"aten.mm", "aten.bmm", "aten.addmm", "aten.baddbmm"}


def check_devices(name, tensors, copies):
    """RuntimeError if an operator gets a CPU tensor beside the device's that the device would not take."""
    if copies:
        return
    on_cpu = [t for t in tensors if not isinstance(t, DeviceTensor)]
    if name in ("aten.index", "aten.index_put_", "aten._index_put_impl_"):  # indices may lie on the CPU
        on_cpu = [t for t in on_cpu if t.dtype not in (torch.int64, torch.int32, torch.bool, torch.uint8)]
    if not name.startswith("aten._fused_"):  # a single number may, too
        on_cpu = [t for t in on_cpu if t.dim()]
    if on_cpu:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, {HERE} and "
                           f"cpu! ({name})")


def count_upload(x, non_blocking):
    """A copy from the CPU waits, unless it is non-blocking and from pinned memory."""
    if x.dim() and not (non_blocking and getattr(x, "pinned", False)):
        count_sync("copy from memory that is not pinned")


def raw_of(x):
    return x.raw if isinstance(x, DeviceTensor) else x


def onto(x):
    """x on the emulated device, sharing its numbers."""
    return DeviceTensor(x) if isinstance(x, torch.Tensor) and not isinstance(x, DeviceTensor) else x


def copied(x):
    """A copy of x on the emulated device."""
    if not isinstance(x, torch.Tensor) or isinstance(x, DeviceTensor):
        return x
    return DeviceTensor(x.detach().clone(), requires_grad=x.requires_grad)


def scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """PyTorch's own makes its mask in C++, on the meta device underneath."""
    for name, t in (("key", k), ("value", v), ("attn_mask", attn_mask)):
        if t is not None and not isinstance(t, DeviceTensor):
            raise RuntimeError(f"Expected all tensors to be on the same device ({name} lies on the CPU)")
        if t is not None and t.dtype != q.dtype and not (name == "attn_mask" and t.dtype == torch.bool):
            raise RuntimeError(f"Expected query, key and value to have the same dtype, but got {q.dtype} and {t.dtype} "
                               f"({name})")
    scores = q @ k.transpose(-2, -1) * (scale or q.size(-1) ** -0.5)
    if is_causal:
        scores = scores + onto(torch.full((q.size(-2), k.size(-2)), float("-inf"), dtype=q.dtype).triu(1))
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    return torch.dropout(torch.softmax(scores, -1), dropout_p, dropout_p > 0) @ v


# --- functions ---

# What autocast computes in its dtype, and what in float32. These lists hold what occurs in a GPT.
LOW = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention"}
HIGH = {"layer_norm", "softmax", "log_softmax", "cross_entropy", "nll_loss", "norm", "exp", "log", "pow", "__pow__",
        "sum", "cumsum", "prod"}


def autocast(func, args, kwargs):
    """The arguments, in the dtypes that autocast gives them."""
    low = torch.get_autocast_dtype(KIND)
    dtype = low if func.__name__ in LOW else torch.float32 if func.__name__ in HIGH else None
    if dtype is None:
        return args, kwargs

    def cast(x):
        return x.to(dtype) if isinstance(x, DeviceTensor) and x.dtype in (torch.float32, low) else x
    return pytree.tree_map(cast, (tuple(args), kwargs))


class Emulation(TorchFunctionMode):
    """Sends what names the device to the CPU, and marks the result."""

    def __torch_function__(self, func, types_, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if func in (torch.Tensor.to, torch.Tensor.cuda):
            return self.move(func, first, list(args[1:]), kwargs)
        if func is torch.load and is_here(kwargs.get("map_location")):
            return pytree.tree_map(copied, func(*args, **kwargs | {"map_location": "cpu"}))
        generator = kwargs.get("generator")
        if generator is not None and (isinstance(first, DeviceTensor) or kwargs.get("device") is not None):
            expected = HERE if isinstance(first, DeviceTensor) else torch.device(kwargs["device"])
            if generator.device.type != expected.type:
                raise RuntimeError(f"Expected a '{expected}' device type for generator but found '{generator.device}'")
        if is_here(kwargs.get("device")):
            if func in (torch.tensor, torch.as_tensor) and not isinstance(first, (int, float, bool)):
                count_sync(func.__name__)
            return onto(func(*args, **kwargs | {"device": "cpu"}))
        kwargs.pop("pin_memory", None)
        if func is torch.Tensor.pin_memory:
            first = first.clone()
            first.pinned = True
            return first
        if isinstance(first, DeviceTensor):
            if func is torch.Tensor.tolist:
                count_sync("tolist")
                return first.raw.tolist()
            if func is torch.Tensor.numpy:
                raise TypeError(f"can't convert {HERE} device type tensor to numpy. Use Tensor.cpu() to copy the "
                                "tensor to host memory first.")
            if func is torch.Tensor.cpu and not first.requires_grad:
                count_sync("cpu")
                return first.raw.clone()
            if func is torch.Tensor.__setitem__ and not isinstance(args[2], torch.Tensor):
                first.raw[pytree.tree_map(raw_of, args[1])] = args[2]  # C++ would put the number on the meta device
                return None
        if torch.is_autocast_enabled(KIND):
            args, kwargs = autocast(func, args, kwargs)
        if isinstance(first, DeviceTensor) and func is torch.nn.functional.scaled_dot_product_attention:
            return scaled_dot_product_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def move(self, func, x, rest, kwargs):
        """x.to(...) and x.cuda(...)."""
        target, non_blocking = kwargs.pop("device", None), kwargs.get("non_blocking", False)
        if func is torch.Tensor.cuda:
            target, rest = HERE, []
        elif rest and isinstance(rest[0], torch.Tensor):
            target, rest = rest[0].device, [rest[0].dtype]
        elif rest and rest[0] is not None and not isinstance(rest[0], torch.dtype):
            target = rest.pop(0)
        if target is None:
            return func(x, *rest, **kwargs)
        if not is_here(target):
            return func(x, target, *rest, **kwargs)
        dtype = kwargs.get("dtype") or next((r for r in rest if isinstance(r, torch.dtype)), None)
        if not isinstance(x, DeviceTensor):
            count_upload(x, non_blocking)
        if dtype not in (None, x.dtype) and not isinstance(x, DeviceTensor):
            return copied(func(x, dtype))
        x = copied(x)
        return x if dtype in (None, x.dtype) else func(x, dtype)


class Generator(torch.Generator):
    """A generator that says it lies where it was asked to. It draws the CPU's numbers."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, device="cpu")

    def __init__(self, device="cpu"):
        super().__init__()
        self.place = torch.device(device)

    device = property(lambda self: self.place)


class Event:
    """A point in the device's work. It has passed already."""

    def __init__(self, device=None, **how):
        pass

    record = wait = elapsed_time = lambda self, *other: 0.0
    query = lambda self: True  # noqa: E731

    def synchronize(self):
        count_sync("synchronize")


# --- torch.cuda, torch.mps and torch.accelerator ---

def cuda_index(device, optional=True):
    """The number of a device, from what torch.cuda's functions take; an error where they raise one."""
    return torch.cuda._utils._get_device_index(device, optional=optional)


def set_device(device):
    if cuda_index(device, optional=False) > 0:
        raise RuntimeError("CUDA error: invalid device ordinal")


def set_device_index(device):
    """torch.accelerator's: takes a device or its number."""
    if (device if isinstance(device, int) else torch.device(device).index or 0) > 0:
        raise RuntimeError(f"{KIND} error: invalid device ordinal")


def synchronize(device=None):
    if KIND == "cuda":
        cuda_index(device)
    count_sync("synchronize")


def install_cuda():
    properties = types.SimpleNamespace(name=NAME, major=CAPABILITY[0], minor=CAPABILITY[1], total_memory=80 << 30,
                                       multi_processor_count=108)
    for name, f in dict(
            is_available=lambda: True, is_initialized=lambda: True, init=lambda: None, _lazy_init=lambda: None,
            device_count=lambda: 1, current_device=lambda: 0, set_device=set_device, synchronize=synchronize,
            get_device_name=lambda device=None: NAME, get_device_properties=lambda device=None: properties,
            get_device_capability=lambda device=None: CAPABILITY,
            is_bf16_supported=lambda including_emulation=True: CAPABILITY[0] >= 8 or including_emulation,
            max_memory_allocated=lambda device=None: 1 << 30, memory_allocated=lambda device=None: 1 << 29,
            max_memory_reserved=lambda device=None: 1 << 30, memory_reserved=lambda device=None: 1 << 30,
            reset_peak_memory_stats=lambda device=None: None, mem_get_info=lambda device=None: (70 << 30, 80 << 30),
            empty_cache=lambda: None, manual_seed=lambda seed: None, manual_seed_all=lambda seed: None,
            is_current_stream_capturing=lambda: False,
            get_rng_state=lambda device="cuda": torch.get_rng_state()).items():
        setattr(torch.cuda, name, f)
    find_spec = importlib.util.find_spec  # PyTorch for CUDA brings triton, which compiles only for a real GPU
    importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
    foreach = torch.utils._foreach_utils
    kernels = foreach._get_foreach_kernels_supported_devices()
    foreach._get_foreach_kernels_supported_devices = lambda: [*kernels, "meta"]  # C++ groups by the device underneath


def install_mps():
    torch.backends.mps.is_available = torch.backends.mps.is_built = lambda: True
    for name, value in dict(empty_cache=None, current_allocated_memory=1 << 29, driver_allocated_memory=1 << 30,
                            recommended_max_memory=16 << 30, manual_seed=None).items():
        setattr(torch.mps, name, lambda *a, value=value: value)
    torch.mps.synchronize = synchronize


def install():
    """From here on, the device is there."""
    install_cuda() if KIND == "cuda" else install_mps()
    stream = types.SimpleNamespace(is_capturing=lambda: False, synchronize=synchronize)
    for name, f in dict(
            is_available=lambda: True, current_accelerator=lambda check_available=False: torch.device(KIND),
            device_count=lambda: 1, current_device_index=lambda: 0, current_stream=lambda device=None: stream,
            synchronize=synchronize, set_device_index=set_device_index,
            max_memory_allocated=lambda device=None: 1 << 30, memory_allocated=lambda device=None: 1 << 29,
            reset_peak_memory_stats=lambda device=None: None).items():
        setattr(torch.accelerator, name, f)
    torch.compile = lambda model=None, **options: model if model is not None else (lambda f: f)
    torch.nn.Module.compile = lambda self, *args, **options: None
    torch.Tensor.is_pinned = lambda self, *args: getattr(self, "pinned", False)
    torch.__future__.set_swap_module_params_on_conversion(True)  # keeps tied weights tied
    save = torch.save

    def save_raw(o, *args, **kwargs):
        on_cpu = pytree.tree_map(lambda x: x.raw.detach().clone() if isinstance(x, DeviceTensor) else x, o)
        save(on_cpu, *args, **kwargs)
    torch.save = save_raw
    torch.Event = Event
    profile, activities = torch.profiler.profile, [torch.profiler.ProfilerActivity.CPU]
    torch.profiler.profile = lambda **how: profile(**how | {"activities": activities})
    torch.Generator = Generator
    Emulation().__enter__()


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    install()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        if os.environ.get("EMULATED_SYNCS"):
            with open(os.environ["EMULATED_SYNCS"], "w", encoding="utf-8") as f:
                json.dump(syncs, f)
