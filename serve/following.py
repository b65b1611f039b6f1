"""Serves whichever version an alias of the registry stands for, and follows it when it moves."""

import logging
import time
from collections.abc import Mapping
from typing import Any

from cafemed import registry
from cafemed.errors import ArtifactError, UserError
from serve.recommender import Recommender

logger = logging.getLogger(__name__)

#: Longest that a version that did not work waits to be tried again.
_MAX_RETRY_S = 300.0


class FollowingModel:
    """The recommender of an alias's version, or of another one while that does not work.

    Attributes:
        refused: the version that the alias stands for, if that does not work.
        recommender: of the last version that loaded and passed its self-check.
    """

    def __init__(
        self,
        registry_dir: registry.Location,
        alias: int | str,
        device: str = "cpu",
        retry_s: float = 5.0,
    ) -> None:
        """Loads the version that the alias stands for now.

        If that does not work, it loads the first that does of those that rollbacks would go to: so
        a replica that starts anew answers as those do that were running at the promotion.

        Args:
            registry_dir: a registry's folder or URL.
            alias: "production", "candidate" or a version, which never moves.
            device: that the model runs on.
            retry_s: after which a version that did not work is tried again; twice as long after
                each time, until it is five minutes.

        Raises:
            ArtifactError: if nothing is promoted, or no bundle works.
            ConfigError: if the bundle's model is unknown here.
        """
        self._registry_dir = registry_dir
        self._alias = alias
        self._device = device
        self._first_retry_s = self._retry_s = retry_s
        self._retry_at = 0.0
        self.refused: int | None = None
        self._reported = ""
        self._reported_card = ""
        version = registry.resolve_version(registry_dir, alias)
        try:
            self.recommender = self._load(version)
        except Exception as err:
            earlier = self._load_earlier()
            if earlier is None:
                raise
            self.recommender = earlier
            self._refuse(version, err)

    def refresh(self) -> bool:
        """Looks where the alias points and loads that version if it is another one.

        A version that does not load, or fails its self-check, never replaces one that works; it is
        reported once in the log, and tried again now and then: its storage may have been out of
        reach, or its files not all there yet.

        Returns:
            whether the recommender is another one now.
        """
        try:
            version = registry.resolve_version(self._registry_dir, self._alias)
        except Exception as err:  # noqa: BLE001 - whatever a registry holds, the old one goes on
            self._report(err)
            return False
        serving = self.recommender.name.version
        if version == serving:
            self.refused = None
        if version == serving or (version == self.refused and time.monotonic() < self._retry_at):
            self.recommender.stored_card = self._card(serving)
            return False
        try:
            self.recommender = self._load(version)
        except Exception as err:  # noqa: BLE001 - as above, of a bundle
            self._refuse(version, err)
            return False
        self.refused = None
        self._reported = ""
        logger.warning("serving version %d now", version)
        return True

    def _load(self, version: int) -> Recommender:
        recommender = Recommender.load(
            registry.resolve(self._registry_dir, version), version, self._device
        )
        recommender.stored_card = self._card(version)
        return recommender

    def _load_earlier(self) -> Recommender | None:
        """The first that works of the versions that rollbacks would go to."""
        if self._alias not in registry.ALIASES:
            return None  # a version and no other is asked for
        try:
            versions = registry.earlier(self._registry_dir, str(self._alias))
        except Exception:  # noqa: BLE001 - why the promoted one does not work is what is told
            return None
        for version in versions:
            try:
                return self._load(version)
            except Exception as err:  # noqa: BLE001 - whatever a bundle holds
                logger.warning("version %d does not work either: %s", version, _said(err))
        return None

    def _refuse(self, version: int, err: Exception) -> None:
        """Takes note that the alias's version does not work, and when to try it again."""
        if version != self.refused:
            self._retry_s = self._first_retry_s
        self.refused = version
        self._retry_at = time.monotonic() + self._retry_s
        self._retry_s = min(2 * self._retry_s, _MAX_RETRY_S)
        self._report(err)

    def _report(self, err: Exception) -> None:
        said = _said(err)
        if said != self._reported:
            logger.error("staying with version %d: %s", self.recommender.name.version, said)
            self._reported = said

    def _card(self, version: int) -> Mapping[str, Any] | None:
        """The version's card as it is now: it is written, and replaced, after the version."""
        try:
            card = registry.read_card(self._registry_dir, version)
            limits = [] if card is None else card.get("limits")
            if not isinstance(limits, list) or not all(isinstance(text, str) for text in limits):
                raise ArtifactError("expected the key 'limits' with a list of texts")
        except (UserError, OSError) as err:
            if str(err) != self._reported_card:
                logger.warning("version %d has no readable model card: %s", version, err)
                self._reported_card = str(err)
            return None
        return card


def _said(err: Exception) -> str:
    """The error in a line that quotes nothing but what is written for users."""
    return str(err) if isinstance(err, (UserError, OSError)) else type(err).__name__
