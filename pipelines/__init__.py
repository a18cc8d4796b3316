"""Data: images are packed into shards, ordered, augmented and decoded with DALI.

`ImageLoader` and `ValidationLoader` are for training scripts of one's own (docs/loader.md). They are imported when they
are first asked for: torch and DALI take seconds.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"  # of all three packages; pyproject.toml reads it
__all__ = ["ImageLoader", "ValidationLoader"]

if TYPE_CHECKING:
    from pipelines.images import ImageLoader, ValidationLoader
else:  # mypy would take any name for one of these

    def __getattr__(name: str) -> type:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from pipelines import images

        return getattr(images, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
