"""The settings of a run as flat keys, `optim.lr`, and as the text of a YAML file. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, is_dataclass
from typing import Any

import yaml

from dist_train.config import Config
from pipelines.resolve import FLAG


def dump(config: Config) -> str:
    """The configuration as YAML, which `--config` reads back."""
    # Paths as they read in a locale that has all characters: YAML knows no surrogates.
    text = json.dumps(asdict(config), ensure_ascii=False).encode(errors="surrogateescape").decode(errors="replace")
    return str(yaml.safe_dump(json.loads(text), sort_keys=False))


def as_dict(config: Any) -> dict[str, Any]:
    """The settings as one flat {dotted key: value}."""
    flat: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            flat |= {f"{f.name}.{key}": inner for key, inner in as_dict(value).items()}
        else:
            flat[f.name] = value
    return flat


# Options of the trainer besides --help and --version: a file, each group as a mapping, each key.
OPTIONS = (
    "--config",
    "--print_config",
    FLAG,
    *(f"--{f.name}" for f in fields(Config)),
    *(f"--{k}" for k in as_dict(Config())),
)
