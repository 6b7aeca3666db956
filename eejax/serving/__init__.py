"""Serving under load and deadlines."""

from eejax.serving.drift import Drift
from eejax.serving.path import levels, watched, whole
from eejax.serving.samples import Answer, Level, Refusal
from eejax.serving.scheduler import Scheduler
from eejax.serving.service import Service
from eejax.serving.times import StageTimes, measure, noise

__all__ = [
    "Answer",
    "Drift",
    "Level",
    "Refusal",
    "Scheduler",
    "Service",
    "StageTimes",
    "levels",
    "measure",
    "noise",
    "watched",
    "whole",
]
