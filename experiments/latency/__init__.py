"""Inference in wall-clock time."""
