"""Peak memory of this process, and of its GPU where torch is in use. torch is never imported from here."""

from __future__ import annotations

import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


def reset_peak_memory() -> None:
    """Start the peak anew. Where the system cannot (anything but Linux), the peak is that of the whole process so far."""
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        pass
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> dict[str, int]:
    """``peak_memory_bytes`` (resident), and ``peak_gpu_memory_bytes`` (allocated by torch) when a GPU is in use."""
    found = {"peak_memory_bytes": _peak_resident_bytes()}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        found["peak_gpu_memory_bytes"] = int(torch.cuda.max_memory_allocated())
    return found


def _peak_resident_bytes() -> int:
    if _STATUS.is_file():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
