"""Data: images are packed into shards, ordered, augmented and decoded with DALI."""

__version__ = "0.1.0"  # of all three packages; pyproject.toml reads it
