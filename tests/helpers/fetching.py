"""A process that opens a set elsewhere and reads the first sample of each shard: `python -m tests.helpers.fetching`."""

from __future__ import annotations

import hashlib
import json
import sys

from pipelines.remote.sets import open_set


def main() -> None:
    url, cache, gigabytes, keeps = json.loads(sys.argv[1])
    shards = open_set(url, cache=cache, cache_gb=gigabytes)
    print("opened", flush=True)
    sys.stdin.readline()
    digest = hashlib.sha256()
    for first in shards.firsts.tolist():
        digest.update(shards.read(first))
        if not keeps:
            shards.keep(shards.firsts[:0])
    print(digest.hexdigest(), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
