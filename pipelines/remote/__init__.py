"""Shard sets elsewhere, and the shards of them that this node keeps.

    set = open_set("https://host/train", cache="$SCRATCH/shards", cache_gb=200)   sets.py; a local directory as ever
    ahead = Ahead()                                                               ahead.py; on one rank of each node
    ahead.follow([(train, loader.upcoming(epoch, step)), (val, val_loader.upcoming(0, 0))])
    ahead.close()

A set is opened from a copy of its manifest and index. Its tars are fetched whole when they are first needed, or ahead
of that by the process behind `Ahead`, into the cache that all processes of the node share: places.py reads from
elsewhere, cache.py keeps what was read, elsewhere.py opens a set's tars from there. While a tar is not there,
`ShardSet.waiting` is called with a text and whether bytes have arrived since; `ShardSet.hurried` ends the waiting.
"""
