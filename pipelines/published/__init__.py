"""Data sets as others publish them, as sources."""
