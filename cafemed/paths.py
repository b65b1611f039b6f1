"""Where things are: the configuration beside the code, and the one root of inputs and outputs.

The root is absolute and never under the working directory: a job submitted to a cluster runs in a
throw-away copy of the project.
"""

import os
import re
from pathlib import Path
from urllib.parse import parse_qsl

from cafemed.errors import ConfigError

_URL = re.compile(
    r"(?P<scheme>[a-z][\w+.-]*):/{1,2}(?P<host>[^/?]*)[^?]*\??(?P<options>.*)", re.I | re.S
)
#: In the name of a URL's option.
_SECRET = re.compile("secret|password|token|key|sig", re.IGNORECASE)
#: Schemes that have a container or a user, which is no secret, before the host: name@host.
_NAMED_BEFORE_HOST = ("abfs", "abfss", "hdfs")
_CREDENTIALS = dict.fromkeys(("s3", "s3a"), "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") | (
    dict.fromkeys(("gs", "gcs"), "the file that GOOGLE_APPLICATION_CREDENTIALS names")
)

PROJECT_DIR = Path(__file__).resolve().parent.parent
CONF_DIR = PROJECT_DIR / "platform" / "conf"


def resolve_root(configured: str | None) -> Path:
    """Gives the absolute root: `paths.root`, else `CAFEMED_HOME`, else `~/.cafemed`.

    A relative value is taken from the user's home, so that it means the same in a submitted job.
    """
    chosen = configured or os.environ.get("CAFEMED_HOME") or "~/.cafemed"
    path = Path(chosen).expanduser()
    return path if path.is_absolute() else Path.home() / path


def experiment_dir(root: Path, name: str) -> Path:
    """The folder that holds the stages of one experiment: tables, cohort, graph, sweep, …"""
    return root / "experiments" / name


def registry_dir(root: Path, name: str) -> Path:
    """The registry folder of one experiment's model versions, where none is configured."""
    return root / "registry" / name


def registry_of(root: Path, name: str, configured: str | None) -> Path | str:
    """The registry of one experiment: `paths.registry`/NAME, a folder or the URL of one."""
    if configured is None:
        return registry_dir(root, name)
    found = place(configured)
    if isinstance(found, str):
        return f"{found.rstrip('/')}/{name}"
    return resolve_root(str(found)) / name


def place(text: str) -> Path | str:
    """The folder that a text names, or the URL that it is; `file://` names a folder."""
    if text.startswith("file://"):
        return Path(text.removeprefix("file://"))
    return text if "://" in text else Path(text)


def require_place(text: str, key: str) -> None:
    """Refuses what is neither an absolute folder nor a URL, and a URL with secrets in it.

    Args:
        text: as it was configured.
        key: the configuration key.

    Raises:
        ConfigError: says which of the two it is.
    """
    require_no_secrets(text, key)
    found = place(text)
    if isinstance(found, Path) and not found.expanduser().is_absolute():
        raise ConfigError(f"{key}: expected an absolute folder or a URL, got {text!r}")


def require_no_secrets(url: str, key: str) -> None:
    """Refuses a URL that would bring a secret into files and messages; it is not told here either.

    Raises:
        ConfigError: if it has a user, a password or options that hold secrets.
    """
    parts = _URL.match(url)
    if parts is None:
        return
    scheme, host = parts["scheme"].lower(), parts["host"]
    user = "@" in host and (":" in host.rpartition("@")[0] or scheme not in _NAMED_BEFORE_HOST)
    options = [name for name, _ in parse_qsl(parts["options"], keep_blank_values=True)]
    # A colon before no port: a password with a slash in it.
    if user or re.search(r":(?!\d*$)", host) or any(map(_SECRET.search, options)):
        names = _CREDENTIALS.get(scheme, "the environment variables of its store")
        raise ConfigError(
            f"{key}: expected a URL without a user's name, password or key, which would get into "
            f"files and messages; put them into {names}"
        )


def cache_dir() -> Path:
    """Where copies of what lies in an object store are kept: `CAFEMED_CACHE`, else `~/.cache`.

    Its content can be removed at any time.
    """
    configured = os.environ.get("CAFEMED_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "cafemed"


def keys_file(root: Path, name: str) -> Path:
    """The file of one experiment's API keys."""
    return root / "access" / f"{name}.json"
