"""Where things are: the configuration beside the code, and the one root of inputs and outputs.

The root is absolute and never under the working directory: a job submitted to a cluster runs in a
throw-away copy of the project.
"""

import os
from pathlib import Path

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


def cache_dir() -> Path:
    """Where copies of what lies in an object store are kept: `CAFEMED_CACHE`, else `~/.cache`.

    Its content can be removed at any time.
    """
    configured = os.environ.get("CAFEMED_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "cafemed"


def keys_file(root: Path, name: str) -> Path:
    """The file of one experiment's API keys."""
    return root / "access" / f"{name}.json"
