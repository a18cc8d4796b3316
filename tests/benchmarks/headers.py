"""`python -m tests.benchmarks.headers [MEMBERS]`: listing a tar of tars such as ImageNet's, of so many small images."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from pipelines import origin, pack
from pipelines.published.imagenet import imagenet
from tests.helpers import imagenet as made

TARS = 200


def resident() -> float:
    """Memory of this process, in 10^6 bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def main(members: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        inner = (
            (f"n{k:08d}.tar", made.tar_bytes((f"n{k:08d}_{i}.JPEG", b"x" * 700) for i in range(members // TARS)))
            for k in range(TARS)
        )
        made.tar_of(root / made.TRAIN_TAR, inner)
        made.tar_of(root / made.VAL_TAR, [("ILSVRC2012_val_00000001.JPEG", b"x")])
        made.devkit(root / made.DEVKIT, truth=b"1\n")
        source, before = imagenet(root, train=True), resident()
        start, cpu = time.perf_counter(), time.process_time()
        images = len(source.items)
        took, cpu = time.perf_counter() - start, time.process_time() - cpu
        listed = resident() - before
        origin.fingerprints(source, root / "set", pack.Options().stored, "train")
        print(
            f"{images:,} images: {cpu / images * 1e5:.1f} s of CPU time per 100,000 ({took / images * 1e5:.1f} s in "
            f"all), {listed / images * 1e3:.2f} kB of memory each"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200_000)
