"""Made-up hospitals, clusters of several nodes, the real demo tables, and a browser."""

import atexit
import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis
import pytest

from cafemed import paths

# As `make test` sets it, for those who call pytest: small products on many threads mostly wait for
# each other, and one thread gives the same bits as the processes under test.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# As `causal.cluster` sets it, for the tests' own clusters: Dask's profiler may hang a process.
os.environ.setdefault("DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED", "False")

# Property tests draw the same examples every time.
hypothesis.settings.register_profile("seeded", derandomize=True)
hypothesis.settings.load_profile("seeded")

# A shell's background job ignores Ctrl-C, and so would every process that a test starts there.
signal.signal(signal.SIGINT, signal.default_int_handler)

# One cache of compiled kernels for all tests and the processes they start, whatever root a test
# gives them: it is named after the kernels' text, so it can only hit the same code.
os.environ.setdefault("NUMBA_CACHE_DIR", str(paths.resolve_root(None) / "cache" / "numba"))


_STATUS = pytest.StashKey[int]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Keeps the status for `pytest_unconfigure`."""
    session.config.stash[_STATUS] = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Ends the process once all is reported and what registered to run at its end has run.

    Native threads of Ray, gRPC and Arrow may outlive what Python takes down after that: a suite in
    which every test had passed once ended with a segmentation fault there.
    """
    status = config.stash.get(_STATUS, None)
    if status is not None and not hasattr(config, "workerinput"):  # of xdist
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


_TOKEN = os.environ.get("RAY_AUTH_TOKEN")


@pytest.fixture(autouse=True)
def _no_token_is_left() -> Iterator[None]:
    """No test starts a Ray with a token in this process: later ones could start none without.

    Ray reads mode and token once in a process's life. What starts Ray here sets RAY_AUTH_MODE to
    "disabled"; tokens are for processes and clusters that a test starts.
    """
    yield
    if os.environ.get("RAY_AUTH_TOKEN") != _TOKEN:
        os.environ.pop("RAY_AUTH_TOKEN")
        pytest.fail("a Ray with a token was started in this process; set RAY_AUTH_MODE=disabled")


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def hospitals() -> ModuleType:
    """The module hospitals.py: drawn MIMIC-III and MIMIC-IV tables of a few patients."""
    return _module("hospitals")


@pytest.fixture(scope="session")
def ray_nodes() -> ModuleType:
    """The module ray_nodes.py: clusters of several nodes on this machine."""
    return _module("ray_nodes")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the MIMIC-III demo and drug tables; skips where there is none."""
    folder = Path(os.environ.get("CAFEMED_DATA", paths.PROJECT_DIR.parent / "shared" / "data"))
    if not (folder / "mimic3-demo").is_dir():
        pytest.skip(f"no MIMIC-III demo in {folder}; CAFEMED_DATA names the folder that holds it")
    return folder


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of a bucket of a real S3 server; skips where there is none."""
    with _module("s3_server").bucket() as url:
        yield url


@pytest.fixture(scope="session")
def certificates() -> ModuleType:
    """The module certificates.py: certificates that sign themselves."""
    return _module("certificates")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A Browser of the module browsers.py; skips where there is none."""
    with _module("browsers").opened(tmp_path) as opened:
        yield opened
