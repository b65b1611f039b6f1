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
