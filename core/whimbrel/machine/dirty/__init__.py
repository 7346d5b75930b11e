"""machine/dirty."""
