"""What a run ran on: versions and devices, and nothing that names the machine."""

from __future__ import annotations

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = (
    "ird_search",
    "torch",
    "transformers",
    "datasets",
    "optuna",
    "safetensors",
    "numpy",
    "scipy",
    "peft",
)


def environment() -> dict[str, str]:
    """Versions and devices, as text."""
    found = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    found["cpu"] = _cpu()
    found["threads"] = str(torch.get_num_threads())
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found["cuda"] = f"{torch.version.cuda} on {', '.join(gpus)}" if gpus else "none"
    return found


def _cpu() -> str:
    """The processor's model name."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()
