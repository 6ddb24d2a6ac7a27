"""The documents this package gives out: one versioned schema each, the same in the library and in ``--json``.

A document names its schema (``qmpnbd.validate/1``). Within a number, fields are only added; anything else is a new
number. The JSON schemas under ``docs/schema`` are generated from here. Offsets, ends, lengths and sizes are bytes;
extents are half-open. A document has a module of its own; what several share is in ``parts``.
"""

from __future__ import annotations

from qmpnbd.report.model.backup import BackupDiskEntry, BackupDocument, BackupVerdict, LeftOutEntry
from qmpnbd.report.model.bitmaps import BitmapEntry, BitmapsDocument
from qmpnbd.report.model.chain import ChainDocument
from qmpnbd.report.model.check import CheckDocument, CheckVerdict, FindingEntry, PlaceEntry
from qmpnbd.report.model.checkpoints import (
    CheckpointChangeEntry,
    CheckpointEntry,
    CheckpointsDocument,
    CheckpointState,
    DiskCheckpointsEntry,
)
from qmpnbd.report.model.copy import CopyDocument, CopyForm
from qmpnbd.report.model.disks import DiskEntry, DisksDocument, NodeEntry
from qmpnbd.report.model.error import ErrorDocument
from qmpnbd.report.model.export import (
    BegunCheckpointEntry,
    DiskExportEntry,
    ExportDocument,
    IncrementEntry,
    InstantEntry,
)
from qmpnbd.report.model.graph import (
    ChildEntry,
    DepthEntry,
    ExportReport,
    GraphDiskEntry,
    GraphDocument,
    GraphNodeEntry,
)
from qmpnbd.report.model.info import ExportEntry, InfoDocument
from qmpnbd.report.model.map import ContextMap, MapDocument
from qmpnbd.report.model.parts import Document, ErrorEntry, ExtentEntry, LayerEntry, Part, RangeEntry, UnreadableEntry
from qmpnbd.report.model.populate import PopulateDocument
from qmpnbd.report.model.recover import RecoverDocument, TakenDownEntry
from qmpnbd.report.model.repository import (
    PruneMergeEntry,
    RepositoryDocument,
    RepositoryFindingEntry,
    RepositoryOperation,
    RepositoryVerdict,
    StoredBackupEntry,
    StoredChainEntry,
    StoredDiskEntry,
)
from qmpnbd.report.model.restore import (
    RestoredFileEntry,
    RestoredLayerEntry,
    RestoreDocument,
    RestoreForm,
    RestoreMachineDocument,
)
from qmpnbd.report.model.status import RunEntry, StatusDocument, ThingEntry
from qmpnbd.report.model.validate import (
    ComparedEntry,
    DepthTotal,
    DiscrepancyEntry,
    DiskLine,
    DiskReport,
    FileEntry,
    Finding,
    NotJudgedBecause,
    Picture,
    RangeHashEntry,
    StepEntry,
    SummaryLine,
    ValidationReport,
    Verdict,
)
from qmpnbd.report.model.verify import (
    BootEntry,
    SecondReadingEntry,
    SkippedEntry,
    VerifyDocument,
    VerifyFindingEntry,
    VerifyVerdict,
)

__all__ = [
    "DOCUMENTS",
    "BackupDiskEntry",
    "BackupDocument",
    "BackupVerdict",
    "BegunCheckpointEntry",
    "BitmapEntry",
    "BitmapsDocument",
    "BootEntry",
    "ChainDocument",
    "CheckDocument",
    "CheckVerdict",
    "CheckpointChangeEntry",
    "CheckpointEntry",
    "CheckpointState",
    "CheckpointsDocument",
    "ChildEntry",
    "ComparedEntry",
    "ContextMap",
    "CopyDocument",
    "CopyForm",
    "DepthEntry",
    "DepthTotal",
    "DiscrepancyEntry",
    "DiskCheckpointsEntry",
    "DiskEntry",
    "DiskExportEntry",
    "DiskLine",
    "DiskReport",
    "DisksDocument",
    "Document",
    "ErrorDocument",
    "ErrorEntry",
    "ExportDocument",
    "ExportEntry",
    "ExportReport",
    "ExtentEntry",
    "FileEntry",
    "Finding",
    "FindingEntry",
    "GraphDiskEntry",
    "GraphDocument",
    "GraphNodeEntry",
    "IncrementEntry",
    "InfoDocument",
    "InstantEntry",
    "LayerEntry",
    "LeftOutEntry",
    "MapDocument",
    "NodeEntry",
    "NotJudgedBecause",
    "Part",
    "Picture",
    "PlaceEntry",
    "PopulateDocument",
    "PruneMergeEntry",
    "RangeEntry",
    "RangeHashEntry",
    "RecoverDocument",
    "RepositoryDocument",
    "RepositoryFindingEntry",
    "RepositoryOperation",
    "RepositoryVerdict",
    "RestoreDocument",
    "RestoreForm",
    "RestoreMachineDocument",
    "RestoredFileEntry",
    "RestoredLayerEntry",
    "RunEntry",
    "SecondReadingEntry",
    "SkippedEntry",
    "StatusDocument",
    "StepEntry",
    "StoredBackupEntry",
    "StoredChainEntry",
    "StoredDiskEntry",
    "SummaryLine",
    "TakenDownEntry",
    "ThingEntry",
    "UnreadableEntry",
    "ValidationReport",
    "Verdict",
    "VerifyDocument",
    "VerifyFindingEntry",
    "VerifyVerdict",
]

DOCUMENTS: tuple[type[Document], ...] = (
    ValidationReport,
    DisksDocument,
    GraphDocument,
    ExportDocument,
    BackupDocument,
    CheckpointsDocument,
    PopulateDocument,
    StatusDocument,
    RecoverDocument,
    MapDocument,
    ChainDocument,
    InfoDocument,
    CheckDocument,
    CopyDocument,
    BitmapsDocument,
    RepositoryDocument,
    RestoreDocument,
    RestoreMachineDocument,
    VerifyDocument,
    ErrorDocument,
    DiskLine,
    SummaryLine,
)
"""Every document there is; their schemas are committed under ``docs/schema``."""
