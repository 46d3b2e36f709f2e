"""The loss curves of a distillation as one picture, drawn from its log when it ends."""

from __future__ import annotations

import json
from pathlib import Path

CURVES = "train.png"  # beside the log in a checkpoint


def draw_curves(log: Path, target: Path, title: str) -> None:
    """Write a PNG with one panel for each trained stage: the loss of every step, and its running mean.

    Args:
        log: JSONL of the stages, in their order.
        target: the picture.
        title: above it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from .report.plots import smoothed

    panels: dict[str, list[dict[str, float]]] = {}
    for record in map(json.loads, log.read_text(encoding="utf-8").splitlines()):
        panels.setdefault(f"{record['run']}|{record['stage']}", []).append(record)
    width, height = 4.5 * len(panels), 3.2
    figure = Figure(figsize=(width, height))
    margins = {"left": 0.75 / width, "right": 1 - 0.15 / width, "bottom": 0.5 / height, "top": 1 - 0.65 / height}
    figure.subplots_adjust(**margins, wspace=0.28)  # a layout that fits itself draws everything three times
    FigureCanvasAgg(figure)
    for axes, (name, records) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        steps, losses = [record["step"] for record in records], [record["loss"] for record in records]
        axes.plot(steps, losses, color="tab:blue", alpha=0.35, linewidth=0.9)
        axes.plot(steps, smoothed(losses), color="tab:blue", linewidth=1.8)
        if min(losses) > 0 and max(losses) > 10 * min(losses):
            axes.set_yscale("log")
        axes.set(title=f"{name.partition('|')[2]}: {losses[0]:.4g} to {losses[-1]:.4g}", xlabel="step", ylabel="loss")
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10, parse_math=False)  # a folder's name, which may have dollars
    figure.savefig(target, dpi=120)
