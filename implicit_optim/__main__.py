"""What a bug report needs: ``python -m implicit_optim``. No path, no name of a host or of a user."""

import platform
import subprocess
from importlib import metadata

import torch

from implicit_optim import __version__

OPTIONAL = ("numpy", "triton", "torchvision", "pillow", "matplotlib", "tqdm")  # where installed


def facts() -> dict[str, str]:
    """Versions, system, devices and settings by name."""
    return {
        "implicit_optim": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "torch": f"{torch.__version__} ({_build()})",
        **{name: found for name in ("jaxtyping", *OPTIONAL) if (found := _version(name))},
        "system": platform.platform(),
        "threads": f"{torch.get_num_threads()} intra-op, {torch.get_num_interop_threads()} inter-op",
        **{f"device {name}": what for name, what in _devices().items()},
        "default dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "float32 matmul": torch.get_float32_matmul_precision(),
        "deterministic": "yes" if torch.are_deterministic_algorithms_enabled() else "no",
    }


def _build() -> str:
    cuda, hip = torch.version.cuda, torch.version.hip
    if cuda is not None:
        return f"built for CUDA {cuda}"
    return "built for CPU" if hip is None else f"built for ROCm {hip}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> dict[str, str]:
    found = {"cpu": platform.machine()}
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            name = torch.cuda.get_device_name(i)
            found[f"cuda:{i}"] = f"{name}, capability {major}.{minor}, driver {_driver()}"
    if torch.backends.mps.is_available():
        found["mps"] = "available"
    return found


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return said.stdout.partition("\n")[0].strip() or "unknown"


def main() -> None:
    """Print the facts, one a line."""
    found = facts()
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:{width}}  {value}")


if __name__ == "__main__":
    main()
