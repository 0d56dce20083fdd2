"""The machine: which device computes, in which precision, and whether the loss is compiled."""

import contextlib
import ctypes
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llm.config import TrainConfig
from llm.generate.compile import wants_compiling

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
    """Where and how a run computes. `bf16`: autocast to it; `compile`: compile the loss; `shard`: weights come and go
    with each block (sharding.py)."""

    device: torch.device
    bf16: bool
    compile: bool
    shard: bool = False

    @property
    def name(self) -> str:
        """The GPU's name, or the kind of device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @property
    def peak_flops(self) -> float | None:
        """FLOP/s in bf16 where the run uses it and the device's peak is in the table above, else None."""
        known = (flops for part, flops in PEAK_FLOPS.items() if part in self.name)
        return next(known, None) if self.bf16 else None

    def autocast(self) -> contextlib.AbstractContextManager:
        """Within this, matrix products are in bf16 if the run uses it; what needs range or precision stays in fp32.
        The bf16 copies of the weights are kept for a second use, but not where the weights themselves are dropped."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=not self.shard)

    def mesh(self, n_ranks: int) -> DeviceMesh:
        """All ranks in a row, for what they share out."""
        return init_device_mesh(self.device.type, (n_ranks,))

    @property
    def precision(self) -> str:
        """The dtype of matrix products, in words."""
        return "bf16 autocast" if self.bf16 else "fp32"

    @property
    def repeatable(self) -> str:
        """How exactly a run repeats itself here, in words."""
        known = {"cpu": "bitwise, with as many CPU threads", "cuda": "nearly, not bitwise"}
        return known.get(self.device.type, "not promised")

    def to_device(self, batch: Tensor) -> Tensor:
        """A batch on this device. CUDA copies it while it computes, which takes memory that the system cannot move."""
        if self.device.type == "cuda":
            return batch.pin_memory().to(self.device, non_blocking=True)
        return batch.to(self.device)

    def peak_memory(self) -> int | None:
        """The most bytes held so far: on the GPU, or by the whole process; None where nobody counts them."""
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
    return Machine(device, bf16, wants_compiling(config.compile, device), config.shard)


def find_device(wish: str = "auto", local_rank: int = 0) -> torch.device:
    """The device that is asked for; auto: the GPU of this rank, else Apple's, else the CPU. Raises ValueError."""
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


def claim_gpu(local_rank: int, n_processes: int) -> bool:
    """Make the GPU of this rank the current one. Returns whether each of this machine's processes has one."""
    if torch.cuda.device_count() < n_processes:
        return False
    torch.cuda.set_device(local_rank)
    return True


def check_kernels(capability: tuple[int, int], built_for: list[str]) -> None:
    """Raises ValueError where this torch has no kernels for the GPU, instead of an error at the first kernel.

    Code for sm_XY runs on GPUs of major version X and a minor version of at least Y; compute_XY is translated for any
    later GPU.
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
    """Whether the hardware multiplies bf16; where it does not, bf16 is emulated and slow."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("amx_bf16"))
    return False


def compile_loss(loss: Callable, *inputs: Tensor) -> tuple[Callable, tuple[Tensor, dict[str, Tensor]]]:
    """The compiled loss, and its result for `inputs`.

    torch compiles the backward pass when it is first needed. Here it is compiled together with the forward pass, so
    that an error of the compiler appears here and can be handled.
    """
    from torch._functorch import config

    compiled = torch.compile(loss)
    with config.patch(force_non_lazy_backward_lowering=True):
        return compiled, compiled(*inputs)


def keep_freed_memory(device: torch.device) -> bool:
    """On a CPU, tell the C library to keep freed memory for the next tensor; returns whether it did (Linux with glibc).

    A training step frees and allocates the same large tensors again and again. Memory that is returned to the system
    has to be filled with zeros before the process gets it back, which takes time in every step.
    """
    if device.type != "cpu":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library
        return False
    trim_threshold, mmap_max = -1, -4  # the names and numbers of malloc.h, in capitals there
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))
