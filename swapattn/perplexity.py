"""Held-out perplexity over fixed windows of tokens."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from .errors import UsageError
from .scores import Perplexity

if TYPE_CHECKING:
    import torch

WINDOWS = 64  # windows of 512 of the embedded text: 32,704 predicted tokens
_LOGIT_TOKENS = 4096  # tokens whose logits exist at a time: 0.8 GB in fp32 at a vocabulary of 49152


def heldout_perplexity(model: Any, windows: torch.Tensor) -> Perplexity:
    """Perplexity over int64 windows `[N, L]`: every token but the first of each window is predicted from those before.

    At most about 4096 tokens have logits at a time (or one window, if that is longer). Log-softmax in fp32, sum in
    fp64.
    """
    import torch

    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise UsageError(f"windows of shape {tuple(windows.shape)}: expected [N, L] with N >= 1 and L >= 2")
    device = next(model.parameters()).device
    rows = max(1, _LOGIT_TOKENS // windows.shape[1])
    nats = torch.zeros((), dtype=torch.float64)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in tqdm(torch.split(windows, rows), desc="perplexity", unit="batch", file=sys.stderr):
                ids = batch.to(device)
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
                nats += loss.double().sum().cpu()
    finally:
        model.train(was_training)
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    mean = float(nats) / tokens
    return Perplexity(float(torch.tensor(mean, dtype=torch.float64).exp()), tokens, mean)


def embedded_perplexity(model: Any, tokenizer: Any) -> Perplexity:
    """`heldout_perplexity` on 64 windows of 512 tokens of the embedded text, or of all positions that there are."""
    from .data import heldout_windows
    from .positions import positions_of

    return heldout_perplexity(model, heldout_windows(tokenizer, length=min(512, positions_of(model)), count=WINDOWS))
