"""Live migration for Python."""
