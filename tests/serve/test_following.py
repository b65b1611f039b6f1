import dataclasses
import logging
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from cafemed import bundle as bundles
from cafemed import registry
from cafemed.bundle import Bundle
from cafemed.errors import ArtifactError
from serve.following import FollowingModel
from serve.recommender import Recommender


@pytest.fixture
def registry_dir(served: Bundle, other: Bundle, tmp_path: Path) -> Path:
    """Two versions; the first is in production."""
    for name, bundle in (("a", served), ("b", other)):
        bundles.write(tmp_path / name, bundle)
        registry.publish(tmp_path / "registry", tmp_path / name, {})
    registry.promote(tmp_path / "registry", 1)
    return tmp_path / "registry"


def test_follows_promotions_and_rollbacks(registry_dir: Path) -> None:
    model = FollowingModel(registry_dir, "production")
    first = model.recommender
    assert first.name.version == 1
    assert not model.refresh()
    assert model.recommender is first
    registry.promote(registry_dir, 2)
    assert model.refresh()
    assert model.recommender.name.version == 2
    registry.rollback(registry_dir)
    assert model.refresh()
    assert model.recommender.name.version == 1


def test_a_pinned_version_stays(registry_dir: Path) -> None:
    model = FollowingModel(registry_dir, 1)
    registry.promote(registry_dir, 2)
    assert not model.refresh()
    assert model.recommender.name.version == 1


