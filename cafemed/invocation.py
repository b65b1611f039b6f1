"""What every job is told at the top level: where its files are, under which name, redo or not."""

import contextlib
import dataclasses
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from cafemed import config, console, paths
from cafemed.errors import ConfigError

#: A name becomes a folder below the root, and must not lead out of it or hide it.
_NAME = re.compile(r"\w[\w.-]*")


@dataclasses.dataclass(frozen=True)
class Paths:
    """The section `paths`.

    Attributes:
        root: see paths.resolve_root.
        registry: folder or URL that holds the registries of all experiments; None: in the root.
    """

    root: str | None = None
    registry: str | None = None


@dataclasses.dataclass(frozen=True)
class Common:
    """The keys of platform/conf/base.yaml, and the experiment's name."""

    name: str | int
    paths: Paths = Paths()
    force: bool = False


@dataclasses.dataclass(frozen=True)
class Invocation:
    """A job's checked common settings.

    Attributes:
        root: absolute folder of all inputs and outputs.
        name: of the experiment.
        force: whether a stage that is done is done again.
        registries: see Paths.registry.
    """

    root: Path
    name: str
    force: bool
    registries: str | None = None

    @property
    def experiment(self) -> Path:
        """The folder of the experiment's stages."""
        return paths.experiment_dir(self.root, self.name)

    @property
    def registry(self) -> Path | str:
        """The folder of the experiment's model versions, or the URL of one."""
        return paths.registry_of(self.root, self.name, self.registries)


@contextlib.contextmanager
def job(values: Mapping[str, Any], sections: Collection[str]) -> Iterator[Invocation]:
    """Checks what the job was told, then runs the block as `console.job` does.

    Args:
        values: the job's whole configuration.
        sections: its keys besides those of `Common`; the job checks what is in them.

    Raises:
        SystemExit: as `console.job`; 2 if a setting is refused.
    """
    try:
        told = read(values, sections)
    except ConfigError as err:
        console.refuse(err)
    with console.job(told.root):
        yield told


def read(values: Mapping[str, Any], sections: Collection[str]) -> Invocation:
    """Reads the common settings.

    Raises:
        ConfigError: for an unknown key, a wrong type, a name that is no folder's name, a root
            that cannot be a folder, or a registry that is neither a folder nor a URL.
    """
    own = {key: value for key, value in values.items() if key not in sections}
    known = [field.name for field in dataclasses.fields(Common)]
    unknown = sorted(set(own) - set(known))
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)}: unknown key; known keys: {', '.join([*known, *sections])}"
        )
    common = config.from_mapping(Common, own, "")
    name = str(common.name)
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"name: expected letters, digits, '_', '-' and '.', beginning with a letter or digit, "
            f"got {name!r}"
        )
    root = paths.resolve_root(common.paths.root)
    for folder in (root, *root.parents):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"paths.root: expected a folder, {folder} is a file")
    if common.paths.registry is not None:
        paths.require_place(common.paths.registry, "paths.registry")
    return Invocation(root, name, common.force, common.paths.registry)
