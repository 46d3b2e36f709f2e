"""What every command shares: `--json`, `-v`, the error boundary, and where results and talk go.

stdout carries the result and nothing else. While a command runs, `sys.stdout` points to stderr, so that a library
that prints cannot spoil a JSON document; `emit` and `result_stream` know the real one.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import logging
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import click

from swapattn.environment import is_first_process
from swapattn.errors import SwapattnError

Callback = Callable[..., None]
Decorator = Callable[[Callback], Callback]

_STDOUT = "swapattn.stdout"  # key in the click context's `meta`: the stream that results go to
_LINE_LIMIT = 600  # characters of a foreign exception's message; some carry whole state dicts
_NOISY_LOGGERS = ("transformers", "datasets", "huggingface_hub", "lm_eval", "lm-eval", "accelerate", "torch", "fsspec")
_QUIET_ENVIRONMENT = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


def command(name: str, *, parent: click.Group | None = None) -> Callable[[Callback], click.Command]:
    """A click command with `--json` (passed on as `as_json`), `-v/--verbose` and the error boundary.

    Args:
        name: the word on the command line.
        parent: the group that it belongs to; None for a command of the main group, which finds it by itself.
    """

    def decorate(callback: Callback) -> click.Command:
        guarded = click.command(name)(_options(_guard(callback)))
        if parent is not None:
            parent.add_command(guarded)
        return guarded

    return decorate


def recipe_option(default: str | None = "short") -> Decorator:
    """`--recipe NAME|FILE` (keyword `recipe`) and `--set KEY=VALUE`, repeatable (keyword `overrides`)."""

    def decorate(callback: Callback) -> Callback:
        callback = click.option(
            "--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override one key of the recipe; repeatable."
        )(callback)
        return click.option(
            "--recipe", metavar="NAME|FILE", default=default, show_default=True, help="A named recipe or a YAML file."
        )(callback)

    return decorate


def output_options(callback: Callback) -> Callback:
    """`-o/--output FOLDER` (keyword `output`, a Path or None) and `--overwrite`."""
    callback = click.option("--overwrite", is_flag=True, help="Replace the output folder if it exists.")(callback)
    return click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        metavar="FOLDER",
        help="Where to write; by default a name derived from the model.",
    )(callback)


def dry_run_option(callback: Callback) -> Callback:
    """`--dry-run` (keyword `dry_run`)."""
    return click.option("--dry-run", is_flag=True, help="Check everything and print the plan; write nothing.")(callback)


def emit(as_json: bool, data: Any, text: str) -> None:
    """Print the result on stdout: `data` as exactly one JSON document, or `text`.

    Non-finite numbers, which JSON lacks, become null; paths and other objects become strings. In a distributed
    run only the first process prints.
    """
    if not is_first_process():
        return
    body = json.dumps(_jsonable(data), indent=2, ensure_ascii=False) if as_json else text
    click.echo(body, file=result_stream())


def result_stream() -> TextIO:
    """The stream that results belong on, also while `sys.stdout` is diverted."""
    context = click.get_current_context(silent=True)
    diverted: TextIO | None = context.meta.get(_STDOUT) if context else None
    return diverted or sys.stdout


def _options(callback: Callback) -> Callback:
    callback = click.option("-v", "--verbose", is_flag=True, help="Show library messages and tracebacks.")(callback)
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")(callback)


def _guard(callback: Callback) -> Callback:
    @functools.wraps(callback)
    def guarded(*args: Any, verbose: bool, **kwargs: Any) -> None:
        if not verbose:
            _quiet_libraries()
        _calm_progress(sys.stderr)
        with _boundary(verbose), _diverted_stdout():
            callback(*args, **kwargs)

    return guarded


@contextlib.contextmanager
def _diverted_stdout() -> Iterator[None]:
    click.get_current_context().meta[_STDOUT] = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def _boundary(verbose: bool) -> Iterator[None]:
    """Turn whatever stops a command into one line on stderr and its exit code."""
    try:
        yield
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except OSError as error:
        if error.errno == errno.EPIPE:  # `swapattn ... | head`: click ends quietly
            raise
        raise _failure(error, verbose) from None
    except (Exception, KeyboardInterrupt) as error:
        raise _failure(error, verbose) from None


def _failure(error: BaseException, verbose: bool) -> click.exceptions.Exit:
    if verbose:
        traceback.print_exception(error, file=sys.stderr)
    click.echo(f"Error: {_one_line(error)}", err=True)
    return click.exceptions.Exit(error.exit_code if isinstance(error, SwapattnError) else 1)


def _one_line(error: BaseException) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, SwapattnError):
        return message
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    full = _disk_full(error)
    if full is not None:
        return full
    if len(message) > _LINE_LIMIT:
        message = message[:_LINE_LIMIT] + " ..."
    return f"{type(error).__name__}: {message} (run with -v for the traceback)"


def _disk_full(error: BaseException) -> str | None:
    """The line for a full disk, looked for along the chain of causes; None when it is something else."""
    link: BaseException | None = error
    while link is not None:
        number = link.errno if isinstance(link, OSError) else None
        # safetensors reports the same through an exception of its own that carries only the text
        if number in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(link):
            # a failed copy names what it read first and what it wrote second
            names = (link.filename2, link.filename) if isinstance(link, OSError) else ()
            context = click.get_current_context(silent=True)
            output = context.params.get("output") if context else None  # a failed write names nothing
            where = next(filter(None, (*names, output)), Path.cwd())
            return f"disk full while writing {where}: free some space, or choose another folder with -o"
        link = link.__cause__ or link.__context__
    return None


def _quiet_libraries() -> None:
    """Keep third-party chatter off the terminal; effective because the libraries are imported after this."""
    for key, value in _QUIET_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    for logger in _NOISY_LOGGERS:
        logging.getLogger(logger).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def _calm_progress(stream: TextIO) -> None:
    """In a log a progress bar is a line that grows with every update: there one in half a minute is enough.

    Effective because tqdm, which also draws the bars of libraries, is imported after this.
    """
    if not stream.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "30")


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
