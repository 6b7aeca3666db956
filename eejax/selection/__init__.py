"""Thresholds for a budget, an accuracy or a certified risk, and which exits to keep."""
