"""Serves whichever version an alias of the registry stands for, and follows it when it moves."""

import logging
from collections.abc import Mapping
from typing import Any

from cafemed import registry
from cafemed.errors import UserError
from serve.recommender import Recommender

logger = logging.getLogger(__name__)


class FollowingModel:
    """The recommender of an alias's version.

    Attributes:
        refused: the version that the alias stands for, if that does not work.
        recommender: of the last version that loaded and passed its self-check.
    """

    def __init__(
        self, registry_dir: registry.Location, alias: int | str, device: str = "cpu"
    ) -> None:
        """Loads the version that the alias stands for now.

        Args:
            registry_dir: a registry's folder or URL.
            alias: "production", "candidate" or a version, which never moves.
            device: that the model runs on.

        Raises:
            ArtifactError: if nothing is promoted, or the bundle does not work.
            ConfigError: if the bundle's model is unknown here.
        """
        self._registry_dir = registry_dir
        self._alias = alias
        self._device = device
        self.refused: int | None = None
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
            if version in (self.recommender.name.version, self.refused):
                self.recommender.stored_card = self._card(self.recommender.name.version)
                return False
            self.refused = version  # until it has shown that it works
            self.recommender = self._load(version)
        except Exception as err:  # noqa: BLE001 - whatever a bundle holds, the old one goes on
            if isinstance(err, OSError):
                self.refused = None  # storage out of reach; it may come back
            said = str(err) if isinstance(err, (UserError, OSError)) else type(err).__name__
            if said != self._reported:
                logger.error("staying with version %d: %s", self.recommender.name.version, said)
                self._reported = said
            return False
        self.refused = None
        logger.warning("serving version %d now", version)
        return True

    def _load(self, version: int) -> Recommender:
        recommender = Recommender.load(
            registry.resolve(self._registry_dir, version), version, self._device
        )
        recommender.stored_card = self._card(version)
        return recommender

    def _card(self, version: int) -> Mapping[str, Any] | None:
        """The version's card as it is now: it is written, and replaced, after the version."""
        try:
            return registry.read_card(self._registry_dir, version)
        except (UserError, OSError) as err:
            if str(err) != self._reported:
                logger.warning("version %d has no readable model card: %s", version, err)
                self._reported = str(err)
            return None
