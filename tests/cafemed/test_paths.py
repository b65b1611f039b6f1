from pathlib import Path

import pytest

from cafemed import paths


@pytest.mark.parametrize(
    ("configured", "variable", "expected"),
    [
        ("/data/x", "/data/y", "/data/x"),
        (None, "/data/y", "/data/y"),
        (None, None, "~/.cafemed"),
        (None, "", "~/.cafemed"),
        ("~/x", None, "~/x"),
        ("x/y", None, "~/x/y"),
    ],
)
def test_the_root_is_absolute_whatever_it_was_given(configured, variable, expected, monkeypatch):
    monkeypatch.delenv("CAFEMED_HOME", raising=False)
    if variable is not None:
        monkeypatch.setenv("CAFEMED_HOME", variable)
    root = paths.resolve_root(configured)
    assert root == Path(expected).expanduser()
    assert root.is_absolute()


def test_experiments_and_registries_lie_below_the_root():
    assert paths.experiment_dir(Path("/r"), "a") == Path("/r/experiments/a")
    assert paths.registry_dir(Path("/r"), "a") == Path("/r/registry/a")


def test_the_configuration_lies_in_the_project():
    assert (paths.CONF_DIR / "base.yaml").is_file()
    assert (paths.PROJECT_DIR / "pyproject.toml").is_file()


@pytest.mark.parametrize(
    ("configured", "expected"),
    [
        (None, Path("/r/registry/a")),
        ("/shared/models", Path("/shared/models/a")),
        ("file:///shared/models", Path("/shared/models/a")),
        ("s3://bucket/models", "s3://bucket/models/a"),
        ("s3://bucket/models/", "s3://bucket/models/a"),
        ("models", Path.home() / "models" / "a"),
    ],
)
def test_a_registry_is_a_folder_or_a_url(configured: str | None, expected: Path | str):
    assert paths.registry_of(Path("/r"), "a", configured) == expected


def test_the_cache_is_in_the_home_unless_it_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CAFEMED_CACHE", raising=False)
    assert paths.cache_dir() == Path.home() / ".cache" / "cafemed"
    monkeypatch.setenv("CAFEMED_CACHE", "/big/disk")
    assert paths.cache_dir() == Path("/big/disk")
