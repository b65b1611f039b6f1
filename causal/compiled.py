"""Compiles the kernels of this package and keeps the machine code under the project's root.

Numba's own rule ties its cache to the path of the source file, but a job that was submitted to a
cluster runs from a new path each time. Here the folder is named after the text of all kernel
modules, so that the same code hits the same cache from any path, and a change in any of them (Numba
looks at one file only) never meets stale machine code.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba import extending
from numba.core import caching, types
from numba.experimental import structref

from cafemed import paths

Function = TypeVar("Function", bound=Callable[..., Any])
Record = TypeVar("Record")

_OPTIONS: dict[str, Any] = {"fastmath": {"contract"}, "error_model": "numpy"}

#: Modules whose functions are compiled together; each may call into the ones before it.
KERNEL_MODULES = (
    "scores",
    "pdag",
    "problem",
    "gaussian",
    "tables",
    "families",
    "scoring",
    "pool",
    "candidates",
    "restrictions",
    "search",
)


def cache_dir() -> Path:
    """Where machine code is kept: `NUMBA_CACHE_DIR` if set, else `<root>/cache/numba`.

    The root is `CAFEMED_HOME` or `~/.cafemed`; a job that was given another one sets
    `CAFEMED_HOME`, which Dask's and Ray's processes inherit.
    """
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    return Path(chosen) if chosen else paths.resolve_root(None) / "cache" / "numba"


@cache
def _code_digest() -> str:
    folder = Path(__file__).parent
    digest = hashlib.sha256(numba.__version__.encode())
    for name in KERNEL_MODULES:
        digest.update((folder / f"{name}.py").read_bytes())
    return digest.hexdigest()[:16]


@cache
def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


class _Locator:
    """What Numba asks of a cache locator, with the folder and the stamp taken from the code."""

    def __init__(self, name: str) -> None:
        self._name = name

    def get_cache_path(self) -> str:
        return str(cache_dir() / _code_digest())

    def ensure_cache_path(self) -> None:
        Path(self.get_cache_path()).mkdir(parents=True, exist_ok=True)

    def get_source_stamp(self) -> str:
        return _code_digest()

    def get_disambiguator(self) -> str:
        return self._name


class _CacheImpl(caching.CompileResultCacheImpl):
    def __init__(self, py_func: Callable[..., Any]) -> None:
        name = f"{py_func.__module__}.{py_func.__qualname__}"
        self._lineno = py_func.__code__.co_firstlineno
        self._locator = _Locator(name)
        self._filename_base = self.get_filename_base(name, "")  # type: ignore[no-untyped-call]


class _Cache(caching.FunctionCache):
    _impl_class = _CacheImpl


class Reference(types.StructRef):
    """A record of arrays that kernels pass by one pointer.

    A named tuple of arrays is flattened into hundreds of arguments at each call, which made the
    compiler twenty times slower; so an entry kernel turns the tuples it is given into these.
    """

    def preprocess_fields(self, fields: Any) -> Any:
        return tuple((name, types.unliteral(kind)) for name, kind in fields)  # type: ignore[no-untyped-call]


def reference(record: type[Record], kind: type[Reference]) -> type[Record]:
    """What a kernel calls with a record's fields to get a reference to them."""
    constructor: Any = type(f"{record.__name__}Reference", (), {})
    fields = list(record._fields)  # type: ignore[attr-defined]
    structref.define_constructor(constructor, structref.register(kind), fields)  # type: ignore[no-untyped-call]
    result: type[Record] = constructor
    return result


def _plain(kind: Any) -> Any:
    """Literals and all widths of whole numbers become int64, so that a kernel is compiled once."""
    kind = types.unliteral(kind)  # type: ignore[no-untyped-call]
    return types.int64 if isinstance(kind, types.Integer) else kind


def inlined(function: Function) -> Function:
    """A kernel with one caller, compiled as part of it rather than once more by itself."""
    result: Function = numba.njit(inline="always", **_OPTIONS)(function)
    return result


def kernel(function: Function) -> Function:
    """Compiles a function when it is first called; kernels call each other, Python none of them."""
    return _compiled(function, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def one_of(stub: Function, choices: dict[type[Reference], Any]) -> None:
    """Has kernels that call `stub` call the choice that fits the type of its first argument.

    Args:
        stub: a function with the choices' arguments, whose body is never used.
        choices: kernels by the type of record that they take first.
    """
    options: Any = {**_OPTIONS, "no_cpython_wrapper": True}
    extending.overload(stub, jit_options=options, strict=False)(
        lambda record, *_: next(
            kernel.py_func for kind, kernel in choices.items() if isinstance(record, kind)
        )
    )


def _compiled(function: Function, **options: Any) -> Function:
    compiled: Any = numba.njit(**_OPTIONS, **options)(function)
    find = compiled.get_call_template
    compiled.get_call_template = lambda args, kws: find(tuple(map(_plain, args)), kws)
    result: Function = compiled
    return result


def cached_kernel(function: Function) -> Function:
    """A kernel that Python calls: its machine code is read from `cache_dir()` if it is there."""
    compiled: Any = _compiled(function, no_cfunc_wrapper=True)
    if _writable(cache_dir() / _code_digest()):
        compiled._cache = _Cache(function)  # type: ignore[no-untyped-call]
    result: Function = compiled
    return result
