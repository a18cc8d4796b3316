"""ImageNet (ILSVRC-2012) in the layouts in which it is distributed; no file of it is unpacked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.errors import SourceError
from pipelines.published.devkit import WNID, Labels, read_devkit
from pipelines.published.held import HeldInFolder, HeldInTar, Image, held
from pipelines.published.kaggle import read_mapping, read_table
from pipelines.published.layout import TAKES, VALIDATION, Parts, is_table, parts_of, shown
from pipelines.sources import Files, ImageFolder, Item, Source
from pipelines.speech import in_line, say

NO_CLASS = "no label: it lies in no folder or tar named by a WordNet id, such as n01440764"
NO_LABEL = "no label: neither its folder nor its name gives one"
LEFT_OUT = "left out: no training image is of its class"


@dataclass
class ImageNet(Source):
    """The training or the validation images. Classes are those that the training images have, sorted by WordNet id, and
    each is named as in Kaggle's LOC_synset_mapping.txt: `n01440764 tench, Tinca tinca`. So both sets count the same
    classes, in the same order, whatever subset there is."""

    parts: Parts
    train: bool
    stands = True  # a name, or offset and size

    @cached_property
    def held(self) -> HeldInTar | HeldInFolder:
        """Where the images are."""
        return held(self.parts.train if self.train else self.parts.val)

    @cached_property
    def known(self) -> Labels:
        """What the devkit or the tables say."""
        path, words = self.parts.labels, self.parts.words
        if path:
            return read_table(path, words) if is_table(path) else read_devkit(path)
        return Labels(words or self.parts.val, read_mapping(words) if words else {}, {})

    @cached_property
    def _wnids(self) -> list[str]:
        wnids = (self.held if self.train else held(self.parts.train)).groups
        if not wnids:
            raise SourceError(f"{self.parts.train} has no class named by a WordNet id, such as n01440764: {TAKES}")
        return wnids

    @cached_property
    def classes(self) -> list[str]:
        words = self.known.words
        return [f"{wnid} {words[wnid]}" if wnid in words else wnid for wnid in self._wnids]

    @cached_property
    def _listed(self) -> tuple[list[Item], list[dict[str, str]]]:
        """Items, sorted by name, so that each layout gives the same shards; and what did not become one."""
        numbers = {wnid: label for label, wnid in enumerate(self._wnids)}
        items, rejected, unknown = list[Item](), list[dict[str, str]](), list[str]()
        for image in self.held.images():
            name = f"{image.group}/{image.name}" if self.train else image.name
            wnid = image.group if self.train else self._wnid(image)
            if wnid in numbers:
                items.append(Item(name, image.reference, numbers[wnid]))
            elif self.train or wnid:
                rejected.append({"file": name.lstrip("/"), "reason": NO_CLASS if self.train else LEFT_OUT})
            else:
                rejected.append({"file": name, "reason": NO_LABEL})
                unknown += [name] * name.startswith(VALIDATION)
        if unknown:
            raise SourceError(
                f"{self.known.path} has labels of {len(self.known.labels):,} images, but not of "
                f"{in_line(min(unknown))} and {len(unknown) - 1:,} others in {self.held.path}: give the labels of these"
            )
        if not items:
            raise SourceError(f"{self.held.path} has no image of the {len(numbers):,} classes in {self.parts.train}")
        items.sort()
        self._tell(len(items), sum(line["reason"] == LEFT_OUT for line in rejected))
        return items, self.held.rejected + rejected

    def _wnid(self, image: Image) -> str:
        """The class of a validation image; "" if nothing gives it. Raises SourceError."""
        label = self.known.labels.get(image.name.rpartition(".")[0], "")
        group = image.group if WNID.fullmatch(image.group) else ""
        if group and label and group != label:
            raise SourceError(
                f"{self.held.path} has {in_line(image.name)} in the folder {group}, but its label in "
                f"{self.known.path} is {label}: one of them is wrong"
            )
        return group or label

    def _tell(self, images: int, left: int) -> None:
        """Says what is packed."""
        classes, known = self.classes, self.known
        if not self.train:
            more = f", which has {len(known.labels):,}" if len(known.labels) > images + left else ""
            more += f"; {left:,} more, of classes that are not trained, are left out" if left else ""
            say(f"{self.held.path}: {images:,} images, {shown(self.parts)}{more}")
            return
        told = f"{self.held.path}: {images:,} images of {len(classes):,} classes, {classes[0]} to {classes[-1]}"
        if fewer := len(known.words.keys() - self._wnids):
            told += f"; labels count only these, not the {fewer:,} other classes of {known.path.name}"
        if unnamed := [name for name in self._wnids if name not in known.words]:
            where = f"{known.path.name} has no words" if known.words else "there are no words without --devkit"
            told += f"; {where} for {len(unnamed):,} of them, such as {unnamed[0]}"
        say(told)

    @property
    def items(self) -> list[Item]:
        return self._listed[0]

    @property
    def rejected(self) -> list[dict[str, str]]:
        return self._listed[1]

    @cached_property
    def files(self) -> Files:
        return Files(self.held.found, lambda: (self.classes, self.items))

    @property
    def image_folders(self) -> Sequence[ImageFolder]:
        return self.held.image_folders

    def load(self, reference: Any) -> bytes:
        return self.held.load(reference)


def imagenet(first: Path, *others: Path, train: bool) -> ImageNet:
    """The images in these files, in any order: TRAIN.tar VAL.tar DEVKIT.tar.gz, folders in place of the tars, a csv in
    place of the devkit, or one folder that holds all of it. Raises SourceError."""
    return ImageNet(parts_of([first, *others]), train)
