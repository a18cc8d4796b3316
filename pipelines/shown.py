"""Images that Pillow decodes but DALI, which feeds the net, does not: some WebPs with EXIF, 16-bit BMPs."""

from __future__ import annotations

from typing import Any

from pipelines.augment import Augment
from pipelines.loader import Loader
from pipelines.order import Ints
from pipelines.plan import FixedPlan
from pipelines.shards import ShardSet
from pipelines.speech import bar

SIDE = 64  # pixels per side of the output; the whole image is decoded anyway


def refused(shards: ShardSet, samples: Ints) -> list[dict[str, Any]]:
    """Returns the samples that DALI refuses, as problems of `verify`.

    They are decoded one by one: with several refused samples in a batch, DALI 2.4 was seen to die of SIGSEGV.
    """
    if not len(samples):
        return []
    plan = FixedPlan(shards, Augment(resize=SIDE, crop=SIDE), samples=samples)
    loader = Loader(plan, shards.manifest, batch=1)
    known = set(loader.bad)
    loader.told = lambda _: None
    with bar(len(samples), "decode with DALI", "img", lines=True) as shown:
        for _ in loader.epoch():
            shown.update()
    reason = "cannot be decoded by DALI: write it as a plain JPEG"
    return [problem_of(shards, sample, reason) for sample in sorted(loader.bad - known)]


def problem_of(shards: ShardSet, sample: int, reason: str) -> dict[str, Any]:
    """A bad sample as a problem of `verify`."""
    number = shards.shard_of(sample)
    place: dict[str, Any] = {"shard": shards.names[number], "row": sample - int(shards.firsts[number])}
    return place | {"name": shards.name(sample), "reason": reason}
