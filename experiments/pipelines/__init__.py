"""Input pipelines of this package and of other frameworks, on the same files."""
