"""From a negotiation with a server to the document of ``qmpnbd info``."""

from __future__ import annotations

from dataclasses import replace

from qmpnbd.deadline import Deadline
from qmpnbd.errors import NbdUnsupportedError
from qmpnbd.nbd.constants import TransmissionFlag as Flag
from qmpnbd.nbd.export import ExportInfo
from qmpnbd.nbd.stepwise import Negotiation
from qmpnbd.report.model import ExportEntry, InfoDocument

_PROTOCOLS = {"fixed newstyle": "newstyle-fixed", "newstyle": "newstyle", "oldstyle": "oldstyle"}


def info_document(
    negotiation: Negotiation, *, all_exports: bool, deadline: Deadline, as_nbdinfo: bool = False
) -> InfoDocument:
    """Asks a server for its exports.

    Args:
        negotiation: with the server; an old one that can only be asked by choosing an export is left after that.
        all_exports: all that the server lists, and not the one that the URI names.
        deadline: for all of it.
        as_nbdinfo: describe the exports of a list by what the list says of them, as nbdinfo does, and not by what the
            server says of each.

    Raises:
        NbdError: the server refused or cannot tell.
        DeadlineError: no answer in time.
    """
    listed = negotiation.list_exports(deadline) if all_exports else [(negotiation.uri.export, "")]
    style, tls, replies = negotiation.style, negotiation.tls, negotiation.replies
    exports = tuple(_entry(negotiation, name, deadline) for name, _ in listed)
    if all_exports and as_nbdinfo:
        exports = tuple(
            entry.model_copy(update={"description": said}) for entry, (_, said) in zip(exports, listed, strict=True)
        )
    return InfoDocument(protocol=_PROTOCOLS.get(style, style), tls=tls, replies=replies, exports=exports)


def _entry(negotiation: Negotiation, name: str, deadline: Deadline) -> ExportEntry:
    contexts: tuple[str, ...] | None = None
    if negotiation.style == "fixed newstyle":
        info = negotiation.info(name, deadline)
        if negotiation.replies != "simple":
            try:
                contexts = tuple(negotiation.list_contexts(name, deadline=deadline))
            except NbdUnsupportedError:
                contexts = None
    else:
        with negotiation.go(name, deadline) as client:
            info = client.export
    return _described(info, str(replace(negotiation.uri, export=name)), contexts)


def _described(info: ExportInfo, uri: str, contexts: tuple[str, ...] | None) -> ExportEntry:
    flags = info.flags
    return ExportEntry(
        name=info.name,
        canonical=info.canonical,
        description=info.description,
        uri=uri,
        size=info.size,
        contexts=contexts,
        is_rotational=Flag.ROTATIONAL in flags,
        is_read_only=Flag.READ_ONLY in flags,
        can_cache=Flag.SEND_CACHE in flags,
        can_df=Flag.SEND_DF in flags,
        can_fast_zero=Flag.SEND_FAST_ZERO in flags,
        can_flush=Flag.SEND_FLUSH in flags,
        can_fua=Flag.SEND_FUA in flags,
        can_multi_conn=Flag.CAN_MULTI_CONN in flags,
        can_trim=Flag.SEND_TRIM in flags,
        can_zero=Flag.SEND_WRITE_ZEROES in flags,
        can_block_status_payload=Flag.BLOCK_STATUS_PAYLOAD in flags,
        block_size_minimum=info.minimum_block if info.sizes_told else None,
        block_size_preferred=info.preferred_block if info.sizes_told else None,
        block_size_maximum=info.maximum_payload if info.sizes_told else None,
    )
