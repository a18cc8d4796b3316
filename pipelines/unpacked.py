"""What to say of a directory that is given as a shard set and is none: mostly a folder of images, not packed yet."""

from __future__ import annotations

import shlex
from pathlib import Path

from pipelines.errors import SourceError
from pipelines.folders import Content, content, top
from pipelines.sources import looks_like_split

SETS = Path("sets")  # where the commands that are suggested put a set
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def unpacked(directory: Path) -> str:
    """The sentence on a directory without shards, or that does not exist: for images the commands that pack them."""
    made = f"no shards in {directory}: make them with `python -m pipelines pack ... {directory}`"
    if not directory.is_dir():
        return f"{made}, which does not exist yet{'' if directory.is_absolute() else f' in {Path.cwd()}'}"
    try:
        found = content(top(directory))
    except (SourceError, OSError) as error:
        return str(error)
    if sets := [folder.name for folder in found.folders if (directory / folder.name / "manifest.json").exists()]:
        names = " or ".join(str(directory / name) for name in sets)
        return f"{directory} is no shard set itself, but holds some: name one, {names}"
    if tars := [folder.name for folder in found.folders if any((directory / folder.name).glob("*.tar"))]:
        lines = " and ".join(f"`python -m pipelines index {shlex.quote(str(directory / name))}`" for name in tars)
        return f"no shards in {directory} itself, but in folders of it: index each, {lines}"
    splits = [folder.name for folder in found.folders if looks_like_split(folder.name)]
    if len(splits) > 1:
        lines = " and ".join(f"`{pack_command(directory / name)}`" for name in splits)
        return f"no shards in {directory}, which has the parts {', '.join(splits)}: pack each, {lines}"
    if found.folders:
        return (
            f"no shards in {directory}: if its folders are classes of images, pack them with "
            f"`{pack_command(directory)}`, and name {_target(directory)} here"
        )
    if _pictures(found):
        return (
            f"no shards in {directory}, but images without classes: the folder to pack is the one above, "
            f"`{pack_command(directory.parent)}`, if its folders are the classes"
        )
    return made


def pack_command(source: Path, target: Path | None = None) -> str:
    """The command line that packs a folder whose sub-folders are the classes."""
    return shlex.join(["python", "-m", "pipelines", "pack", "imagefolder", str(source), str(target or _target(source))])


def _target(source: Path) -> Path:
    return SETS / (source.resolve().name or "train")


def _pictures(found: Content) -> bool:
    return any(Path(file.name).suffix.lower() in PICTURES for file in found.files)
