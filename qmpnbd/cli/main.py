"""The command ``qmpnbd``.

Only what the chosen command needs is imported: ``qmpnbd --help`` must not wait for numpy, pydantic and asyncio, and
takes no more than 2.5 times as long as a Python that does nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from qmpnbd.cli import output
from qmpnbd.cli.exit_codes import BROKEN_PIPE, INTERRUPTED, StoppedBySignal
from qmpnbd.errors import QmpnbdError, ReportFileError

# Without the module typing, which would be a tenth of the start.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def main(arguments: Sequence[str]) -> int:
    """Runs the command line and returns the exit code."""
    as_json = "--json" in arguments
    try:
        code = 0
        if arguments and arguments[0] in ("-h", "--help"):
            from qmpnbd.cli.help import help_text

            output.write([help_text()])
        else:
            # Not sooner: help needs none of it.
            from qmpnbd.cli.parser import command_line
            from qmpnbd.cli.settings import parse

            root, command = command_line(arguments)
            parsed = parse(root, command, arguments, os.environ)
            as_json = getattr(parsed, "json", False)
            _log_to_stderr(parsed.verbose, quiet=parsed.quiet)
            if hasattr(parsed, "monitor_parser"):
                from qmpnbd.cli.options import monitor, monitors

                parsed.qmp = monitors(parsed) if parsed.monitor_many else monitor(parsed)
            code = parsed.run(parsed)
    except QmpnbdError as error:
        output.complain(error)
        if as_json:
            _json_error(error)
        return error.exit_code
    except StoppedBySignal as stopped:
        output.complain(stopped)
        return stopped.exit_code
    except BrokenPipeError:
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception:
        import traceback

        output.show(traceback.format_exc())
        output.tell("this is a fault of qmpnbd: please report it with the lines above")
        return QmpnbdError.exit_code
    return code


def entry() -> NoReturn:
    """Runs the command line of this process."""
    output.take_standard_streams()
    try:
        code = main(sys.argv[1:])
    except SystemExit as ended:  # of argparse: after help, or a mistake
        code = ended.code if isinstance(ended.code, int) else 0
    lost = output.settle()
    sys.exit(code or lost)


def _log_to_stderr(verbose: int, *, quiet: bool) -> None:
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("qmpnbd: %(message)s"))
    ours = logging.getLogger("qmpnbd")
    ours.addHandler(handler)
    told = [logging.WARNING, logging.INFO, logging.DEBUG]
    ours.setLevel(logging.ERROR if quiet else told[min(verbose, 2)])
    # Its messages repeat what is raised as an error here, at length.
    logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
    logging.getLogger("qemu.qmp").propagate = False


def _json_error(error: QmpnbdError) -> None:
    import contextlib

    from qmpnbd.report.jsontext import document_json
    from qmpnbd.report.model import ErrorDocument, ErrorEntry

    with contextlib.suppress(ReportFileError, BrokenPipeError):  # it was told on stderr, and has the exit code
        output.write([document_json(ErrorDocument(error=ErrorEntry.of(error)))])
