"""What compiled code depends on beside the model: versions, source files, the processor, the device."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

__all__ = ["Environment", "changed_sources", "sources"]

_VECTOR = ("avx", "sse", "ssse", "pni", "fma", "f16c", "bmi", "amx", "popcnt", "movbe", "abm", "adx", "gfni", "sha_")
"""How the processor's flags begin that a compiler makes use of (x86; of other machines all count)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Environment:
    """Where step graphs were compiled."""

    hero_fx: str
    torch: str
    python: str
    system: str
    machine: str
    """Family of processors, such as `x86_64`."""
    instructions: frozenset[str]
    """Instruction sets that the processor has: compiled code may use any of them."""
    capability: str
    """What PyTorch's own kernels use, such as `AVX512`."""
    device: str
    """Type of the model's device."""
    compute: str
    """Of a GPU: its compute capability and the version of its runtime."""

    @classmethod
    def current(cls, device: str) -> Environment:
        """That of now; `device`: type of the model's."""
        from hero_fx import __version__

        compute = ""
        if device == "cuda":
            major, minor = torch.cuda.get_device_capability()
            compute = f"{major}.{minor}, CUDA {torch.version.cuda}, HIP {torch.version.hip}"
        return cls(
            hero_fx=__version__,
            torch=str(torch.__version__),
            python=".".join(platform.python_version_tuple()[:2]),
            system=platform.system(),
            machine=platform.machine(),
            instructions=_instructions(),
            capability=torch.backends.cpu.get_cpu_capability(),
            device=device,
            compute=compute,
        )

    def lacks(self, needed: Environment) -> list[str]:
        """What is not here as code that was compiled in `needed` needs it, one phrase each."""
        same = ("hero_fx", "torch", "python", "system", "machine", "device", "compute")
        found = [
            f"{name} is {getattr(self, name)!r} here and {getattr(needed, name)!r} in the file"
            for name in same
            if getattr(self, name) != getattr(needed, name)
        ]
        missing = sorted(needed.instructions - self.instructions)
        if missing:
            found.append(f"this processor lacks the instructions {', '.join(missing)}")
        return found


@cache
def _instructions() -> frozenset[str]:
    """The instruction sets of the processor; only Linux lists them, elsewhere they go by the machine and its name."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return frozenset({platform.processor() or platform.machine()})
    for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
        name, _, values = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            x86 = name.strip() == "flags"
            return frozenset(flag for flag in values.split() if not x86 or flag.startswith(_VECTOR))
    return frozenset()


def sources(files: Iterable[str]) -> dict[str, str]:
    """By Python module, a digest of its source file, for those of `files` that are modules.

    What the versions in `Environment` vouch for is left out: PyTorch, the standard library and hero_fx.
    """
    by_file = {
        file: name
        for name, module in list(sys.modules.items())
        if (file := getattr(module, "__file__", None)) is not None
    }
    names = sorted({by_file[file] for file in files if file in by_file})
    vouched = {"torch", "hero_fx", *sys.stdlib_module_names} - {"__main__"}
    return {name: _digest(name) for name in names if name.partition(".")[0] not in vouched}


def changed_sources(then: Mapping[str, str]) -> list[str]:
    """The modules whose source is not what it was."""
    return [name for name, digest in then.items() if _digest(name) != digest]


def _digest(name: str) -> str:
    module = sys.modules.get(name)
    try:
        spec = None if module is not None else find_spec(name)
    except (ImportError, ValueError):
        spec = None
    file = getattr(module, "__file__", None) or (spec.origin if spec is not None else None)
    if file is None or not Path(file).is_file():
        return "missing"
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
