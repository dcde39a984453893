"""What a cell costs on a device: its memory, and its time from the steps that records hold or from an assumption."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Literal

from powertrain.scaling.cells import Cell
from powertrain.scaling.records import CellRecord
from powertrain.scaling.timing import Timing, with_timings
from powertrain.schema import ConfigError

# Memory of one device in GiB as its driver reports it, by parts of its name; see `hardware.entry`. Not GH200: its data
# sheet knows GPUs of 96 and 144 GB, and the 480GB in its name are the CPU's.
MEMORY_GIB = (
    ("B200", 178.0),
    ("H200", 139.0),
    ("H100 NVL", 93.0),
    ("H100", 79.0),
    ("A100-SXM4-40GB", 39.0),
    ("A100-PCIE-40GB", 39.0),
    ("A100-SXM-64GB", 63.0),
    ("A100", 79.0),
    ("L40S", 44.0),
    ("L40", 44.0),
    ("A40", 44.0),
    ("L4", 22.0),
    ("A10G", 22.0),
    ("RTX 4090", 23.0),
)
# Share of the peak that training reaches where nothing was measured yet: what 100m-sized models of this kind commonly
# reach on one GPU; small models reach less. The plan says when it rests on this.
ASSUMED_UTILISATION = 0.3
# Seconds that the forward and backward pass of a layer take at the least, however small: its kernels are launched one
# by one. An assumption as well, for models too small to fill a GPU.
LAYER_SECONDS = 2e-3
# Tokenisation apart, what a run spends before its first step and after its last: imports, compilation, evaluation.
OVERHEAD_SECONDS = 20.0


@dataclass(frozen=True)
class Device:
    """The device that a plan is priced for."""

    name: str
    peak_flops: float | None  # FLOP/s; None: unknown, and so are times
    memory_gib: float | None


def find_device(name: str) -> Device:
    """Return a device by its name or a part of it, `cpu` included.

    Errors:
        ConfigError: unknown, with the known ones.
    """
    from powertrain.schema import nearest
    from powertrain.training.hardware import PEAK_BF16_FLOPS

    if name.lower() == "cpu":
        return Device("cpu", None, None)
    known = {n.lower(): n for n, _ in PEAK_BF16_FLOPS}
    if name.lower() not in known:
        raise ConfigError(f"device {name!r} is not known: {nearest(name, [*known.values(), 'cpu'])}")
    full = known[name.lower()]
    return Device(full, dict(PEAK_BF16_FLOPS)[full], _memory_gib(full))


def recognised(driver_name: str) -> Device | None:
    """Return the device that a driver calls so, as records do; None where no data sheet says its peak."""
    from powertrain.training.hardware import PEAK_BF16_FLOPS, entry

    found = entry(driver_name, PEAK_BF16_FLOPS)
    return Device(*found, _memory_gib(driver_name)) if found else None


def _memory_gib(name: str) -> float | None:
    from powertrain.training.hardware import entry

    found = entry(name, MEMORY_GIB)
    return found[1] if found else None


def gpu_here() -> str | None:
    """Return what the driver calls this machine's first GPU; None without one."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def choose_device(records: Iterable[CellRecord], gpu: str | None) -> tuple[Device, str]:
    """Return the GPU that a plan is priced for where nobody says which, and why that one.

    Args:
        gpu: what the driver calls the one that is here.
    """
    if gpu is not None and (device := recognised(gpu)):
        return device, "the GPU here"
    counts = Counter(device for r in records if (device := recognised(r.device)))
    if counts:
        return max(counts, key=lambda d: (counts[d], d.name)), "the device of most records"
    return find_device("H200"), "no known GPU is here, and no record names one"


def without_kernels(cell: Cell) -> str | None:
    """Return why layers of a cell run without kernels on a GPU, where no share of the peak is a fair guess, or None."""
    from powertrain.ops.cuda_plan import unsupported_head

    model = cell.config.model
    for mixer in model.layer_mixers:
        if mixer.kind in ("power", "linear"):
            deg = mixer.deg if mixer.kind == "power" else 1
            reason = unsupported_head(model.head_dim, model.head_dim, deg)
            if reason is not None:
                return reason
    return None


# What a time rests on. alone: records of this size, of cells that had this device to themselves. bound: of cells that
# shared it, and would have been faster alone, or of another size. scaled: records of another device. assumed: a share
# of the peak.
Basis = Literal["alone", "bound", "scaled", "assumed", "unknown"]
# How the plan marks such a time, and what the mark means.
MARKS: dict[Basis, tuple[str, str]] = {
    "bound": ("<", "at most: from records of cells that shared the device or of other sizes"),
    "scaled": ("~", "assumed: from records of another device, in the ratio of the peaks"),
    "assumed": ("~", f"assumed: {ASSUMED_UTILISATION:.0%} of the peak, where nothing was measured"),
}


