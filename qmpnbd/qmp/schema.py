"""What a QEMU says of its own commands: the reply of ``query-qmp-schema``, and looking things up in it; pure.

Types have numbers instead of names there, and everything hangs together by them::

    command --arg-type--> object: members, and variants chosen by a tag (``driver: qcow2``)
       `-----ret-type---> array --element-type--> object ...
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qmpnbd.qmp.models import SchemaInfo, SchemaMember


class Schema:
    """The commands and types of one QEMU."""

    def __init__(self, entries: Iterable[SchemaInfo]) -> None:
        self._entries = {entry.name: entry for entry in entries}

    def has(self, command: str) -> bool:
        """Returns whether there is a command or an event of that name."""
        entry = self._entries.get(command)
        return entry is not None and entry.meta_type in ("command", "event")

    def has_argument(self, command: str, *path: str) -> bool:
        """Returns whether a command takes an argument, or one inside another; in any variant."""
        return bool(self._reach(command, path))

    def has_value(self, command: str, argument: str, value: str) -> bool:
        """Returns whether an argument that is an enumeration knows a value."""
        return any(value in self._entries[name].values for name in self._reach(command, (argument,)))

    def members(self, type_name: str) -> Iterator[SchemaMember]:
        """Yields the members of an object, those of all variants included; an array's are those of its elements."""
        seen: set[str] = set()
        waiting = [type_name]
        while waiting:
            name = waiting.pop()
            entry = self._entries.get(name)
            if entry is None or name in seen:
                continue
            seen.add(name)
            if entry.meta_type == "alternate":
                waiting += [member.type for member in entry.members]
            else:
                yield from entry.members
            waiting += [variant.type for variant in entry.variants]
            if entry.element_type is not None:
                waiting.append(entry.element_type)

    def own_members(self, type_name: str) -> dict[str, SchemaMember]:
        """Returns the members that every variant of an object has; of an array's elements for an array."""
        entry = self._entries[type_name]
        if entry.element_type is not None:
            return self.own_members(entry.element_type)
        return {member.name: member for member in entry.members if member.name is not None}

    def arguments_of(self, name: str) -> str:
        """Returns the type of a command's arguments, or of an event's data; empty if it has none."""
        return self._entries[name].arg_type or ""

    def reply_of(self, command: str) -> str:
        """Returns the type of a command's reply; empty if it has none."""
        return self._entries[command].ret_type or ""

    def meta_type(self, type_name: str) -> str:
        """Returns what sort of type it is: ``object``, ``array``, ``enum``, ``builtin`` or ``alternate``."""
        return self._entries[type_name].meta_type

    def _reach(self, command: str, path: tuple[str, ...]) -> set[str]:
        """Returns the types that the last step of a path of arguments can have; empty if there is no such path."""
        if not self.has(command):
            return set()
        types = {self.arguments_of(command)}
        for step in path:
            types = {member.type for name in types for member in self.members(name) if member.name == step}
        return types & self._entries.keys()
