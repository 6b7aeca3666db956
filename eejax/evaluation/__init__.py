"""What recorded traces are worth: the reference routing, figures, significance."""