def test_a_broken_version_never_replaces_one_that_works(
    registry_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FollowingModel(registry_dir, "production")
    weights = registry.resolve(registry_dir, 2) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    registry.promote(registry_dir, 2)
    loads: list[int] = []
    load = model._load
    monkeypatch.setattr(model, "_load", lambda version: (loads.append(version), load(version)))
    with caplog.at_level(logging.WARNING):
        assert not model.refresh()
        assert not model.refresh()
    assert loads == [2]  # tried once
    assert model.recommender.name.version == 1
    [record] = caplog.records  # reported once
    assert "staying with version 1" in record.message
    assert "model.safetensors: expected" in record.message
    registry.rollback(registry_dir)
    assert not model.refresh()
    assert model.recommender.name.version == 1


def other_weights(bundle: Bundle, change: float) -> Bundle:
    """The bundle with one changed weight, whole by its checksums."""
    weights = {name: tensor.clone() for name, tensor in bundle.weights.items()}
    next(iter(weights.values())).view(-1)[0] = change
    return dataclasses.replace(bundle, weights=weights)


def test_weights_that_are_not_those_that_were_evaluated_never_answer(
    registry_dir: Path,
    other: Bundle,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = FollowingModel(registry_dir, "production")
    bundles.write(tmp_path / "c", other_weights(other, 1000.0))
    registry.promote(registry_dir, registry.publish(registry_dir, tmp_path / "c", {}))
    assert not model.refresh()
    assert (model.recommender.name.version, model.refused) == (1, 3)
    assert "self_check" in caplog.text
    registry.promote(registry_dir, 2)
    assert model.refresh()
    assert (model.recommender.name.version, model.refused) == (2, None)


def test_what_no_one_thought_of_is_refused_too(
    registry_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FollowingModel(registry_dir, "production")
    registry.promote(registry_dir, 2)
    monkeypatch.setattr(model, "_load", lambda _: {}["MARKER4711"])
    assert not model.refresh()
    assert (model.recommender.name.version, model.refused) == (1, 2)
    assert "staying with version 1: KeyError" in caplog.text
    assert "MARKER4711" not in caplog.text


@pytest.mark.parametrize("error", [OSError("gone"), ArtifactError("s3://b/r: 503 Slow Down")])
def test_storage_that_fails_once_is_asked_again(
    registry_dir: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    model = FollowingModel(registry_dir, "production", retry_s=0.0)
    registry.promote(registry_dir, 2)

    def fail(_: int) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(model, "_load", fail)
        assert not model.refresh()
    assert model.refresh()
    assert (model.recommender.name.version, model.refused) == (2, None)


def test_an_object_store_that_fails_while_a_promoted_version_is_fetched(
    registry_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CAFEMED_CACHE", str(tmp_path / "cache"))
    url = f"memory://{tmp_path.name}/registry"
    for version in (1, 2):
        registry.publish(url, registry.resolve(registry_dir, version), {})
    registry.promote(url, 1)
    model = FollowingModel(url, "production", retry_s=0.0)
    registry.promote(url, 2)
    memory = type(fsspec.filesystem("memory"))

    def cut(*_: Any, **__: Any) -> None:
        raise ConnectionResetError("Connection reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr(memory, "get_file", cut)
        assert not model.refresh()
        assert (model.recommender.name.version, model.refused) == (1, 2)
    assert model.refresh()
    assert (model.recommender.name.version, model.refused) == (2, None)


def test_what_did_not_work_is_tried_again_after_twice_as_long_each_time(
    registry_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file on a shared folder that is whole an hour later."""
    model = FollowingModel(registry_dir, "production", retry_s=5.0)
    weights = registry.resolve(registry_dir, 2) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    registry.promote(registry_dir, 2)
    now, load, tried = 1000.0, model._load, list[float]()

    def noted(version: int) -> Recommender:
        tried.append(now - 1000.0)
        return load(version)

    monkeypatch.setattr(model, "_load", noted)
    monkeypatch.setattr("serve.following.time.monotonic", lambda: now)
    for _ in range(720):
        assert not model.refresh()
        assert model.refused == 2
        now += 5.0
    assert tried[:8] == [0, 5, 15, 35, 75, 155, 315, 615]
    assert set(np.diff(tried[6:])) == {300.0}
    assert len([r for r in caplog.records if "staying with version 1" in r.message]) == 1
    weights.write_bytes(whole)
    now += 300.0
    assert model.refresh()
    assert (model.recommender.name.version, model.refused) == (2, None)


def damage(registry_dir: Path, *versions: int) -> None:
    for version in versions:
        weights = registry.resolve(registry_dir, version) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])


def test_one_that_starts_after_a_broken_promotion_answers_as_the_others(
    registry_dir: Path, other: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Versions 1, 2, 3 and 4 in turn; 2 was rolled back, 3 and 4 do not work."""
    for change in (0.5, 0.6):
        bundles.write(tmp_path / str(change), other_weights(other, change))
        registry.publish(registry_dir, tmp_path / str(change), {})
    registry.promote(registry_dir, 2)
    registry.rollback(registry_dir)
    registry.promote(registry_dir, 3)
    registry.promote(registry_dir, 4)
    assert registry.earlier(registry_dir, "production") == [3, 1]
    damage(registry_dir, 3, 4)
    model = FollowingModel(registry_dir, "production")
    assert (model.recommender.name.version, model.refused) == (1, 4)
    assert not model.refresh()
    told = [record for record in caplog.records if "staying with version 1" in record.message]
    assert len(told) == 1
    assert "0004/" in told[0].message
    registry.promote(registry_dir, 2)
    assert model.refresh()
    assert (model.recommender.name.version, model.refused) == (2, None)


def test_where_no_version_works_the_promoted_ones_error_is_told(registry_dir: Path) -> None:
    registry.promote(registry_dir, 2)
    damage(registry_dir, 1, 2)
    with pytest.raises(ArtifactError, match=r"0002/.*model\.safetensors: expected"):
        FollowingModel(registry_dir, "production")


def test_in_place_of_a_version_that_is_named_there_is_no_other(registry_dir: Path) -> None:
    registry.promote(registry_dir, 2)
    damage(registry_dir, 2)
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        FollowingModel(registry_dir, 2)


def test_a_registry_out_of_reach_changes_nothing(
    registry_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = FollowingModel(registry_dir, "production")
    registry_dir.rename(registry_dir.with_name("away"))
    assert not model.refresh()
    assert not model.refresh()
    assert model.recommender.name.version == 1
    assert len(caplog.records) == 1
    registry_dir.with_name("away").rename(registry_dir)
    registry.promote(registry_dir, 2)
    assert model.refresh()


def test_the_model_card_is_that_of_the_version_and_of_today(
    registry_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = FollowingModel(registry_dir, "production")
    assert model.recommender.card.card is None
    card = {"format_version": 1, "model": {}, "limits": ["few patients"], "metrics": {"test": {}}}
    registry.write_card(registry_dir, 1, card, "")
    assert not model.refresh()
    assert model.recommender.card.card == card
    assert model.recommender.card.limits == ["few patients"]
    registry.write_card(registry_dir, 2, card | {"limits": []}, "")
    registry.promote(registry_dir, 2)
    assert model.refresh()
    assert model.recommender.card.limits == []
    # A version is served even where nobody can read its card.
    (registry_dir / "cards" / "0001.json").write_text("{")
    registry.rollback(registry_dir)
    assert model.refresh()
    assert not model.refresh()
    assert (model.recommender.name.version, model.recommender.card.card) == (1, None)
    assert len([r for r in caplog.records if "has no readable model card" in r.message]) == 1
    for unfit in ({"format_version": 1, "model": {}}, card | {"limits": [1]}):
        registry.write_card(registry_dir, 1, unfit, "")
        assert not model.refresh()
        assert model.recommender.card.card is None
        assert model.recommender.card.limits
    assert "expected the key 'limits'" in caplog.text


def test_nothing_promoted_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no version is promoted to 'production'"):
        FollowingModel(tmp_path, "production")
