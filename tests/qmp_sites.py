"""Where the package talks QMP, read from its source: commands with their arguments, replies with their models, events.

What is no literal is followed to the literal that the same function assigned; what cannot be followed is told, so that
nothing is passed over in silence.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "qmpnbd"

THE_WAY = {"qmp/monitor.py", "qmp/transport.py", "qmp/direct.py", "qmp/libvirt.py", "qmp/rehearsal.py"}
"""They carry any command."""

THE_GUEST = {"qmp/agent.py"}
"""It talks to the guest agent, whose commands no QEMU describes."""


@dataclass(frozen=True)
class Site:
    """A place that sends a command, reads a reply or waits for an event.

    Attributes:
        where: file and line.
        name: the command or event; empty if it cannot be followed.
        value: the arguments, or the model.
        added: names of arguments that are added afterwards.
    """

    where: str
    name: str
    value: ast.expr | None
    added: frozenset[str] = frozenset()


def sites(method: str, name: str, value: str) -> Iterator[Site]:
    """Yields the calls of a function or method.

    Args:
        method: its name.
        name: the keyword of the argument that names the command or event; also found in first place.
        value: the keyword of the argument that is the value; also found in the first other place.
    """
    for path in sorted(PACKAGE.rglob("*.py")):
        short = path.relative_to(PACKAGE).as_posix()
        if short in THE_WAY | THE_GUEST:
            continue
        module = ast.parse(path.read_text())
        constants = _assigned(module.body)
        for function in ast.walk(module):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                known = constants | _assigned(ast.walk(function))
                for call in _calls(function, method):
                    yield from _sites(call, name, value, function, known, module, short)


def _sites(
    call: ast.Call,
    name: str,
    value: str,
    function: ast.FunctionDef | ast.AsyncFunctionDef,
    known: dict[str, ast.expr],
    module: ast.Module,
    short: str,
) -> Iterator[Site]:
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    places = list(call.args)
    named = keywords.get(name) or places.pop(0)
    given = keywords.get(value) or (places[0] if places else None)
    added = frozenset(_added(function, given.id)) if isinstance(given, ast.Name) else frozenset[str]()
    arguments = _followed(given, known)
    if "['execute']" in ast.unparse(named):
        return  # carries a command that was built, and found, elsewhere
    parameters = [each.arg for each in function.args.args]
    if isinstance(named, ast.Name) and named.id in parameters:
        # Whoever calls this function names the command.
        for outer in _calls(module, function.name):
            yield Site(f"{short}:{outer.lineno}", _text(outer.args[parameters.index(named.id)]), arguments, added)
    elif several := _one_after_the_other(named, function, known):
        yield from (Site(f"{short}:{call.lineno}", _text(each), arguments, added) for each in several)
    else:
        yield Site(f"{short}:{call.lineno}", _text(_followed(named, known)), arguments, added)


def _one_after_the_other(named: ast.expr, function: ast.AST, known: dict[str, ast.expr]) -> list[ast.expr]:
    """Returns what a name stands for in turn, where a loop goes through a tuple."""
    for node in ast.walk(function):
        if isinstance(node, ast.For) and ast.unparse(node.target) == ast.unparse(named):
            through = _followed(node.iter, known)
            return through.elts if isinstance(through, ast.Tuple) else []
    return []


def _calls(where: ast.AST, method: str) -> Iterator[ast.Call]:
    for node in ast.walk(where):
        if isinstance(node, ast.Call) and method in (getattr(node.func, "attr", None), getattr(node.func, "id", None)):
            yield node


def _assigned(nodes: Iterable[ast.AST]) -> dict[str, ast.expr]:
    """Returns what names are assigned."""
    found: dict[str, ast.expr] = {}
    for node in nodes:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        value = getattr(node, "value", None)
        if isinstance(node, ast.Assign | ast.AnnAssign) and value is not None:
            found |= {target.id: value for target in targets if isinstance(target, ast.Name)}
    return found


def _added(function: ast.AST, name: str) -> Iterator[str]:
    """Yields the keys that are set in a dictionary of that name."""
    for node in ast.walk(function):
        if not isinstance(node, ast.Subscript) or not isinstance(node.ctx, ast.Store):
            continue
        if isinstance(node.value, ast.Name) and node.value.id == name:
            yield _text(node.slice)


def _text(node: ast.expr | None) -> str:
    return str(node.value) if isinstance(node, ast.Constant) else ""


def built() -> Iterator[Site]:
    """Yields the commands that are built as values, by a function ``command(name, argument=...)``."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for call in _calls(ast.parse(path.read_text()), "command"):
            keys: list[ast.expr | None] = [
                ast.Constant(each.arg.replace("_", "-")) if each.arg else None for each in call.keywords
            ]
            arguments = ast.Dict(keys, [each.value for each in call.keywords])
            yield Site(f"{path.relative_to(PACKAGE).as_posix()}:{call.lineno}", _text(call.args[0]), arguments)


def _followed(node: ast.expr | None, assigned: dict[str, ast.expr]) -> ast.expr | None:
    """Returns what a name stands for, anything else as it is."""
    return assigned.get(node.id, node) if isinstance(node, ast.Name) else node
