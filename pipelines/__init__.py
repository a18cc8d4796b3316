"""The data: pack images into shards, order them, augment them, decode them with DALI."""
