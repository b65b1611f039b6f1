"""The layout's rules: what imports what, and names that would hide the standard library."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("cafemed", "causal", "models", "serve")
# Package → the project's packages that it may import.
MAY_IMPORT = {
    "cafemed": {"cafemed"},
    "causal": {"causal", "cafemed"},
    "models": {"models", "cafemed"},
    "serve": {"serve", "models", "cafemed"},
    "jobs": {"cafemed", "causal", "models", "serve"},
}
# Import name → distribution, where the two differ.
DISTRIBUTION = {
    "yaml": "pyyaml",
    "hydra": "hydra-core",
    "omegaconf": "hydra-core",
    "grpc": "grpcio",
    "mlflow": "mlflow-skinny",
}


def python_files(folder: str) -> list[Path]:
    return sorted((PROJECT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


def project_table() -> dict[str, list[str]]:
    return tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]


def locked() -> dict[str, str]:
    lines = (PROJECT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[^\s;+]+", pin) for pin in pins), "not exact pins"
    return {canonicalize_name(pin.split("==")[0]): pin.split("==")[1] for pin in pins}


def test_platform_folder_holds_no_python():
    assert python_files("platform") == []


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_go_one_way(folder: str):
    ours = {*PACKAGES, "jobs", "tests", "benchmarks"}
    for path in python_files(folder):
        assert imported(path) & ours <= MAY_IMPORT[folder], path


def test_every_third_party_import_is_declared():
    project = project_table()
    extras = project["optional-dependencies"]  # type: ignore[index]
    for_users = [*project["dependencies"], *extras["molecules"], *extras["tracking"]]
    declared = {canonicalize_name(Requirement(r).name) for r in for_users}
    for folder in MAY_IMPORT:
        for path in python_files(folder):
            for name in imported(path) - set(sys.stdlib_module_names) - set(PACKAGES):
                assert canonicalize_name(DISTRIBUTION.get(name, name)) in declared, (path, name)


def test_every_package_folder_is_listed_for_installation():
    listed = set(
        tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    found = {
        str(path.parent.relative_to(PROJECT)).replace("/", ".")
        for package in PACKAGES
        for path in (PROJECT / package).rglob("__init__.py")
    }
    assert listed == found


def test_every_other_file_of_a_package_is_installed_with_it():
    listed = tomllib.loads((PROJECT / "pyproject.toml").read_text())["tool"]["setuptools"]
    for package in PACKAGES:
        others = {
            str(path.relative_to(PROJECT / package))
            for path in (PROJECT / package).rglob("*")
            if path.suffix in {".html", ".css", ".js"}
        }
        assert others <= set(listed["package-data"].get(package, [])), package


def test_lock_file_is_exact_and_satisfies_pyproject():
    pins = locked()
    assert pins["torch"] == "2.13.0"
    project = project_table()
    extras = project["optional-dependencies"]  # type: ignore[index]
    wanted = [*project["dependencies"], *extras["dev"]]
    wanted += [*extras["molecules"], *extras["tracking"]]
    for line in wanted:
        requirement = Requirement(line)
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, line


def test_no_folder_or_job_hides_another_module():
    taken = set(sys.stdlib_module_names) - {"platform"} | set(PACKAGES) | set(locked())
    names = [path.stem for path in python_files("jobs")]
    assert not taken & set(names)
    hidden = {p.name for p in PROJECT.iterdir() if (p / "__init__.py").is_file()}
    assert not hidden & set(sys.stdlib_module_names)
    assert not list((PROJECT / "tests").rglob("__init__.py"))


def test_jobs_are_executable_and_imported_by_nobody():
    for path in python_files("jobs"):
        assert path.read_text().startswith("#!/usr/bin/env python3\n"), path
        assert path.stat().st_mode & 0o111, path
    for folder in (*MAY_IMPORT, "tests", "benchmarks"):
        for path in python_files(folder):
            assert "jobs" not in imported(path), path
