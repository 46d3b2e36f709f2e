"""`swapattn bench train` and `swapattn bench kernel`."""

from __future__ import annotations

import click

from .common import command, emit, recipe_option


@click.group("bench")
def bench_command() -> None:
    """Measure speed on the present hardware.

    \b
    Example:
      swapattn bench train --recipe short --set distill.stages.distill.micro_batch=16
      swapattn bench kernel
    """


@command("train", parent=bench_command)
@click.argument("model", default="smollm2-135m")
@recipe_option()
@click.option("--length", "lengths", type=click.IntRange(min=2), multiple=True, default=(512, 2048), show_default=True)
@click.option(
    "--step",
    "kinds",
    type=click.Choice(("align", "distill", "finetune")),
    multiple=True,
    default=("align", "distill", "finetune"),
    help="Which steps; repeatable, by default all three.",
)
@click.option("--steps", type=click.IntRange(min=1), default=20, show_default=True, help="Timed optimiser steps.")
@click.option("--warmup", type=click.IntRange(min=1), default=5, show_default=True, help="Steps before them.")
@click.option("--profile", is_flag=True, help="Also list the CUDA kernels that take the most time.")
@click.option("--device", metavar="DEVICE", help="cpu or cuda; by default the GPU if there is one.")
def train_command(
    model: str,
    recipe: str,
    overrides: tuple[str, ...],
    lengths: tuple[int, ...],
    kinds: tuple[str, ...],
    steps: int,
    warmup: int,
    profile: bool,
    device: str | None,
    as_json: bool,
) -> None:
    """Tokens/s and share of peak of a recipe's align and distill steps, beside fine-tuning the teacher.

    MODEL is an alias, hub id or folder; of a folder only config.json is read, the weights are random.

    \b
    Examples:
      swapattn bench train --recipe short
      swapattn bench train ./my-model --length 512 --step distill --profile --json
    """
    from swapattn.recipe import load_recipe
    from swapattn.throughput import measure

    result = measure(
        model,
        load_recipe(recipe, overrides),
        lengths=lengths,
        kinds=kinds,
        steps=steps,
        warmup=warmup,
        profile=profile,
        device=device,
    )
    emit(as_json, result.to_dict(), result.to_table())


@command("kernel", parent=bench_command)
@click.option(
    "--rows",
    metavar="GROUP,...",
    help="Of forward, backward, few, decay, both, gqa, dims, varlen, decode, memory; by default all.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=120,
    show_default=True,
    help="Begin no row after that; the check before them is not counted.",
)
@click.option("--peers/--no-peers", default=True, help="Whether others are timed, too, which takes most of the time.")
@click.option("--device", metavar="DEVICE", help="cpu or cuda; by default the GPU if there is one. cpu: tiny shapes.")
def kernel_command(rows: str | None, seconds: float, peers: bool, device: str | None, as_json: bool) -> None:
    """The attention kernels beside the speed of the memory and of the peers that are installed.

    Each row has the time, the share of the copy floor (or a ratio), the target and fla's time. Softmax of PyTorch is
    timed up to 8K tokens, as are the kernels of Lightning Attention-2's authors (pip install lightning-attn einops);
    for flash-linear-attention: pip install fla-core. Ctrl-C prints what has been measured.

    \b
    Examples:
      swapattn bench kernel
      swapattn bench kernel --rows forward,decode --json
    """
    from swapattn.kernel_bench import GROUPS, measure_kernels

    groups = tuple(rows.replace(" ", "").split(",")) if rows else GROUPS
    result = measure_kernels(groups, seconds=seconds, device=device, peers=peers)
    emit(as_json, result.to_dict(), result.to_table())
