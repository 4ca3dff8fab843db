"""What a bug report needs: ``python -m implicit_optim``. No path, no name of a host or of a user."""

from importlib import metadata

import torch
from torch.utils import collect_env

from implicit_optim import __version__


def facts() -> dict[str, str]:
    """Versions and settings of this process, by name."""
    return {
        "implicit_optim": __version__,
        "jaxtyping": metadata.version("jaxtyping"),
        "threads": f"{torch.get_num_threads()} intra-op, {torch.get_num_interop_threads()} inter-op",
        "default dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "float32 matmul": torch.get_float32_matmul_precision(),
        "deterministic": "yes" if torch.are_deterministic_algorithms_enabled() else "no",
    }


def main() -> None:
    """Print them, one a line, and what PyTorch's own report says: versions, system and devices."""
    for name, value in facts().items():
        print(f"{name}: {value}")
    print(collect_env.get_pretty_env_info())


if __name__ == "__main__":
    main()
