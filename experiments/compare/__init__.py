"""Schemes side by side on equal terms."""
