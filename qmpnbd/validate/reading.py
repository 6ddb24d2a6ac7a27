"""The image files' side of a validation: blocking work, run in a thread."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qmpnbd.deadline import Deadline
from qmpnbd.errors import ImageUnsupportedError
from qmpnbd.extents import ExtentMap
from qmpnbd.images.chain import Explanation, Layer, LayerSpec
from qmpnbd.images.files import open_layers
from qmpnbd.images.hostfile import Identity
from qmpnbd.images.layers import Chain
from qmpnbd.images.mapentries import Generation
from qmpnbd.validate.compare import Discrepancy


@dataclass(frozen=True, slots=True)
class Reading:
    """A backing chain as its files were at one moment.

    Attributes:
        specs: which files were read, and how.
        layers: what they are, active layer first.
        depth: the allocation depth computed from them.
        identities: what each file is to the kernel, however it is named (`qmpnbd.images.hostfile.Identity`).
        base: base:allocation, without a look for holes under the data of qcow2 layers; None if it was not asked for, or
            cannot be told.
    """

    specs: tuple[LayerSpec, ...]
    layers: tuple[Layer, ...]
    depth: ExtentMap
    identities: tuple[Identity, ...]
    base: ExtentMap | None = None


@dataclass(frozen=True, slots=True)
class Explained:
    """A discrepancy, and what in the files led to the computed value; None if that cannot be told any more."""

    discrepancy: Discrepancy
    explanation: Explanation | None


def check_readable(specs: Sequence[LayerSpec], deadline: Deadline) -> None:
    """Opens a chain and closes it, which tells whether its files are there and of a kind that is read here.

    Raises:
        ImageError: a layer cannot be read.
        DeadlineError: `deadline` passed.
    """
    with open_layers(specs, deadline=deadline):
        pass


def read_chain(specs: Sequence[LayerSpec], deadline: Deadline, generation: Generation | None = None) -> Reading:
    """Opens a chain, computes its maps and closes it.

    Args:
        specs: which files, and how they are read.
        deadline: for all of it.
        generation: of the QEMU that runs, to compute its base:allocation; None to leave that out.

    Raises:
        ImageError: a layer cannot be read.
        DeadlineError: `deadline` passed.
    """
    with open_layers(specs, deadline=deadline) as chain:
        return Reading(tuple(specs), chain.layers, chain.allocation_depth(), chain.identities, _base(chain, generation))


def _base(chain: Chain, generation: Generation | None) -> ExtentMap | None:
    if generation is None:
        return None
    try:
        return chain.base_allocation(generation, holes_in_data=False)
    except ImageUnsupportedError:
        return None


def explain_all(
    specs: Sequence[LayerSpec], discrepancies: Iterable[Discrepancy], deadline: Deadline
) -> list[Explained]:
    """Reads the table entries again that decide the first byte of each discrepancy.

    Raises:
        ImageError: a layer cannot be read.
        DeadlineError: `deadline` passed.
    """
    with open_layers(specs, deadline=deadline) as chain:
        return [Explained(found, chain.explain(found.offset)) for found in discrepancies]