@dataclass(frozen=True)
class Estimate:
    """Time of one cell, alone on one device."""

    seconds: float | None  # None: nothing was measured, and the device's or the mixer's speed is not known
    new_steps: int  # steps that no other cell of its trunk has run before
    basis: Basis

    @property
    def measured(self) -> bool:
        """Whether it comes from records of this device."""
        return self.basis in ("alone", "bound")


@dataclass(frozen=True)
class Step:
    """How long a step took in a record, had it been on this device."""

    size: str
    parameters: float
    flops: float  # executed
    seconds: float  # device-seconds
    basis: Basis


class Pricer:
    """Estimates times from the steps that records hold, else from an assumed utilisation.

    Args:
        records: of earlier cells.
        timings: of their mixers and sizes, each alone on the device; they come before the records' own clocks.
    """

    def __init__(self, device: Device, records: Sequence[CellRecord] = (), timings: Iterable[Timing] = ()) -> None:
        self.device = device
        self.steps: dict[tuple[str, int], list[Step]] = defaultdict(list)
        for r, timed in zip(records, with_timings(records, timings), strict=True):
            theirs = find_device("cpu") if r.device == "cpu" else recognised(r.device)
            ratio = self._ratio(theirs) if theirs else None
            seconds = timed.seconds or r.seconds
            if theirs and seconds and ratio is not None:
                own: Basis = "alone" if timed.seconds else "bound"
                basis = own if theirs.name == device.name else "scaled"
                step = Step(r.size, r.parameters, r.flops("executed") / r.steps, seconds * ratio / r.steps, basis)
                self.steps[r.mixer, r.context].append(step)

    def _ratio(self, theirs: Device) -> float | None:
        """Return what times of a device are multiplied by; None: not known."""
        if theirs.name == self.device.name:
            return 1.0
        if theirs.peak_flops is None or self.device.peak_flops is None:
            return None
        return theirs.peak_flops / self.device.peak_flops

    def step_seconds(self, cell: Cell, layers: Mapping[tuple[str, str], int]) -> tuple[float | None, Basis]:
        """Return the time of a step, from records of the same mixer and context where there are any.

        Without one of the same size that was alone it is the least upper estimate. A larger model fills the device no
        worse: its steps take longer by its FLOPs at most. Only where all records are of larger ones, of the smallest:
        steps of small models are launches of kernels, fewer by the layers that are fewer.

        Args:
            layers: by mixer and size.
        """
        own, parameters = cell.config.model.n_layers, cell.cost.parameters
        flops = cell.batch_tokens * cell.cost.flops_per_token["executed"]
        if steps := self.steps.get((cell.mixer, cell.context)):
            least = max(min(s.parameters for s in steps), parameters)
            estimates = []
            for s in (s for s in steps if s.parameters <= least):
                growth = max(flops / s.flops, own / layers.get((cell.mixer, s.size), own))
                basis: Basis = "bound" if s.basis == "alone" and s.size != cell.size else s.basis
                estimates.append((("alone", "bound", "scaled").index(basis), s.seconds * growth, basis))
            return min(estimates)[1:]
        if self.device.peak_flops is None or without_kernels(cell) is not None:
            return None, "unknown"
        return max(flops / (self.device.peak_flops * ASSUMED_UTILISATION), own * LAYER_SECONDS), "assumed"

    def estimate(
        self, cells: Sequence[Cell], finished: Set[str] = frozenset(), trunk_steps: Mapping[str, int] | None = None
    ) -> dict[str, Estimate]:
        """Return an estimate per cell id; cells of one trunk pay for their shared steps once, smallest budget first.

        Args:
            finished: ids of cells that will not run, and so leave no trunk behind.
            trunk_steps: how far each trunk is here already.
        """
        reached: dict[str, int] = defaultdict(int, trunk_steps or {})
        result: dict[str, Estimate] = {}
        layers = {(c.mixer, c.size): c.config.model.n_layers for c in cells}
        for cell in sorted(cells, key=lambda c: (c.trunk, c.steps)):
            new_steps = cell.steps - min(reached[cell.trunk], cell.decay_start)
            if cell.id not in finished:
                reached[cell.trunk] = max(reached[cell.trunk], cell.decay_start)
            step, basis = self.step_seconds(cell, layers)
            seconds = new_steps * step + OVERHEAD_SECONDS if step is not None else None
            result[cell.id] = Estimate(seconds, new_steps, basis)
        return result
