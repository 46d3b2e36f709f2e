"""swapattn: swap softmax attention for Lightning Attention-2, distill, evaluate.

The public Python API is the five functions below. They are imported on first use, so that
`import swapattn` and `swapattn --help` do not pay for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "convert", "distill", "evaluate", "load", "sample"]

if TYPE_CHECKING:
    from .conversion import convert
    from .distillation import distill
    from .evaluation import evaluate
    from .loading import load
    from .sampling import sample

# No module carries the name of a function here: importing it would put the module in the function's place.
_HOMES = {
    "convert": "conversion",
    "distill": "distillation",
    "evaluate": "evaluation",
    "load": "loading",
    "sample": "sampling",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'swapattn' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
