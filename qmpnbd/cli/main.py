"""The command ``qmpnbd``.

Only what the chosen command needs is imported: ``qmpnbd --help`` must not wait for numpy, pydantic and asyncio.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from qmpnbd import __version__
from qmpnbd.cli import chain, check, disks, info, output, recover, status, validate
from qmpnbd.cli import map as map_command
from qmpnbd.cli.exit_codes import BROKEN_PIPE, INTERRUPTED, StoppedBySignal, exit_code_help
from qmpnbd.errors import QmpnbdError

_DESCRIPTION = """\
Prove that the allocation depth a running QEMU serves over NBD is what its disk images hold.

  qmpnbd disks --qmp /run/vm.qmp             the guest's disks and their backing chains
  qmpnbd validate --qmp /run/vm.qmp vd0      served against computed, on the running guest
  qmpnbd map nbd+unix:///disk?socket=/run/x  what any NBD server says
  qmpnbd info nbd+unix:///?socket=/run/x     what it can do, and which exports it has
  qmpnbd chain disk.qcow2                    what the image files hold, without QEMU
  qmpnbd check disk.qcow2                    what is wrong inside an image file
  qmpnbd status --qmp /run/vm.qmp            what qmpnbd has in a running QEMU, and whose it is
  qmpnbd recover --qmp /run/vm.qmp           takes down what killed runs left there
"""


def main(arguments: Sequence[str]) -> int:
    """Runs the command line and returns the exit code."""
    parsed = _parser().parse_args(arguments)
    _log_to_stderr()
    try:
        code: int = parsed.run(parsed)
    except QmpnbdError as error:
        output.complain(error)
        if parsed.json:
            _json_error(error)
        return error.exit_code
    except StoppedBySignal as stopped:
        output.complain(stopped)
        return stopped.exit_code
    except BrokenPipeError:
        # Python would complain once more while flushing at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        output.tell("this is a fault of qmpnbd: please report it with the lines above")
        return QmpnbdError.exit_code
    return code


def entry() -> NoReturn:
    """Runs the command line of this process."""
    sys.exit(main(sys.argv[1:]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qmpnbd",
        description=_DESCRIPTION,
        epilog=exit_code_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"qmpnbd {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (disks, validate, map_command, info, chain, check, status, recover):
        command.register(commands)
    return parser


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("qmpnbd: %(message)s"))
    logging.getLogger("qmpnbd").addHandler(handler)
    # Its messages repeat what is raised as an error here, at length.
    logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())
    logging.getLogger("qemu.qmp").propagate = False


def _json_error(error: QmpnbdError) -> None:
    from qmpnbd.report.jsontext import document_json
    from qmpnbd.report.model import ErrorDocument, ErrorEntry

    output.write([document_json(ErrorDocument(error=ErrorEntry.of(error)))])
