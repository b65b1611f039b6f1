"""jobs/keys.py as a user runs it."""

import re
import subprocess
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from cafemed import config, paths
from serve.keys import Keys, read
from serve.settings import KeysConfig


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            sys.executable,
            paths.PROJECT_DIR / "jobs" / "keys.py",
            f"paths.root={root}",
            "name=tiny",
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_yaml_spells_the_defaults_out() -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(paths.CONF_DIR)):
        written = OmegaConf.to_container(compose(config_name="keys"))
    own = {key: written[key] for key in KeysConfig.__dataclass_fields__}
    assert config.from_mapping(KeysConfig, own, "") == KeysConfig()


def test_a_key_is_printed_once_listed_and_revoked(tmp_path: Path) -> None:
    made = run(tmp_path, "create=ward-3", "per_minute=60")
    assert made.returncode == 0, made.stderr
    [secret] = re.findall(r"^cafemed_\S{43}$", made.stdout, re.MULTILINE)
    path = tmp_path / "access" / "tiny.json"
    found = Keys(path).find(secret.encode())
    assert found is not None
    assert (found.name, found.per_minute) == ("ward-3", 60)
    listed = run(tmp_path)
    assert "ward-3                        60 a minute" in listed.stdout
    assert secret not in listed.stdout
    again = run(tmp_path, "revoke=ward-3", "create=ward-3")
    assert secret not in again.stdout
    assert Keys(path).find(secret.encode()) is None
    assert run(tmp_path, "revoke=ward-3").returncode == 0
    assert read(path) == ()


def test_what_cannot_be_done_is_one_line(tmp_path: Path) -> None:
    for arguments, said in (
        (["revoke=ward-3"], "no API keys"),
        (["create=a", "keys_file=x.json"], "keys_file: expected an absolute path"),
    ):
        got = run(tmp_path, *arguments)
        assert got.returncode == 2
        [line] = got.stderr.splitlines()
        assert line.startswith("error: ")
        assert said in line
    assert not (tmp_path / "access" / "tiny.json").exists()
