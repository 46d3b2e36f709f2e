"""Classes that are made by `type()`, in the place of a definition: no module has them by name, as pickle needs.

A file of the checkpoint runtime: it imports its neighbours only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .attention import register


class Made:
    """What such classes share; each comes before the class that it is made from."""

    made_by: tuple[Callable[[Any], type], Any]

    def __reduce_ex__(self, _: Any) -> Any:
        """As any object is pickled and copied, but its class as the function that made it and the argument."""
        found: Any = super().__reduce_ex__(2)
        return _blank, self.made_by, *found[2:]


def _blank(make: Callable[[Any], Any], argument: Any) -> Any:
    """An object of the class before it has its state, in a process that may never have made a swapped model."""
    register()
    kind = make(argument)
    return kind.__new__(kind)
