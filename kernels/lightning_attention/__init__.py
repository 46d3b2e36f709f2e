"""Causal linear attention with one exponential decay per head, and the softmax window that may stand beside it.

The package needs torch only and knows nothing of the models that call it.
"""

from .features import hedgehog_features
from .local import local_attention, local_attention_cached, merged_local_attention
from .op import lightning_attention, lightning_attention_step

__all__ = [
    "hedgehog_features",
    "lightning_attention",
    "lightning_attention_step",
    "local_attention",
    "local_attention_cached",
    "merged_local_attention",
]
