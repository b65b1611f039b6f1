"""Serves whichever version an alias of the registry stands for, and follows it when it moves."""

import logging
from pathlib import Path

from cafemed import registry
from cafemed.errors import UserError
from serve.recommender import Recommender

logger = logging.getLogger(__name__)


class FollowingModel:
    """The recommender of an alias's version.

    Attributes:
        recommender: of the last version that loaded and passed its self-check.
    """

    def __init__(self, registry_dir: Path, alias: int | str) -> None:
        """Loads the version that the alias stands for now.

        Args:
            registry_dir: a registry folder.
            alias: "production", "candidate" or a version, which never moves.

        Raises:
            ArtifactError: if nothing is promoted, or the bundle does not work.
            ConfigError: if the bundle's model is unknown here.
        """
        self._registry_dir = registry_dir
        self._alias = alias
        self._refused: int | None = None
        self._reported = ""
        self.recommender = self._load(registry.resolve_version(registry_dir, alias))

    def refresh(self) -> bool:
        """Looks where the alias points and loads that version if it is another one.

        A version that does not load, or fails its self-check, never replaces one that works; it is
        reported once in the log.

        Returns:
            whether the recommender is another one now.
        """
        try:
            version = registry.resolve_version(self._registry_dir, self._alias)
            if version in (self.recommender.name.version, self._refused):
                return False
            self._refused = version  # until it has shown that it works
            self.recommender = self._load(version)
        except (UserError, OSError) as err:
            if str(err) != self._reported:
                logger.error("staying with version %d: %s", self.recommender.name.version, err)
                self._reported = str(err)
            return False
        self._refused = None
        logger.warning("serving version %d now", version)
        return True

    def _load(self, version: int) -> Recommender:
        return Recommender.load(registry.resolve(self._registry_dir, version), version)
