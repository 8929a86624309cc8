"""vLLM's server on the processor, as its documentation for x86 says to run it: allocator, OpenMP, bound threads, zentorch on AMD."""

import os
import shutil
import subprocess
from pathlib import Path

# Of Debian's package libtcmalloc-minimal4t64, which vLLM's documentation asks for.
TCMALLOC = Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4")
# Seconds that its reader of messages spins after the last one (VLLM_SHM reader, SpinTimer), which the next one's turn must not pay for.
SPIN_S = 1.5


def preloads(program: str, tcmalloc: Path = TCMALLOC) -> dict[Path, bool]:
    """The libraries that vLLM asks to preload on x86, and whether each is there.

    ``program``: ``vllm`` or ``python`` of its environment, whose package intel-openmp brings the second.
    """
    found = Path(shutil.which(program) or program)
    return {path: path.exists() for path in (tcmalloc, found.parent.parent / "lib" / "libiomp5.so")}


def told_preloads(program: str, tcmalloc: Path = TCMALLOC) -> list[str]:
    """`preloads` as a record tells them."""
    return [path.name if there else f"{path.name} is not there" for path, there in preloads(program, tcmalloc).items()]


def environment(
    program: str,
    bind: str,
    tcmalloc: Path = TCMALLOC,
    *,
    zen: Path | None = None,
    cache: Path | None = None,
) -> dict[str, str]:
    """Variables of its process.

    Args:
        program: as of `preloads`.
        bind: cores of its threads, such as "0-1".
        tcmalloc: preloaded, where it exists.
        zen: a folder with zentorch (``pip install --target``); vLLM takes its platform for AMD's Zen where that can be imported.
        cache: where it keeps what it compiles; default: where it usually does.
    """
    there = [str(path) for path, exists in preloads(program, tcmalloc).items() if exists]
    caches = {"VLLM_CACHE_ROOT": cache / "vllm", "TORCHINDUCTOR_CACHE_DIR": cache / "inductor"} if cache else {}
    return {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": bind,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "PYTHONPATH": str(zen or ""),
        **({"LD_PRELOAD": ":".join(there)} if there else {}),
        **{name: str(path) for name, path in caches.items()},
    }


def platform_of(program: str, variables: dict[str, str]) -> str:
    """The class of vLLM's platform in that environment, as ``ZenCpuPlatform``, which its log does not say; empty where it fails."""
    python = Path(shutil.which(program) or program).with_name("python")
    code = "from vllm.platforms import current_platform as found; print('platform', type(found).__name__)"
    done = subprocess.run(
        [str(python), "-c", code], capture_output=True, text=True, env={**os.environ, **variables}, check=False
    )
    return next((line.split()[1] for line in done.stdout.splitlines() if line.startswith("platform ")), "")
