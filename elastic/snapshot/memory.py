"""How much memory this process can still get: on its machine, in its container, and below its own limit."""

from __future__ import annotations

import resource
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = (
    (_CGROUP, "memory.max", "memory.current"),
    (_CGROUP / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def available_bytes() -> int:
    """Bytes available without swapping: of the machine, or less if a limit of the container or process says so."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    fields = {line.split(":")[0]: line.split()[1] for line in lines}
    found = int(fields["MemAvailable"]) * 1024
    for folder, limit, usage in _LIMITS:
        if (folder / limit).exists():
            most = (folder / limit).read_text().strip()
            if most != "max":
                found = min(found, int(most) - int((folder / usage).read_text()) + _cache_bytes(folder))
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        found = min(found, address_space - pages * resource.getpagesize())
    return max(0, found)


def _cache_bytes(folder: Path) -> int:
    """Bytes of cached files, which the kernel frees first."""
    lines = (folder / "memory.stat").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.split()[0] in ("inactive_file", "active_file"))
