"""What the machine offers: a device, the precision it multiplies fast, and whether compiling pays there."""

import contextlib
import ctypes
import re
import sys
from dataclasses import dataclass

import torch

from llm.config import TrainConfig

# Dense bf16 peak in FLOP/s, from the makers' data sheets, by a part of the name that torch reports.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


@dataclass(frozen=True)
class Machine:
    """Where a run computes. `compile` says whether the loss is compiled."""

    device: torch.device
    bf16: bool
    compile: bool

    @property
    def name(self) -> str:
        """The GPU's name, or the kind of device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s in bf16, where the device is one whose peak is known and the run uses bf16."""
        known = (flops for part, flops in PEAK_FLOPS.items() if part in self.name)
        return next(known, None) if self.bf16 else None

    def autocast(self) -> contextlib.AbstractContextManager:
        """Matrix products in bf16, everything that needs range or precision in fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @property
    def precision(self) -> str:
        """What matrix products are made in."""
        return "bf16 autocast" if self.bf16 else "fp32"

    def peak_memory(self) -> int | None:
        """The most bytes the run held so far: on the GPU, or of the whole process; None where nobody counts."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            import resource
        except ImportError:  # Windows
            return None
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def find_machine(config: TrainConfig, local_rank: int = 0) -> Machine:
    """Resolve `auto` in device, precision and compile. Raises ValueError for a device that cannot be used."""
    device = find_device(config.device, local_rank)
    bf16 = multiplies_bf16(device) if config.precision == "auto" else config.precision == "bf16"
    compiles = device.type == "cuda" if config.compile == "auto" else config.compile == "on"
    return Machine(device, bf16, compiles)


def find_device(wish: str = "auto", local_rank: int = 0) -> torch.device:
    """auto: the GPU of this rank, else Apple's, else the CPU."""
    if wish == "auto":
        wish = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"(cuda|mps|cpu)(:\d+)?", wish):
        raise ValueError(f"device = {wish!r} is no device: use auto, cuda, cuda:1, mps or cpu (--device)")
    device = torch.device(wish)
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    if not available.get(device.type, lambda: True)():
        raise ValueError(f"device = {wish!r}, but torch {torch.__version__} finds none here: use --device auto")
    if device.type == "cuda":
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"there is no {device}: this machine has {torch.cuda.device_count()} GPUs; choose another (--device), "
                f"or start no more processes than GPUs (--nproc-per-node)"
            )
        torch.cuda.set_device(device)
        check_kernels(torch.cuda.get_device_capability(device), torch.cuda.get_arch_list())
    return device


def check_kernels(capability: tuple[int, int], built_for: list[str]) -> None:
    """Raises ValueError where this torch was not built for the GPU, which would fail at its first kernel.

    Code for sm_XY runs on the same major version and a minor of at least Y; compute_XY is translated for any later GPU.
    """
    built_for = [name for name in built_for if name.startswith(("sm_", "compute_"))]  # AMD's are called gfx90a, ..
    if not built_for:
        return
    for name in built_for:
        kind, _, number = name.partition("_")
        version = int("".join(filter(str.isdigit, number)))
        major, minor = divmod(version, 10)
        if (kind == "compute" and (major, minor) <= capability) or (major == capability[0] and minor <= capability[1]):
            return
    raise ValueError(
        f"this GPU has compute capability {capability[0]}.{capability[1]}, and torch {torch.__version__} holds kernels "
        f"for {', '.join(built_for)} only: install a torch build for it (https://pytorch.org/get-started), or use "
        f"--device cpu"
    )


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 products are done by the hardware; elsewhere they are emulated, and slow."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("amx_bf16"))
    return False


def not_compiled(error: Exception) -> str:
    """One line on why torch.compile failed: what its backend raised, without the pages that follow."""
    error = getattr(error, "inner_exception", error)
    reason = (str(error).strip().splitlines() or ["no reason given"])[0]
    return f"not compiled: {type(error).__name__}: {reason[:200]}"


def keep_freed_memory() -> bool:
    """Ask the C library to keep freed memory for the next tensor. A training step on a CPU frees and takes the same
    large tensors again and again; given back to the system each time, every page comes back to be zeroed anew.

    Returns whether it was done: on Linux with glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return False
    trim_threshold, mmap_max = -1, -4  # the names and numbers of malloc.h, in capitals there
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))
