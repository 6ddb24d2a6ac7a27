"""Everything that can be agreed with a server before the transmission phase, step by step.

::

    begin()   greeting                              which style of negotiation
              STARTTLS, if TLS is wanted            first of all, so that nothing agreed in clear is left
              EXTENDED_HEADERS, STRUCTURED_REPLY    the best form of replies there is
    then any of list_exports() list_contexts() info() set_contexts()
    and       go()  or  abort()

A refusal leaves the negotiation where it was: the next step may be another export. The steps are programs (see
`qmpnbd.nbd.wire`); `qmpnbd.nbd.handshake` takes them all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Final

from qmpnbd.errors import (
    NbdContextError,
    NbdDisconnectedError,
    NbdProtocolError,
    NbdTlsError,
    NbdUnsupportedError,
    UsageError,
)
from qmpnbd.nbd import constants, wire
from qmpnbd.nbd.constants import Info, Option, OptionReplyType
from qmpnbd.nbd.export import (
    Export,
    ExportInfo,
    InfoCollector,
    Replies,
    judged,
    name_from_wire,
    name_to_wire,
)
from qmpnbd.nbd.greeting import Greeted, greet
from qmpnbd.nbd.limits import DEFAULT_LIMITS, Limits
from qmpnbd.nbd.options import Options, Phase
from qmpnbd.nbd.tls import Tls
from qmpnbd.nbd.wire import Program, Receive, Received, StartTls

_FORMS: Final[dict[Replies, Option | None]] = {
    "extended": Option.EXTENDED_HEADERS,
    "structured": Option.STRUCTURED_REPLY,
    "simple": None,
}
"""Best first, with what is asked for to get it."""

_INFOS: Final = [Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE]


class Haggling:
    """The negotiation with one server; each step is a program.

    Args:
        where: the server, for messages.
        limits: how much the server may answer.

    Attributes:
        style: of the negotiation; known after `begin`.
        tls: whether the connection is encrypted.
        replies: the form of replies agreed on.
        limits: as given.
    """

    def __init__(self, where: str, limits: Limits = DEFAULT_LIMITS) -> None:
        self.where = where
        self.limits = limits
        self.tls = False
        self.replies: Replies = "simple"
        self._greeted: Greeted | None = None
        self._options = Options(where, limits)
        self._selected: tuple[str, dict[str, int]] | None = None

    @property
    def style(self) -> str:
        """Of the negotiation: oldstyle, newstyle or fixed newstyle; empty before the greeting."""
        return "" if self._greeted is None else self._greeted.style

    @property
    def in_step(self) -> bool:
        """Whether the next byte from the server answers a question not yet asked."""
        return self._options.phase is Phase.READY

    def begin(self, tls: Tls | None = None, best: Replies = "extended") -> Program[None]:
        """Reads the greeting, changes to TLS, and agrees on the form of replies.

        Args:
            tls: how to encrypt; None for not at all.
            best: the form of replies not to be exceeded, for trying out the lesser ones.

        Raises:
            NbdConnectError: no greeting came.
            NbdProtocolError: what answers does not speak NBD, or broke the protocol.
            NbdTlsError: TLS is wanted and did not come about.
            NbdRefusedError: the server insists on TLS, or is shutting down.
        """
        self._options.phase = Phase.ASKED  # until the greeting is there
        self._greeted = yield from greet(self.where)
        self._options.phase = Phase.READY
        if tls is not None:
            yield from self._start_tls(tls)
        if self.style == "fixed newstyle":
            forms = list(_FORMS)
            for form in forms[forms.index(best) :]:
                option = _FORMS[form]
                if option is None or (yield from self._options.agreed(option)):
                    self.replies = form
                    return

    def list_exports(self) -> Program[list[tuple[str, str]]]:
        """Returns name and description of every export the server is willing to list ("NBD_OPT_LIST").

        A server may list less than it serves, or refuse to list at all.
        """
        self._require_options("list its exports")
        found: list[tuple[str, str]] = []

        def take(data: Received) -> None:
            entry = wire.ServerEntry.unpack(data)
            if entry is None:
                raise NbdProtocolError(f"an NBD_REP_SERVER of {len(data)} bytes that do not fit", where=self.where)
            name = name_from_wire(entry.name, "the name of an export", self.where)
            found.append((name, wire.printable(entry.description)))

        yield from self._options.ask(Option.LIST)
        last = yield from self._options.replies(Option.LIST, OptionReplyType.SERVER, take, constants.MAX_EXPORTS)
        yield from self._options.concluded(Option.LIST, last)
        return found

    def list_contexts(self, export: str, queries: Sequence[str] = ()) -> Program[list[str]]:
        """Returns the metadata contexts an export offers ("NBD_OPT_LIST_META_CONTEXT").

        Args:
            export: its name.
            queries: which ones: whole names, or namespaces with their colon (``qemu:dirty-bitmap:``); all if empty.

        Raises:
            NbdUnsupportedError: the server has no metadata contexts.
        """
        self._require_options("list metadata contexts")
        _reject_text(queries, self.where)
        found: dict[str, None] = {}

        def take(data: Received) -> None:
            found[self._context(data)[1]] = None  # of its id "clients MUST disregard it"

        yield from self._contexts(Option.LIST_META_CONTEXT, self._query(export, queries), take)
        return list(found)

    def set_contexts(self, export: str, queries: Sequence[str]) -> Program[dict[str, int]]:
        """Selects the metadata contexts for the export that `go` will ask for ("NBD_OPT_SET_META_CONTEXT").

        A server does not say no to a context: it just does not grant it. So what was granted is compared with what was
        wanted, and a context that is missing is an error, never an empty map.

        Args:
            export: its name.
            queries: whole names, or namespaces with their colon. QEMU selects nothing for a namespace.

        Returns:
            The id of each by name, whole names first and in the order given. An earlier selection is gone in any case.

        Raises:
            NbdContextError: one of them is not offered.
            NbdUnsupportedError: the server has no metadata contexts.
        """
        self._require_options("grant metadata contexts")
        _reject_text(queries, self.where)
        if self.replies == "simple":
            raise NbdUnsupportedError("the server has no structured replies, so no metadata contexts", where=self.where)
        self._selected = None
        granted: dict[str, int] = {}

        def take(data: Received) -> None:
            id_, name = self._context(data)
            if not any(_falls_under(name, query) for query in queries):
                raise NbdProtocolError(
                    f"granted the metadata context {name!r}, which nobody asked for", where=self.where
                )
            if name in granted:
                raise NbdProtocolError(f"granted the metadata context {name!r} twice", where=self.where)
            if id_ in granted.values():
                raise NbdProtocolError(f"gave the id {id_} to two metadata contexts", where=self.where)
            granted[name] = id_

        yield from self._contexts(Option.SET_META_CONTEXT, self._query(export, queries), take)
        for query in queries:
            if not any(_falls_under(name, query) for name in granted):
                raise NbdContextError(
                    f"the metadata context {query!r} is not offered", where=self.where, remedy=_how_to_offer(query)
                )
        # In the caller's order, not the server's.
        chosen = {query: granted[query] for query in queries if query in granted} | granted
        self._selected = (export, chosen)
        return chosen

    def info(self, export: str) -> Program[ExportInfo]:
        """Returns what the server tells of an export ("NBD_OPT_INFO").

        Raises:
            NbdRefusedError: there is no such export, or it needs TLS.
            NbdUnsupportedError: the server cannot tell without entering the transmission phase.
        """
        self._require_options("describe an export before it is chosen")
        found = yield from self._describe(Option.INFO, export)
        if found is None:
            raise NbdUnsupportedError("the server does not know NBD_OPT_INFO", where=self.where)
        return found

    def go(self, export: str) -> Program[Export]:
        """Chooses an export; the transmission phase follows ("NBD_OPT_GO").

        Raises:
            NbdRefusedError: there is no such export, or it needs TLS.
            NbdUnsupportedError: an old server has nothing but its only export, or the export cannot be worked with.
            UsageError: metadata contexts were selected for another export.
        """
        if self._selected is not None and self._selected[0] != export:
            # "... and used the same export name for the subsequent NBD_OPT_GO"; a server would silently drop them.
            raise UsageError(
                f"metadata contexts were selected for {self._selected[0]!r}, not for {export!r}", where=self.where
            )
        info: ExportInfo | None = None
        if self.style == "fixed newstyle":
            info = yield from self._describe(Option.GO, export)
        if info is None:
            info = yield from self._go_the_old_way(export)
        self._options.phase = Phase.OVER
        contexts = MappingProxyType({} if self._selected is None else self._selected[1])
        facts = {each.name: getattr(info, each.name) for each in fields(ExportInfo)}
        return Export(**facts, contexts=contexts, replies=self.replies, tls=self.tls)

    def abort(self) -> Program[None]:
        """Takes leave, if that is possible ("NBD_OPT_ABORT"). The answer means nothing, so it is not waited for."""
        if self.style == "fixed newstyle":
            yield from self._options.leave()
        self._options.phase = Phase.OVER

    def _start_tls(self, tls: Tls) -> Program[None]:
        """Changes to TLS, or fails: what is wanted encrypted is never done in clear ("Client-side requirements")."""
        if self.style != "fixed newstyle":
            raise NbdTlsError(f"TLS is wanted, and the server is too old for it ({self.style})", where=self.where)
        yield from self._options.ask(Option.STARTTLS)
        reply = yield from self._options.reply(Option.STARTTLS)
        if reply.refuses:
            self._options.phase = Phase.READY
            raise NbdTlsError(
                f"TLS is wanted, and the server refuses it ({reply})",
                where=self.where,
                remedy="Set the server up for TLS (qemu-nbd --tls-creds, nbd-server-start tls-creds).",
            )
        yield from self._options.concluded(Option.STARTTLS, reply)
        self._options.phase = Phase.ASKED  # until TLS is there
        yield StartTls(tls)
        self._options.phase = Phase.READY
        self._options.untried_tls = self.tls = True

    def _describe(self, option: Option, export: str) -> Program[ExportInfo | None]:
        """Asks INFO or GO; None if the server does not know it."""
        name = name_to_wire("the export name", export, self.where)
        infos = InfoCollector(export, self.where)
        yield from self._options.ask(option, wire.pack_go(name, [*_INFOS]))
        last = yield from self._options.replies(option, OptionReplyType.INFO, infos.take, constants.MAX_OPTION_REPLIES)
        if last.type == OptionReplyType.ERR_UNSUP:
            self._options.phase = Phase.READY
            return None
        yield from self._options.concluded(option, last)
        # After GO the server is in the transmission phase: no option can be sent any more, not even to take leave.
        after = Phase.OVER if option == Option.GO else Phase.READY
        self._options.phase = Phase.ASKED  # to stay so if what it told cannot be true
        try:
            info = infos.judged(f"NBD_OPT_{option.name}")
        except NbdUnsupportedError:
            self._options.phase = after
            raise
        self._options.phase = after
        return info

    def _go_the_old_way(self, export: str) -> Program[ExportInfo]:
        """Enters the transmission phase without GO ("Oldstyle negotiation", "NBD_OPT_EXPORT_NAME")."""
        greeted = self._greeted
        if greeted is None or self._options.phase is not Phase.READY:
            raise UsageError("the negotiation has not begun, or is over", where=self.where)
        if greeted.oldstyle is not None:
            if export:
                # Nothing tells whether its only export is the one that is wanted.
                raise NbdUnsupportedError(
                    f"an oldstyle server has one export and no names, so none that is {export!r}",
                    where=self.where,
                    remedy="Leave the export name empty to get what it serves.",
                )
            return judged(export, greeted.oldstyle.size, greeted.oldstyle.flags, self.where)
        if self.replies == "extended":  # QEMU hangs up; the specification has no such server
            raise NbdUnsupportedError("the server has extended headers, and not NBD_OPT_GO", where=self.where)
        name = name_to_wire("the export name", export, self.where)
        yield from self._options.ask(Option.EXPORT_NAME, name)
        count = wire.ExportNameReply.LAYOUT.size + (constants.ZEROES if greeted.zeroes else 0)
        try:
            reply = wire.ExportNameReply.unpack((yield Receive(count, "the reply to NBD_OPT_EXPORT_NAME")))
        except NbdDisconnectedError as error:
            raise NbdDisconnectedError(
                error.what,
                where=self.where,
                remedy=f"It may have no export {export!r}: an old server tells it in this way.",
            ) from error
        return judged(export, reply.size, reply.flags, self.where)

    def _require_options(self, what: str) -> None:
        """Refuses what only a fixed newstyle server can do."""
        if self._greeted is None:
            raise UsageError("the negotiation has not begun", where=self.where)
        if self.style != "fixed newstyle":
            raise NbdUnsupportedError(
                f"an NBD server as old as this one ({self.style}) cannot {what}", where=self.where
            )

    def _query(self, export: str, queries: Sequence[str]) -> bytes:
        """Returns the data of LIST_ and SET_META_CONTEXT."""
        name = name_to_wire("the export name", export, self.where)
        once = dict.fromkeys(name_to_wire("a context name", query, self.where) for query in queries)
        return wire.pack_meta_context_query(name, list(once))

    def _contexts(self, option: Option, query: bytes, take: Callable[[Received], None]) -> Program[None]:
        """Asks LIST_ or SET_META_CONTEXT and has each context taken."""
        yield from self._options.ask(option, query)
        last = yield from self._options.replies(option, OptionReplyType.META_CONTEXT, take, constants.MAX_CONTEXTS)
        if last.type == OptionReplyType.ERR_UNSUP:
            self._options.phase = Phase.READY
            raise NbdUnsupportedError("the server has no metadata contexts", where=self.where)
        yield from self._options.concluded(option, last)

    def _context(self, data: Received) -> tuple[int, str]:
        """Takes one NBD_REP_META_CONTEXT apart."""
        context = wire.MetaContext.unpack(data)
        if context is None:
            raise NbdProtocolError(f"a metadata context of {len(data)} bytes", where=self.where)
        return context.id, name_from_wire(context.name, "the name of a metadata context", self.where)


def _reject_text(queries: Sequence[str], where: str) -> None:
    if isinstance(queries, str):
        raise UsageError(f"contexts is one text ({queries!r}), not a sequence of names", where=where)


def _falls_under(name: str, query: str) -> bool:
    """Whether a context is what was asked for, or belongs to the namespace that was ("Metadata querying")."""
    return name == query or (query.endswith(":") and name.startswith(query))


def _how_to_offer(query: str) -> str:
    """Returns what makes a QEMU server offer a context."""
    if query == constants.ALLOCATION_DEPTH:
        return "Export the disk with block-export-add allocation-depth: true, or with qemu-nbd -A."
    if query.endswith(":"):
        return "Name a context in full; most servers select nothing for a namespace alone."
    if query.startswith(constants.DIRTY_BITMAP_PREFIX):
        bitmap = query.removeprefix(constants.DIRTY_BITMAP_PREFIX)
        return f"Export the disk with block-export-add bitmaps: [{bitmap!r}], or with qemu-nbd -B {bitmap}."
    return ""
