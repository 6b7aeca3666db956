"""What is chosen on held-out samples: thresholds, guarantees on them, and the exits to keep."""

from eejax.selection import bounds, guarantees, placement, thresholds
from eejax.selection.guarantees import Candidates, Certificate, certify, control_risk
from eejax.selection.placement import Placement, choose_exits, keep_trace, unchanged
from eejax.selection.thresholds import (
    Choice,
    Search,
    for_budget,
    for_budgets,
    for_drop,
    geometric,
    search,
)

__all__ = [
    "Candidates",
    "Certificate",
    "Choice",
    "Placement",
    "Search",
    "bounds",
    "certify",
    "choose_exits",
    "control_risk",
    "for_budget",
    "for_budgets",
    "for_drop",
    "geometric",
    "guarantees",
    "keep_trace",
    "placement",
    "search",
    "thresholds",
    "unchanged",
]
