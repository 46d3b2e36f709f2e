"""Taking back the last tokens of a recurrent state: what assisted decoding and prompt lookup do with rejected drafts.

A file of the checkpoint runtime: it imports torch only.

A state cannot forget its last tokens, so while a generate mode asks for it (`Cache.activate_past_recording`) a layer
keeps the state before its last tokens, and what these tokens brought. Taking some back restores that state and
runs the layer over the others again, by the same code that a fresh run takes. Speculative decoding: arXiv 2211.17192.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch

# Tokens that can surely be taken back; twice as many are held at most. transformers drafts 20 at a time by default,
# and two more each time that all were right.
MOST_TOKENS = 256

Tensors = dict[str, torch.Tensor | None]


class Tokens(Protocol):
    """New tokens of one layer: a `call.AttentionCall`."""

    @property
    def length(self) -> int:
        """Number of tokens T of each row."""

    def narrow(self, start: int, stop: int) -> Any:
        """The tokens from `start` to `stop`, copied."""

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        """The same with `function` applied to every tensor; the batch is the first dimension."""


def _copied(cache: Any) -> Tensors:
    return {name: tensor.clone() if tensor is not None else None for name, tensor in cache.tensors()}


class Rollback:
    """What one cache layer keeps to take tokens back; empty unless it records.

    Attributes:
        base: the layer's tensors before the first of the recorded tokens, None when there are none.
        log: the recorded tokens, call by call.
    """

    def __init__(self) -> None:
        self.base: Tensors | None = None
        self.log: list[Any] = []
        self._layer: weakref.ref[Any] | None = None  # weak: a copy of the cache must not copy the model

    @property
    def length(self) -> int:
        """Recorded tokens of each row."""
        return sum(call.length for call in self.log)

    def forget(self) -> None:
        """Commit to all tokens seen."""
        self.base, self.log, self._layer = None, [], None  # a reference cannot be pickled with the cache

    def append(self, call: Tokens, layer: Any, cache: Any) -> None:
        """Record tokens that `layer` is about to put into the state of `cache`; at most `MOST_TOKENS`."""
        self._layer = weakref.ref(layer)
        if self.length + call.length > 2 * MOST_TOKENS:
            self._fold(call.length, cache)
        if self.base is None:
            self.base = _copied(cache)
        self.log.append(call.map(torch.Tensor.detach))

    def take_back(self, count: int, cache: Any) -> None:
        """Bring `cache` to where it was `count` tokens ago, and commit to that.

        Raises:
            RuntimeError: fewer tokens have been recorded.
        """
        if count > self.length:
            raise RuntimeError(
                f"a lightning attention state can be rolled back by {self.length} tokens here, not by {count}: call "
                f"`activate_past_recording()` on the cache behind its first forward pass, and crop before more than "
                f"{MOST_TOKENS} new tokens"
            )
        log, kept = self.log, self.length - count
        if count:
            assert self.base is not None
            cache.restore(self.base)
            for call in log:
                if kept > 0:
                    self._replay(call if call.length <= kept else call.narrow(0, kept), cache)
                kept -= call.length
        self.forget()

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply what is done to the rows of the layer's tensors to what is recorded of them."""
        if self.base is not None:
            self.base = {name: function(x) if x is not None else None for name, x in self.base.items()}
            self.log = [call.map(function) for call in self.log]

    def _fold(self, new: int, cache: Any) -> None:
        """Commit to the oldest tokens: a mode that drafts without ever cropping must not fill the memory."""
        now = _copied(cache)  # a static cache takes tensors over in place
        assert self.base is not None
        cache.restore(self.base)
        while self.log and self.length + new > MOST_TOKENS:
            self._replay(self.log.pop(0), cache)
        self.base = _copied(cache) if self.log else None
        cache.restore(now)

    @torch.no_grad()
    def _replay(self, call: Any, cache: Any) -> None:
        layer = self._layer() if self._layer is not None else None
        if layer is None:
            raise RuntimeError("a lightning attention state cannot be rolled back: its model is gone")
        layer(call, cache, record=False)  # called as a module: hooks may have to fetch its parameters
