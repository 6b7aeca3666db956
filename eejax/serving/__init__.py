"""Serving under load and deadlines."""

from eejax.serving.path import levels
from eejax.serving.scheduler import Answer, Level, Refusal, Scheduler
from eejax.serving.service import Service
from eejax.serving.times import StageTimes, measure

__all__ = ["Answer", "Level", "Refusal", "Scheduler", "Service", "StageTimes", "levels", "measure"]
