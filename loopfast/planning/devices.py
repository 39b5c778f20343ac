"""The rates of GPUs by their datasheets, and the devices of this machine."""

from __future__ import annotations

import os
import re
import timeit
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from loopfast.errors import ConfigError
from loopfast.planning.memory import Resources
from loopfast.planning.networks import DeviceKind

# The share of the datasheet's rate that a diffusion model's training is assumed to reach on a GPU.
UTILISATION = 0.4

# Bytes per second of the network between nodes, for each GPU: an InfiniBand port of 200 Gb/s.
NETWORK = 25e9


@dataclass(frozen=True)
class Device:
    """A device and its rates.

    Attributes:
        title: its name for people.
        kind: ``cpu`` or ``cuda``.
        memory: bytes.
        rates: floating-point operations per second of dense products with float32 sums, by type. ``tf32`` is for
            float32 with ``model.tf32``.
        bandwidth: bytes per second of its memory.
        link: bytes per second in one direction to the other GPUs of its node.
        link_name: the name of that link.
        utilisation: the share of the rates that is assumed to be reached.
        source: the source of the rates.
    """

    title: str
    kind: DeviceKind
    memory: int
    rates: dict[str, float]
    bandwidth: float
    link: float
    link_name: str
    utilisation: float = UTILISATION
    source: str = "datasheet"

    def rate(self, dtype: str, tf32: bool) -> float:
        """Returns the operations per second that are assumed for a type."""
        key = "tf32" if dtype == "float32" and tf32 else dtype
        return self.utilisation * self.rates[key]


def _gpu(
    title: str, gib: int, tera: tuple[float, float, float], bandwidth: float, link: float, link_name: str
) -> Device:
    float32, tf32, half = (1e12 * rate for rate in tera)
    rates = {"float32": float32, "tf32": tf32, "bfloat16": half, "float16": half}
    return Device(title, "cuda", gib * 2**30, rates, bandwidth * 1e9, link * 1e9, link_name)


# From the manufacturer's datasheets and architecture papers: GiB of memory; teraFLOP/s of float32, TF32 and 16-bit
# products, without sparsity and with float32 sums; GB/s of the memory; GB/s of the link in one direction.
DEVICES = {
    "rtx3060": _gpu("GeForce RTX 3060 12 GB", 12, (12.7, 12.7, 25.5), 360, 32, "PCIe 4.0 x16"),
    "rtx3090": _gpu("GeForce RTX 3090 24 GB", 24, (35.6, 35.6, 71.2), 936, 32, "PCIe 4.0 x16"),
    "rtx4090": _gpu("GeForce RTX 4090 24 GB", 24, (82.6, 82.6, 165.2), 1008, 32, "PCIe 4.0 x16"),
    "a100-40": _gpu("A100 SXM 40 GB", 40, (19.5, 156, 312), 1555, 300, "NVLink 3"),
    "a100-80": _gpu("A100 SXM 80 GB", 80, (19.5, 156, 312), 2039, 300, "NVLink 3"),
    "h100-80": _gpu("H100 SXM 80 GB", 80, (67, 494.7, 989.4), 3350, 450, "NVLink 4"),
}

# The share of a CPU's rate in one large product that convolutions and small products are assumed to reach.
_CPU_UTILISATION = 0.5
_CPU_BANDWIDTH, _CPU_LINK = 10e9, 5e9


def parse_memory(text: str) -> int:
    """Returns the bytes of ``24GiB``, ``24GB`` (of 1000³ bytes), ``24g`` (the same as GiB) or a plain number.

    Raises:
        ConfigError: the text is none of these, or means less than a megabyte.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?b)?", text.strip().lower())
    if match:
        number, unit, suffix = match.groups()
        exponent = "kmgt".index(unit) + 1 if unit else 0
        size = round(float(number) * (1000 if suffix == "b" else 1024) ** exponent)
        if size >= 10**6:
            return size
    raise ConfigError(f"--memory: found {text!r}, allowed: a size such as 24GiB, 24GB or 80g")


def choose(wanted: str, name: str | None, memory: str | None, gpus: int | None) -> tuple[Device, Resources]:
    """Returns the device that a run is planned for, and what the run has of it.

    Without a name, the device is this machine's GPU. A machine without a known GPU is planned for as a CPU if the run
    would use it, or as the smallest device of the table that has the memory.

    ``wanted`` is ``model.device``. The others are the arguments ``card``, ``memory`` and ``gpus`` of
    `loopfast.planning.plan`.

    Raises:
        ConfigError: a value is not allowed.
    """
    count = 1 if gpus is None else gpus
    if count < 1:
        raise ConfigError(f"--gpus: found {count}, allowed: a whole number >= 1")
    size = None if memory is None else parse_memory(memory)
    if name is not None and name not in (*DEVICES, "cpu"):
        raise ConfigError(f"--card: found {name!r}, allowed: {', '.join((*DEVICES, 'cpu'))}")
    if name is None and wanted != "cpu":
        name = _present()
    if name is None and (wanted == "cpu" or (wanted == "auto" and size is None and gpus is None)):
        name = "cpu"
    if name is None and size is not None:
        name = next((key for key, device in DEVICES.items() if device.memory >= size), "h100-80")
    device = _cpu() if name == "cpu" else DEVICES[name or "a100-80"]
    return device, Resources(device.kind, size or device.memory, count)


def _present() -> str | None:
    """Returns the name of this machine's GPU, if the table has it."""
    if not torch.cuda.is_available():
        return None
    name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    # such as 3090 and A100
    found = [key for key in DEVICES if key.partition("-")[0].removeprefix("rtx").upper() in name]
    return min(found, key=lambda key: abs(DEVICES[key].memory - memory), default=None)


@cache
def _cpu_rate(threads: int) -> float:
    """Returns this machine's operations per second with a number of threads, from the fastest of five products."""
    size = 1024
    left, right = torch.rand(size, size), torch.rand(size, size)
    return 2 * size**3 / min(timeit.repeat(lambda: left @ right, number=1, repeat=5))


def _cpu() -> Device:
    """Returns this machine's CPU. The first call times a product of float32 matrices."""
    threads = torch.get_num_threads()
    rates = dict.fromkeys(("float32", "tf32", "bfloat16", "float16"), _cpu_rate(threads))
    return Device(
        f"this machine's CPU, {threads} thread(s)",
        "cpu",
        _machine_memory(),
        rates,
        _CPU_BANDWIDTH,
        _CPU_LINK,
        "memory",
        _CPU_UTILISATION,
        "a product of 1024x1024 float32 matrices, timed now",
    )


def _machine_memory() -> int:
    """Returns the bytes of memory that this machine has, or that its control group may use."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(file)
        if path.is_file() and (text := path.read_text("utf-8").strip()).isdigit():
            sizes.append(int(text))
    return min(sizes)
