"""`swapattn verify`."""

from __future__ import annotations

import click

from .common import command, emit


@command("verify")
@click.argument("checkpoint", required=False)
@click.option("--teacher", metavar="MODEL", help="The original: alias, hub id, folder or GGUF. [default: as recorded]")
@click.option("--trust-remote-code", is_flag=True, help="Run code of the checkpoint that differs from this swapattn's.")
@click.option("--no-reload", is_flag=True, help="Leave out loading it in two fresh processes.")
def verify_command(
    checkpoint: str | None, teacher: str | None, trust_remote_code: bool, no_reload: bool, as_json: bool
) -> None:
    """Prove that CHECKPOINT (by default the newest one here) is what it says; exit code 3 if anything fails.

    Files whole; the teacher's tensors bit-equal but for the trained ones; nothing quadratic outside kept layers;
    decays as recorded; cached = uncached; padded = alone; query heads on the right KV heads; the same logits in a
    fresh process with and without swapattn.

    \b
    Examples:
      swapattn verify
      swapattn verify smollm2-135m-swapattn-short --teacher smollm2-135m --json
    """
    from swapattn.errors import ThresholdError
    from swapattn.verification import verify

    found = verify(checkpoint, teacher=teacher, trust_remote_code=trust_remote_code, reload=not no_reload)
    emit(as_json, found.to_dict(), found.to_table())
    if not found.passed:
        raise ThresholdError(f"{found.path} fails: {', '.join(found.failed)}")
