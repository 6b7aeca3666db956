"""The progress bar of trainings and of pools."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn


def progress_bar(console: Console, *columns: ProgressColumn) -> Progress:
    """A progress bar with `columns` between the bar and the field `status`; none without a
    terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        *columns,
        TextColumn("{task.fields[status]}"),
        console=console,
        disable=not console.is_terminal,
    )
