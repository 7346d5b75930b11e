"""vmstate."""
