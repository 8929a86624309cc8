"""Devices as the calculator sees them: how much they compute, read and send a second, and how much they hold.

The named profiles carry figures of vendors' data sheets (dense 16-bit matrix products; links counted one way, half of the usual sum of
both). What kernels reach of that is `Efficiency`; only the A100's is fitted, to the times that the paper measured.
"""

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anabranch.bounds import shown
from anabranch.errors import ConfigError, DataError
from anabranch.files import atomic_write_json, parse_json

# Figures whose products stay finite.
_MOST, _MOST_DEVICES = 1e30, 1e6


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """What kernels reach of a device's figures, as shares.

    Attributes:
        gemm: matrix products, apart from tiles that do not fill the device (`Hardware.num_units`).
        attention: reading keys and values in decoding.
        prefill: attention of prompts.
        network: collectives.
        launch_s: seconds that a kernel takes however little it does.
        collective_s: the same of a collective.
    """

    gemm: float = 1.0
    attention: float = 1.0
    prefill: float = 1.0
    network: float = 1.0
    launch_s: float = 0.0
    collective_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("gemm", "attention", "prefill", "network"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"efficiency.{name} is {getattr(self, name)}; it must be above 0 and at most 1")
        for name in ("launch_s", "collective_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"efficiency.{name} is {getattr(self, name)}; it must be at least 0 and finite")


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device, and how many of them work on a model together (tensor parallel).

    Attributes:
        name: in tables and files.
        memory_bytes: of one device.
        memory_bandwidth: bytes/s of one device.
        compute: peak FLOP/s of one device.
        network_bandwidth: bytes/s that one device sends; 0 where there is no link.
        num_devices: tensor-parallel degree, N_GPU.
        sustained_compute: FLOP/s that the best matrix products reach, for the optimum; None takes ``compute``.
        num_units: processors of one device over which the tiles of a product are dealt out in whole rounds; 0 for no rounds.
        tile: rows and columns of such a tile.
        efficiency: see `Efficiency`.
        machine: what was measured, where the figures were: a pipeline is for it, and not for the figures of one measuring.
    """

    name: str
    memory_bytes: float
    memory_bandwidth: float
    compute: float
    network_bandwidth: float = 0.0
    num_devices: int = 1
    sustained_compute: float | None = None
    num_units: int = 0
    tile: tuple[int, int] = (128, 128)
    efficiency: Efficiency = field(default_factory=Efficiency)
    machine: str | None = None

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "memory_bandwidth", "compute"):
            self._check(name, 1, _MOST)
        if self.network_bandwidth != 0:
            self._check("network_bandwidth", 1, _MOST)
        if self.sustained_compute is not None:
            self._check("sustained_compute", 1, _MOST)
        self._check("num_devices", 1, _MOST_DEVICES)
        if self.num_devices > 1 and self.network_bandwidth <= 0:
            raise ConfigError(f"{self.name} has {self.num_devices} devices, but network_bandwidth is 0")

    def _check(self, name: str, least: float, most: float) -> None:
        value = getattr(self, name)
        if not least <= value <= most:
            raise ConfigError(f"{name} of {self.name} is {shown(value)}; it must be {least:g} to {most:g}")

    @property
    def best_compute(self) -> float:
        """FLOP/s of one device for the optimum."""
        return self.sustained_compute or self.compute

    @property
    def identity(self) -> dict[str, Any]:
        """What stays the same when it is measured again; all of it where it was not measured."""
        if self.machine is None:
            return self.to_dict()
        return {"machine": self.machine, "num_devices": self.num_devices}

    def replace(self, **changes: Any) -> "Hardware":
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def fill(self, rows: int, columns: int) -> float:
        """Share of the device that a product of this shape keeps busy: its tiles over the whole rounds they take."""
        if not self.num_units or rows < 1 or columns < 1:
            return 1.0
        tiles = math.ceil(rows / self.tile[0]) * math.ceil(columns / self.tile[1])
        used = rows * columns / (self.tile[0] * self.tile[1])
        return used / (math.ceil(tiles / self.num_units) * self.num_units)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Hardware":
        """Read back what `to_dict` gives. Raises ConfigError for a wrong field."""
        try:
            made = {**values, "tile": tuple(values.get("tile", (128, 128)))}
            made["efficiency"] = Efficiency(**values.get("efficiency", {}))
            return cls(**made)
        except TypeError as error:
            raise ConfigError(f"no profile of a device: {error}") from None

    def save(self, path: str | Path) -> None:
        """As JSON, all or nothing."""
        atomic_write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "Hardware":
        """Read a profile. Raises DataError if there is none, ConfigError if it is malformed."""
        try:
            return cls.from_dict(parse_json(Path(path).read_text(encoding="utf-8")))
        except OSError as error:
            raise DataError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from None
        except ValueError as error:
            if isinstance(error, ConfigError):
                raise
            raise DataError(f"{path} is not JSON: {error}") from None


def _device(
    name: str, memory_gb: float, memory_gbs: float, tflops: float, network_gbs: float = 0.0, **more: Any
) -> Hardware:
    return Hardware(
        name=name,
        memory_bytes=memory_gb * 1e9,
        memory_bandwidth=memory_gbs * 1e9,
        compute=tflops * 1e12,
        network_bandwidth=network_gbs * 1e9,
        **more,
    )


# The A100's shares are fitted to the measured column of the paper's table 2: 108 processors in tiles of 128 x 128 explain why its KQV
# and O products reach 68% and 55% of the peak and those of the feed-forward 88%; launches are our guess.
_A100 = Efficiency(gemm=0.955, attention=0.82, prefill=0.088, network=0.707, launch_s=5e-6, collective_s=1.5e-5)

PROFILES: dict[str, Hardware] = {
    device.name: device
    for device in (
        _device("v100", 32, 900, 125, 150),
        _device("a100-40gb", 40, 1555, 312, 300, num_units=108, efficiency=_A100),
        # 260: what the paper's optimum of 1,857 tokens/s for 70e9 parameters comes from
        _device("a100", 80, 2000, 312, 300, sustained_compute=260e12, num_units=108, efficiency=_A100),
        _device("h100", 80, 3350, 989, 450, num_units=132),
        _device("h200", 141, 4800, 989, 450, num_units=132),
        _device("b100", 192, 8000, 1750, 900),
        _device("b200", 192, 8000, 2250, 900),
        _device("mi250", 128, 3277, 362, 400),
        _device("mi300x", 192, 5300, 1307, 448),
        _device("mi325x", 256, 6000, 1307, 448),
        _device("gaudi2", 96, 2450, 432, 300),
        _device("gaudi3", 128, 3700, 1835, 600),
        _device("rtx6000-ada", 48, 960, 182, 32),
    )
}


def find_hardware(name: str, num_devices: int | None = None) -> Hardware:
    """A named profile, or one in a JSON file. Raises ConfigError, with the nearest name, if there is none."""
    if Path(name).suffix == ".json":
        found = Hardware.load(name)
    elif name in PROFILES:
        found = PROFILES[name]
    else:
        near = difflib.get_close_matches(name, PROFILES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PROFILES)}, cpu, or a .json file"
        raise ConfigError(f"no hardware {name!r}; {hint}")
    return found if num_devices is None else found.replace(num_devices=num_devices)
