"""Results as one table, pictures and pages."""
