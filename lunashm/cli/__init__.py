"""The ``lunashm`` command: what it can do, and how every failure becomes a message and an exit code.

One noun a file: ``serve``; ``models`` (ps, show, unload); ``load``; ``files`` (ls); ``control`` (status, clients,
stop); ``top`` with ``top_hosts``, ``top_table``, ``top_screen`` and ``top_log``; ``doctor`` with ``checks``; ``comfy``
with ``checkout``. ``exits`` has the exit codes, ``output`` the printing, ``hosts`` which host is meant.

Commands raise; only :func:`run` turns errors into output. No command imports torch: ``doctor`` has another
process do that.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated

import typer

from lunashm import __version__
from lunashm.cli import comfy, control, doctor, exits, files, load, models, output, serve, top
from lunashm.errors import LunashmError

app = typer.Typer(
    help="lunashm: many ComfyUI processes, one copy of the model's weights.",
    epilog=exits.table(),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve.serve)
app.command()(models.ps)
app.command()(files.ls)
app.command()(models.show)
app.command()(load.load)
app.command()(models.unload)
app.command()(control.clients)
app.command()(control.status)
app.command()(top.top)
app.command()(doctor.doctor)
app.command()(control.stop)
app.add_typer(comfy.app, name="comfy")

_ClickError: type[Exception] = typer.BadParameter.__mro__[2]
"""ClickException. Where it lives depends on typer's version: newer ones carry their own click."""


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"lunashm {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of lunashm itself."""


def run(arguments: Sequence[str]) -> int:
    """One command line, to its exit code. Prints the result or the error; raises nothing."""
    as_json = "--json" in arguments
    try:
        code = int(app(list(arguments), prog_name="lunashm", standalone_mode=False) or exits.OK)
        return _interrupted(as_json) if code == exits.INTERRUPTED else code
    except LunashmError as exc:
        output.failure(exc.code, exc.message, as_json)
        return exits.code_of(exc)
    except _ClickError as exc:
        return _usage(exc, as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        return exits.ERROR
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted(as_json)
    except OSError as exc:
        output.failure("os", str(exc), as_json)
        return exits.ERROR
    except Exception as exc:  # noqa: BLE001 - a defect: shown whole, and still a JSON value for programs
        traceback.print_exc()
        output.failure(LunashmError.code, f"{type(exc).__name__}: {exc}", as_json)
        return exits.ERROR


def _usage(error: BaseException, as_json: bool) -> int:
    message = getattr(error, "format_message", lambda: str(error))()
    if as_json:
        output.failure("usage", message, as_json)
    else:
        getattr(error, "show", lambda: print(message, file=sys.stderr))()
    return exits.USAGE


def _interrupted(as_json: bool) -> int:
    """Ctrl-C: people know what they did; programs still get their one value."""
    if as_json:
        output.failure("interrupted", "interrupted", as_json)
    return exits.INTERRUPTED


def main() -> None:
    """The console script."""
    warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR")  # doctor says it, with what to do
    sys.exit(run(sys.argv[1:]))
