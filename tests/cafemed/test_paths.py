from pathlib import Path

import pytest

from cafemed import paths
from cafemed.errors import ConfigError


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


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIA:hush@bucket/x",
        "s3://AKIA:hu/sh@bucket/x?region=eu",
        "S3:/AKIA:hush@bucket/x",
        "s3://hush@bucket/x",
        "abfs://account:hush@container/x",
        "abfs://container/x?client_secret=hush",
        "abfs://container/x?sv=1&sig=hush",
        "s3://bucket/x?secret%5Fkey=hush",
        "file:///x?token=hush",
    ],
)
def test_a_url_with_secrets_is_refused_without_telling_them(url: str):
    with pytest.raises(
        ConfigError, match=r"^key: expected a URL without .*; put them into"
    ) as told:
        paths.require_no_secrets(url, "key")
    assert "hush" not in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/x@y:z?region=eu&endpoint_override=minio:9000",
        "hdfs://user@host:8020/x",
        "abfs://container@account.dfs.core.windows.net/x",
        "file:///a:b@c/x",
        "/a:b@c",
        "here",
    ],
)
def test_a_url_without_secrets_is_taken(url: str):
    paths.require_no_secrets(url, "key")


def test_the_cache_is_in_the_home_unless_it_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CAFEMED_CACHE", raising=False)
    assert paths.cache_dir() == Path.home() / ".cache" / "cafemed"
    monkeypatch.setenv("CAFEMED_CACHE", "/big/disk")
    assert paths.cache_dir() == Path("/big/disk")
