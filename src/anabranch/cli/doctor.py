"""``anabranch doctor``: what this machine has, what of it is used, and what is missing."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from anabranch import __version__
from anabranch.cli.options import FLAG, AsJson
from anabranch.cli.output import fact_table, print_json, size, table
from anabranch.errors import AnabranchError
from anabranch.machine import processor_name

if TYPE_CHECKING:
    from anabranch.native import Status

# What speed hangs on, in the order they appeared.
_TELLING = "avx2 fma f16c avx512f avx512bw avx512_vnni avx_vnni avx512_bf16 amx_bf16 asimd bf16 sve i8mm".split()
_REPORTED = ("numpy", "torch", "safetensors", "tokenizers", "transformers")
_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
_SMI_SECONDS = 20


def doctor(
    build: Annotated[
        bool, typer.Option("--build", metavar=FLAG, help="Compile the CPU kernels now, even if that failed before.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what this machine has, what of it is used, and what is missing: processor, compiler, kernels, limits, extras, GPU.

    It works without any extra. With --build, the CPU kernels are compiled now instead of at their first use.
    """
    from anabranch import native

    if build:
        native.build(again=True)
    found = examine()
    if as_json:
        print_json(found)
    else:
        _print(found)


def examine() -> dict[str, Any]:
    """Everything that ``--json`` prints."""
    from anabranch import machine, native
    from anabranch.places import cache_folder

    status, limits = native.status(), machine.cgroup_limits()
    return {
        "version": __version__,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "system": f"{platform.system()} {platform.release()}",
        "isa": _isa(status),
        "compiler": _compiler(),
        "kernels": _kernels(status),
        "threads": {
            "processors": os.cpu_count(),
            "allowed": machine.affinity(),
            "cgroup_cores": limits.cores,
            "usable": machine.usable_cores(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
        "memory": asdict(machine.memory()),
        "cgroup": asdict(limits),
        "cache": str(_or_reason(cache_folder)),
        "packages": _packages(),
        "extras": _extras(),
        "gpu": _gpu(),
        "sandbox": _sandbox(),
    }


def _isa(status: Status) -> dict[str, Any]:
    from anabranch import native

    features, level = native.processor_features(), native.best_level()
    used = status.library.isa if status.is_ready and status.library is not None else None
    return {
        "machine": platform.machine(),
        "processor": processor_name(),
        "features": [name for name in _TELLING if name in features],
        "found": None if level is None else level.name,
        "used": used,
    }


def _compiler() -> dict[str, Any]:
    from anabranch import native

    try:
        found = native.find_compiler()
    except AnabranchError as error:
        return {"command": None, "version": None, "reason": str(error)}
    return {"command": list(found.command), "version": found.version, "reason": ""}


def _kernels(status: Status) -> dict[str, Any]:
    library = status.library
    return {
        "ready": status.is_ready,
        "reason": status.reason,
        "will_build": status.will_build,
        "path": None if library is None else str(library.path),
        "isa": None if library is None else library.isa,
        "compiler": None if library is None else library.compiler,
        "seconds": None if library is None else library.seconds,
        "shipped": library is not None and library.is_shipped,
    }


def _extras() -> dict[str, Any]:
    from anabranch.extras import INTERNAL, extras

    return {
        name: {
            "installed": not extra.missing and not extra.outdated,
            "missing": list(extra.missing),
            "outdated": [str(package) for package in extra.outdated],
        }
        for name, extra in extras().items()
        if name not in INTERNAL
    }


def _packages() -> dict[str, Any]:
    """Versions of what is used where it is here, and those that it must be of."""
    from anabranch.extras import packages

    return {
        package.name: {"version": package.version, "needs": package.needs, "fits": package.fits}
        for package in packages().values()
    }


def _gpu() -> dict[str, Any]:
    """Devices by the driver's tool, and whether torch, if it is here, can use them."""
    devices, torch = _smi(), _torch()
    usable = bool(torch and torch["cuda_available"])
    if usable:
        reason = ""
    elif not devices:
        reason = "no NVIDIA GPU found"
    elif torch is None:
        reason = "torch is not installed; pip install 'anabranch[lm]'"
    else:
        reason = torch["reason"]
    return {"usable": usable, "devices": devices or (torch or {}).get("devices", []), "torch": torch, "reason": reason}


def _sandbox() -> dict[str, Any]:
    """Whether code of models can be run here, behind walls."""
    from anabranch.jail import jail
    from anabranch.sandbox import SandboxError

    try:
        return {"command": jail()[0], "reason": ""}
    except SandboxError as error:
        return {"command": None, "reason": str(error)}


def _smi() -> list[dict[str, Any]]:
    if shutil.which(_SMI[0]) is None:
        return []
    try:
        done = subprocess.run(_SMI, capture_output=True, text=True, timeout=_SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [
        {"name": name, "memory_bytes": int(megabytes) << 20 if megabytes.isdigit() else None, "driver": driver}
        for name, megabytes, driver in (row for row in rows if len(row) == 3)
    ]


def _torch() -> dict[str, Any] | None:
    from anabranch.extras import is_installed

    if not is_installed("torch"):
        return None
    try:
        import torch
    except Exception as error:
        # Whatever a broken installation leads to.
        reason = f"torch cannot be imported: {' '.join(str(error).split())}"
        return {"version": None, "cuda": None, "cuda_available": False, "reason": reason}
    available = torch.cuda.is_available()
    devices = [
        torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count() if available else 0)
    ]
    built_for = torch.version.cuda
    return {
        "version": torch.__version__,
        "cuda": built_for,
        "cuda_available": available,
        "devices": [{"name": each.name, "memory_bytes": each.total_memory, "driver": None} for each in devices],
        "reason": ""
        if available
        else f"torch {torch.__version__} was made for CPUs only"
        if built_for is None
        else f"torch {torch.__version__} (CUDA {built_for}) cannot use it; is the driver new enough?",
    }


def _or_reason(ask: Any) -> Any:
    try:
        return ask()
    except AnabranchError as error:
        return error


def _print(found: dict[str, Any]) -> None:
    fact_table(
        [
            ("anabranch", f"{found['version']}, Python {found['python']['version']}, {found['system']}"),
            ("processor", found["isa"]["processor"]),
            ("instructions", _say_isa(found["isa"])),
            ("compiler", found["compiler"]["version"] or f"none: {found['compiler']['reason']}"),
            ("kernels", _say_kernels(found["kernels"])),
            ("threads", _say_threads(found["threads"], found["cgroup"])),
            ("memory", _say_memory(found["memory"], found["cgroup"])),
            ("torch", _say_torch(found["gpu"]["torch"])),
            ("packages", _say_packages(found["packages"])),
            ("GPU", _say_gpu(found["gpu"])),
            ("sandbox", found["sandbox"]["command"] or f"none: {found['sandbox']['reason']}"),
            ("cache", found["cache"]),
        ]
    )
    rows = [
        [name, "installed", ""]
        if extra["installed"]
        else [name, _say_lack(extra), f"pip install {'-U ' * bool(extra['outdated'])}'anabranch[{name}]'"]
        for name, extra in found["extras"].items()
    ]
    if rows:
        print()
        table(["extra", "", ""], rows, text_columns=3)


def _say_isa(isa: dict[str, Any]) -> str:
    used = f"kernels use {isa['used']}" if isa["used"] else "no kernels use them"
    features = f" ({', '.join(isa['features'])})" if isa["features"] else ""
    return f"{isa['found'] or isa['machine']}{features}; {used}"


def _say_kernels(kernels: dict[str, Any]) -> str:
    if kernels["path"] is None:
        return f"none: {kernels['reason']}"
    origin = "came with the package" if kernels["shipped"] else f"compiled here in {kernels['seconds']:.0f} s"
    ready = "ready" if kernels["ready"] else f"not used: {kernels['reason']}"
    return f"{ready}; {kernels['isa']}, {origin}"


def _say_threads(threads: dict[str, Any], cgroup: dict[str, Any]) -> str:
    text = f"{threads['usable']} usable of {threads['processors']} processors"
    if threads["allowed"] != threads["processors"]:
        text += f"; affinity allows {threads['allowed']}"
    if cgroup["cores"] is not None:
        text += f"; cgroup v{cgroup['version']} allows {cgroup['cores']:g}"
    return text + (f"; OMP_NUM_THREADS={threads['OMP_NUM_THREADS']}" if threads["OMP_NUM_THREADS"] else "")


def _say_memory(memory: dict[str, Any], cgroup: dict[str, Any]) -> str:
    if memory["total_bytes"] is None:
        return "the system does not say"
    text = size(memory["total_bytes"])
    if cgroup["memory_bytes"] is not None:
        text += f"; cgroup v{cgroup['version']} allows {size(cgroup['memory_bytes'])}"
    return text + (f"; {size(memory['available_bytes'])} free" if memory["available_bytes"] is not None else "")


def _say_lack(extra: dict[str, Any]) -> str:
    missing = f"misses {', '.join(extra['missing'])}" if extra["missing"] else ""
    return "; ".join(filter(None, [missing, f"has {'; '.join(extra['outdated'])}" if extra["outdated"] else ""]))


def _say_torch(torch: dict[str, Any] | None) -> str:
    if torch is None:
        return "not installed"
    if torch["version"] is None:
        return torch["reason"].removeprefix("torch ")
    return f"{torch['version']}, for {'CPUs only' if torch['cuda'] is None else 'CUDA ' + torch['cuda']}"


def _say_packages(packages: dict[str, Any]) -> str:
    """Those that a report of a fault should name."""
    named = {name: packages[name]["version"] for name in _REPORTED if name in packages}
    return ", ".join(f"{name} {version}" for name, version in named.items() if version is not None) or "none"


def _say_gpu(gpu: dict[str, Any]) -> str:
    names = [
        f"{device['name']}" + (f" ({size(device['memory_bytes'])})" if device["memory_bytes"] else "")
        for device in gpu["devices"]
    ]
    if not names:
        return "none"
    return ", ".join(names) + ("" if gpu["usable"] else f"; not used: {gpu['reason']}")
