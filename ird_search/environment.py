"""What a run ran on: versions and devices, and nothing that names the machine."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

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
    found["threads"] = str(torch.get_num_threads())
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    found["cuda"] = f"{torch.version.cuda} on {', '.join(gpus)}" if gpus else "none"
    return found
