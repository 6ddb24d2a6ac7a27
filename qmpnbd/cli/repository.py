"""``qmpnbd repository``: where backups are kept."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from qmpnbd.cli import options, output
from qmpnbd.cli.exit_codes import CLEAN, CORRUPT, LEAKS
from qmpnbd.errors import UsageError

if TYPE_CHECKING:
    from qmpnbd.backup.prune import Choice
    from qmpnbd.backup.repository import Repository
    from qmpnbd.deadline import Deadline
    from qmpnbd.report.model import RepositoryDocument

SCHEMA = "qmpnbd.repository/1"

EXAMPLES = (
    ("qmpnbd repository create /backups/vm", "make one"),
    ("qmpnbd repository list /backups/vm", "what is in it"),
    ("qmpnbd repository check /backups/vm --content", "is every byte of it what it was?"),
    ("qmpnbd repository prune /backups/vm --keep-daily 7 --keep-monthly 12 --dry-run", "what would be removed"),
)
"""Command lines, and what they are for."""

_VERBS = {
    "create": "make a repository of a folder that is empty or not there",
    "list": "show the chains and their backups",
    "show": "show one backup",
    "check": "find what is missing, foreign, reordered, cut or rotten",
    "prune": "remove backups; those that stay read the same as before",
    "recover": "remove what killed runs left, and end what they had decided on",
}

_RULES = {
    "last": "the newest N backups",
    "hourly": "the newest backup of each of the last N hours that have one",
    "daily": "likewise of days, which begin at midnight UTC",
    "weekly": "likewise of weeks",
    "monthly": "likewise of months",
    "yearly": "likewise of years",
}


def register(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "repository",
        description="A repository is a folder of backups that stock tools can read: a qcow2 image for each disk and "
        "backup, chained by relative backing names, with a manifest and hashes. Only one run at a time changes it.",
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(title="subcommands", required=True, metavar="SUBCOMMAND")
    for verb, meaning in _VERBS.items():
        each = verbs.add_parser(verb, help=meaning, description=f"{meaning.capitalize()}.", allow_abbrev=False)
        each.add_argument("repository", metavar="REPOSITORY", help="its folder")
        _ADD.get(verb, _add_nothing)(each)
        options.add_json(each, SCHEMA)
        each.add_argument(
            "--timeout", type=options.seconds, metavar="SECONDS", help="time for everything (default: no bound)"
        )
        each.set_defaults(run=run, operation=verb)


def _add_nothing(_: argparse.ArgumentParser) -> None:
    """Adds no option."""


def _add_chain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chain", metavar="ID", help="the chain of backups (default: all chains)")


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "backup", metavar="BACKUP", help="an id, a number, 'latest', or a time: the newest one that is not after it"
    )
    parser.add_argument("--chain", metavar="ID", help="the chain of backups (default: the only one)")


def _add_check(parser: argparse.ArgumentParser) -> None:
    _add_chain(parser)
    parser.add_argument("--content", action="store_true", help="also read all data, and hold it against its hashes")


def _add_prune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chain", metavar="ID", help="the chain of backups (default: the only one)")
    for rule, meaning in _RULES.items():
        parser.add_argument(
            f"--keep-{rule}", dest=rule, type=options.whole, default=0, metavar="N", help=f"keep {meaning}"
        )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--remove",
        type=_backup_id,
        action="append",
        default=[],
        metavar="ID",
        help="instead: remove this backup; may be given several times",
    )
    which.add_argument(
        "--damaged",
        action="store_true",
        help="instead: read everything, and remove the backups of which a disk cannot be restored and proved",
    )
    parser.add_argument("--rate", type=options.positive, metavar="BYTES", help="copy at most so many bytes a second")
    parser.add_argument("--dry-run", action="store_true", help="tell what would be removed, and remove nothing")


_ADD: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "list": _add_chain,
    "show": _add_show,
    "check": _add_check,
    "prune": _add_prune,
}


def _backup_id(text: str) -> str:
    from qmpnbd.backup.layout import is_backup_id

    if not is_backup_id(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a backup id: eight hexadecimal digits")
    return text


def run(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    from qmpnbd.cli import signals
    from qmpnbd.deadline import Deadline
    from qmpnbd.report.jsontext import document_json
    from qmpnbd.report.repository import repository_text
    from qmpnbd.validate.live import in_thread

    deadline = Deadline(arguments.timeout)
    work = partial(_WORK[arguments.operation], arguments, deadline)
    document = signals.run(in_thread(work, deadline))
    output.write([document_json(document) if arguments.json else repository_text(document)])
    return {"clean": CLEAN, "leftovers": LEAKS, "damaged": CORRUPT}[document.verdict or "clean"]


def _opened(arguments: argparse.Namespace) -> Repository:
    from pathlib import Path

    from qmpnbd.backup.repository import Repository

    return Repository.open(Path(arguments.repository))


def _create(arguments: argparse.Namespace, _: Deadline) -> RepositoryDocument:
    from pathlib import Path

    from qmpnbd.backup.repository import Repository
    from qmpnbd.report.repository import listed_document

    return listed_document(Repository.create(Path(arguments.repository)), {}, "create")


def _list(arguments: argparse.Namespace, _: Deadline) -> RepositoryDocument:
    from qmpnbd.report.repository import listed_document

    repository = _opened(arguments)
    chains = [_chain(repository, arguments.chain)] if arguments.chain is not None else repository.chains()
    return listed_document(repository, {chain: repository.inspect(chain) for chain in chains}, "list")


def _show(arguments: argparse.Namespace, _: Deadline) -> RepositoryDocument:
    from qmpnbd.report.repository import listed_document

    repository = _opened(arguments)
    chain = _chain(repository, arguments.chain)
    wanted = repository.find(chain, arguments.backup)
    found = [each for each in repository.inspect(chain) if each.path == wanted.path]
    return listed_document(repository, {chain: found}, "show")


def _check(arguments: argparse.Namespace, deadline: Deadline) -> RepositoryDocument:
    from qmpnbd.backup.check import check
    from qmpnbd.report.repository import checked_document

    repository = _opened(arguments)
    checked = check(repository, arguments.chain, content=arguments.content, deadline=deadline)
    return checked_document(repository, checked, content=arguments.content)


def _prune(arguments: argparse.Namespace, deadline: Deadline) -> RepositoryDocument:
    from qmpnbd.backup.copy import CopyOptions
    from qmpnbd.backup.pace import paced
    from qmpnbd.backup.prune import carry_out
    from qmpnbd.report.repository import pruned_document

    repository = _opened(arguments)
    chain = _chain(repository, arguments.chain)
    if arguments.dry_run:
        return pruned_document(repository, chain, _choice(arguments, repository, chain, deadline), dry_run=True)
    with repository.lock(f"pruning chain {chain}"):
        for line in repository.recover():
            output.tell(line)
        choice = _choice(arguments, repository, chain, deadline)
        carry_out(repository, choice, CopyOptions(pace=paced(arguments.rate)), deadline)
    return pruned_document(repository, chain, choice, dry_run=False)


def _choice(arguments: argparse.Namespace, repository: Repository, chain: str, deadline: Deadline) -> Choice:
    from qmpnbd.backup.check import check
    from qmpnbd.backup.prune import choose, choose_restorable, choose_without
    from qmpnbd.backup.retention import Policy

    policy, where = Policy(**{rule: getattr(arguments, rule) for rule in _RULES}), str(repository.path / chain)
    if (arguments.remove or arguments.damaged) and not policy.keeps_nothing:
        raise UsageError("--remove and --damaged go with no --keep-... option", where=where)
    if arguments.damaged:
        return choose_restorable(check(repository, chain, content=True, deadline=deadline), chain, where=where)
    if not arguments.remove:
        return choose(repository.backups(chain), policy, where=where)
    for each in arguments.remove:
        repository.find(chain, each)
    return choose_without(repository.backups(chain), arguments.remove, where=where)


def _recover(arguments: argparse.Namespace, _: Deadline) -> RepositoryDocument:
    from qmpnbd.report.repository import recovered_document

    repository = _opened(arguments)
    with repository.lock("recovering") as killed:
        if killed is not None:
            output.tell(f"{killed} was killed")
        return recovered_document(repository, repository.recover())


def _chain(repository: Repository, chain: str | None) -> str:
    """Returns the chain that was asked for, or the only one there is."""
    from qmpnbd.errors import NoSuchBackupError

    chains = repository.chains()
    if chain is None and len(chains) == 1:
        return chains[0]
    if chain is None and chains:
        raise UsageError("which chain?", where=str(repository.path), remedy=f"Give one of {', '.join(chains)}.")
    if chain not in chains:
        what = "there is no chain" if chain is None else f"there is no chain {chain!r}"
        raise NoSuchBackupError(what, where=str(repository.path), remedy=f"There are: {', '.join(chains) or 'none'}.")
    return chain


_WORK: dict[str, Callable[[argparse.Namespace, Deadline], RepositoryDocument]] = {
    "create": _create,
    "list": _list,
    "show": _show,
    "check": _check,
    "prune": _prune,
    "recover": _recover,
}
