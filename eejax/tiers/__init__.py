"""Tiers: a network whose stages run on several machines."""

from eejax.tiers.tier import Stages, Tier, Told, Unanswered

__all__ = ["Stages", "Tier", "Told", "Unanswered"]
