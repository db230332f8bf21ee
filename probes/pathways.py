"""Pathways, as probes name them: see `lab.edges.pathways`."""

from __future__ import annotations

from lab.edges.pathways import (
    CROSS_FRAME,
    NOTHING,
    PANEL,
    PATHWAYS,
    PORTABLE,
    cut_mask,
    segment,
    usual_pathways,
)

__all__ = ["CROSS_FRAME", "NOTHING", "PANEL", "PATHWAYS", "PORTABLE", "cut_mask", "segment", "usual_pathways"]
