#!/usr/bin/env python3
"""Makes, lists and revokes the endpoint's API keys.

    python jobs/keys.py name=mimic3                                  # lists them
    python jobs/keys.py name=mimic3 create=ward-3 per_minute=600     # prints the new key, once
    python jobs/keys.py name=mimic3 revoke=ward-3

Only hashes are kept, in ROOT/access/NAME.json. Replicas follow the file without a restart.
Run it at a terminal: what a submitted job prints, the key too, stays in the cluster's logs.
"""

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from cafemed import config, console, invocation, paths
from cafemed.errors import ConfigError
from serve import keys
from serve.settings import KeysConfig


@hydra.main(version_base="1.3", config_path=str(paths.CONF_DIR), config_name="keys")
def main(cfg: DictConfig) -> None:
    """Does what was asked, then lists the keys."""
    values: Any = OmegaConf.to_container(cfg, resolve=True)
    sections = ("create", "revoke", "per_minute", "keys_file")
    with invocation.job(values, sections) as told:
        settings = config.from_mapping(KeysConfig, {key: values[key] for key in sections}, "")
        path = Path(settings.keys_file or paths.keys_file(told.root, told.name)).expanduser()
        if not path.is_absolute():
            raise ConfigError(f"keys_file: expected an absolute path, got {path}")
        run(path, settings)


def run(path: Path, settings: KeysConfig) -> None:
    """Makes or revokes a key, as asked, and lists what is there."""
    if settings.revoke is not None:
        keys.revoke(path, str(settings.revoke))
        console.say("keys", f"{settings.revoke} is revoked; replicas refuse it from now on")
    if settings.create is not None:
        secret = keys.create(path, str(settings.create), settings.per_minute)
        console.say("keys", f"{settings.create} is made; its key is not shown again:")
        print(secret)
    console.say("keys", str(path))
    for key in keys.read(path) if path.exists() else ():
        console.say("", f"{key.name:<24} {key.per_minute:>7} a minute   since {key.created}")


if __name__ == "__main__":
    main()
