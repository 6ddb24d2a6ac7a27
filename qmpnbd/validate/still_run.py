"""Opening both sides of a disk that stands still; blocking work, run in a thread."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from qmpnbd.errors import NbdUnsupportedError
from qmpnbd.images.files import open_chain
from qmpnbd.images.layers import Chain
from qmpnbd.images.mapentries import Generation
from qmpnbd.nbd.client import Client
from qmpnbd.nbd.constants import TransmissionFlag
from qmpnbd.nbd.stepwise import Negotiation
from qmpnbd.nbd.tls import Tls
from qmpnbd.nbd.uri import NbdUri
from qmpnbd.report.model import DiskReport
from qmpnbd.validate.stamps import Stamp, stamps_of
from qmpnbd.validate.still import StillDisk, Terms
from qmpnbd.validate.still_outcome import still_report
from qmpnbd.validate.target import ImageTarget, ServedTarget


@dataclass(frozen=True, slots=True)
class DaemonFacts:
    """What matters of the QEMU that serves.

    Attributes:
        version: as people write it.
        generation: whose base:allocation it serves.
    """

    version: str
    generation: Generation


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image that was opened, to be served.

    Attributes:
        chain: its files; to be closed by whoever asked.
        format: of the active layer.
        bitmaps: persistent bitmaps to be served with it.
        stamps: the files when they were opened.
    """

    chain: Chain
    format: str
    bitmaps: tuple[str, ...]
    stamps: tuple[Stamp, ...]


def prepared(target: ImageTarget, terms: Terms) -> Prepared:
    """Opens an image.

    Raises:
        ImageError: it cannot be read.
        DeadlineError: the time is over.
    """
    chain = open_chain(target.image, format=target.format, deadline=terms.deadline)
    try:
        stamps = stamps_of(chain)
        return Prepared(chain, chain.layers[0].format, tuple(StillDisk(chain, terms).bitmaps()), stamps)
    except BaseException:
        chain.close()
        raise


def compare_image(
    target: ImageTarget, image: Prepared, uri: NbdUri, served_by: DaemonFacts, terms: Terms
) -> DiskReport:
    """Compares an image with its export by a storage daemon of ours.

    Raises:
        ImageChangedError: somebody else changed a file meanwhile.
        QmpnbdError: one side cannot be read.
    """
    disk = StillDisk(image.chain, terms, served_by.generation)
    with Client.connect(uri, contexts=disk.contexts(), deadline=terms.deadline) as client:
        findings = disk.judge(client, image.stamps)
    return still_report(target, findings, terms, served_by.version)


def compare_served(target: ServedTarget, tls: Tls | None, terms: Terms) -> DiskReport:
    """Compares an image with an export of any NBD server.

    Raises:
        ImageChangedError: somebody else changed a file meanwhile.
        QmpnbdError: one side cannot be read.
    """
    uri, deadline = NbdUri.parse(target.uri), terms.deadline
    with Client.connect(uri, deadline=deadline, tls=tls) as client:
        # What the server holds back from the files would look like a discrepancy.
        if client.export.flags & TransmissionFlag.SEND_FLUSH:
            with suppress(NbdUnsupportedError):
                client.flush(deadline)
    with open_chain(target.image, format=target.format, deadline=deadline) as chain:
        stamps = stamps_of(chain)
        disk = StillDisk(chain, terms)
        with Negotiation.connect(uri, tls=tls, deadline=deadline) as negotiation:
            wanted = disk.contexts()
            offered = set(negotiation.list_contexts(uri.export, wanted, deadline)) if wanted else set()
            named = [context for context in wanted if context in offered]
            if named:
                negotiation.set_contexts(uri.export, named, deadline)
            with negotiation.go(uri.export, deadline) as client:
                findings = disk.judge(client, stamps, named)
        return still_report(target, findings, terms, "")
