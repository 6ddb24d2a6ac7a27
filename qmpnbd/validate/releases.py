"""Which of the known generations of QEMU a release belongs to; pure."""

from __future__ import annotations

from qmpnbd.images.mapentries import Generation
from qmpnbd.qmp.capabilities import ALLOCATION_AFTER_DEPTH
from qmpnbd.qmp.models import VersionInfo


def generation_of(version: VersionInfo) -> Generation:
    """Returns the generation that serves base:allocation as this QEMU does.

    Known are 5.2, 7.2 and 10.0; of the releases between, each is taken for the nearest that is like it.
    """
    if version.qemu.major >= 8:
        return "10.0"
    return "7.2" if version.qemu.major >= 6 else "5.2"


def base_refusal(version: VersionInfo) -> str:
    """Returns why base:allocation cannot be compared beside the allocation depth on a QEMU; empty if it can."""
    hazard = ALLOCATION_AFTER_DEPTH
    return f"refused, {hazard.name}: QEMU {version} {hazard.what}" if hazard.applies(version) else ""
