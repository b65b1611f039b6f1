from pathlib import Path

import pytest

from cafemed import invocation
from cafemed.errors import ConfigError


def settings(**changed: object) -> dict[str, object]:
    return {"name": "a", "paths": {"root": "/r"}, "force": False, "data": {}} | changed


def test_gives_the_folders_of_the_experiment():
    told = invocation.read(settings(force=True), ["data"])
    assert told == invocation.Invocation(Path("/r"), "a", True)
    assert told.experiment == Path("/r/experiments/a")
    assert told.registry == Path("/r/registry/a")


@pytest.mark.parametrize("name", ["mimic3", "papers-2024.v1", "_x", "äö", 3])
def test_names_that_are_folder_names_are_taken(name):
    assert invocation.read(settings(name=name), ["data"]).name == str(name)


@pytest.mark.parametrize(
    "name", ["a/b", "..", ".", "", " ", "../../x", ".hidden", "-x", "a\n", "a\\b"]
)
def test_a_name_that_leads_elsewhere_is_refused(name):
    with pytest.raises(ConfigError, match=r"^name: expected letters"):
        invocation.read(settings(name=name), ["data"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"key": 1}, "^key: unknown key; known keys: name, paths, force, data$"),
        ({"paths": {"root": "/r", "key": 1}}, "^paths.key: unknown key"),
        ({"paths": {"root": 3}}, "^paths.root: expected str, got 3$"),
        ({"paths": None}, "^paths: expected a mapping, got None$"),
        ({"force": "maybe"}, "^force: expected bool, got 'maybe'$"),
        ({"force": 1}, "^force: expected bool, got 1$"),
        ({"name": None}, "^name: expected str or int, got None$"),
    ],
)
def test_other_settings_are_refused_by_key(changed, message):
    with pytest.raises(ConfigError, match=message):
        invocation.read(settings(**changed), ["data"])


def test_a_root_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(
            ConfigError, match=f"^paths.root: expected a folder, {tmp_path}/file is"
        ):
            invocation.read(settings(paths={"root": str(root)}), ["data"])


def test_what_is_refused_is_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as stop, invocation.job(settings(name=".."), ["data"]):
        raise AssertionError("the job began")
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: name: expected letters")
    assert printed.err.count("\n") == 1


def test_the_job_prints_its_root_and_runs(capsys):
    with invocation.job(settings(), ["data"]) as told:
        assert told.name == "a"
    assert capsys.readouterr().out == "root      /r\n"


@pytest.mark.parametrize("place", ["models", "s3:/bucket", "file:/x", "file://x", ""])
def test_a_registry_is_an_absolute_folder_or_a_url(place: str):
    message = r"^paths\.registry: expected an absolute folder or a URL, got "
    with pytest.raises(ConfigError, match=message):
        invocation.read(settings(paths={"root": "/r", "registry": place}), ["data"])
    for fine in ("/models", "~/models", "s3://bucket/models", "file:///models"):
        invocation.read(settings(paths={"root": "/r", "registry": fine}), ["data"])


def test_a_registry_with_a_password_is_refused():
    with pytest.raises(ConfigError, match=r"^paths\.registry: .* AWS_ACCESS_KEY_ID") as caught:
        invocation.read(settings(paths={"root": "/r", "registry": "s3://K:SECRET@b/x"}), ["data"])
    assert "SECRET@" not in str(caught.value)
