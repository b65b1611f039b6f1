"""Reading files that somebody else may have made: nothing runs, and little memory is asked for.

What a file says of itself (rows, shapes, sizes) is held against what it has before anything is
read: a few kilobytes can otherwise stand for terabytes.
"""

import contextlib
import json
import math
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.lib import format as npy
from numpy.typing import NDArray

from cafemed.errors import ArtifactError

#: Bytes of all arrays of an archive, unpacked.
MAX_ARRAY_BYTES = 1 << 30
#: Of a record of the registry, or a card: who and when, and some numbers.
MAX_RECORD_BYTES = 16 << 20
#: Of a table: rows, and bytes of the file. What it is packed with unpacks to at most 21 times that.
MAX_ROWS = 10_000_000
MAX_TABLE_BYTES = 64 << 20
MAX_TABLE_COLUMNS = 64

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_CODECS = {"SNAPPY", "UNCOMPRESSED"}

#: What reading a damaged or strange file may raise.
STRANGE = (
    pa.ArrowException,
    OSError,
    KeyError,
    IndexError,
    ValueError,
    TypeError,
    AttributeError,
    EOFError,
    OverflowError,
    RuntimeError,  # a member that is encrypted or packed in a strange way; nested too deeply
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)


def require_encodable(name: str, text: str) -> None:
    r"""Refuses JSON with text that is not UTF-8: "\ud800" is read, but can never be answered.

    Raises:
        ArtifactError: if it has any.
    """
    if not _SURROGATE.search(text):
        return
    try:
        json.dumps(json.loads(text), ensure_ascii=False).encode()
    except UnicodeEncodeError as err:
        raise ArtifactError(f"{name}: has text that is not UTF-8 (half a surrogate pair)") from err
    except (ValueError, RecursionError):
        return  # no JSON, as its reader will say


def read_json(path: Path, max_bytes: int) -> Any:
    """Reads a JSON file.

    Raises:
        ArtifactError: if it is too large, nested too deeply, or no JSON.
    """
    require_size(path, max_bytes)
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError) as err:
        raise ArtifactError(f"{path}: not JSON ({type(err).__name__})") from err


def require_size(path: Path, max_bytes: int) -> None:
    """Refuses a file over a size.

    Raises:
        ArtifactError: if it is.
    """
    size = path.stat().st_size
    if size > max_bytes:
        raise ArtifactError(f"{path}: expected at most {max_bytes >> 20} MiB, found {size >> 20}")


@contextlib.contextmanager
def open_arrays(path: Path) -> Iterator[Any]:
    """Opens an npz archive, as numpy.load does, once every member was seen to hold its array.

    Raises:
        ArtifactError: if a member is no array of plain values of the size it has, or if all of
            them together are over MAX_ARRAY_BYTES.
    """
    with path.open("rb") as file:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > MAX_ARRAY_BYTES:
                raise ArtifactError(
                    f"{path}: expected at most {MAX_ARRAY_BYTES >> 20} MiB of arrays"
                )
            for member in members:
                with archive.open(member) as content:
                    _require_whole(path, member, content)
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            yield arrays


def _require_whole(path: Path, member: zipfile.ZipInfo, content: Any) -> None:
    version = npy.read_magic(content)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(content)
    if dtype.hasobject:
        raise ArtifactError(f"{path}: {member.filename}: expected plain values, got objects")
    held = member.file_size - content.tell()
    if math.prod(shape) * dtype.itemsize != held:  # of Python's integers, which do not wrap around
        raise ArtifactError(f"{path}: {member.filename}: expected an array of {held} bytes")


def read_table(path: Path, max_rows: int = MAX_ROWS) -> pa.Table:
    """Reads a Parquet file; text stays in dictionaries, so that it takes no more than it did there.

    Raises:
        ArtifactError: if it has too many rows or bytes, is packed with what unpacks to any size,
            or is of nested columns.
    """
    require_size(path, MAX_TABLE_BYTES)
    with pq.ParquetFile(path) as file:
        found = file.metadata
        if found.num_rows > max_rows or found.num_row_groups > max(1, max_rows):
            raise ArtifactError(f"{path}: expected at most {max_rows} rows, found {found.num_rows}")
        if found.num_columns > MAX_TABLE_COLUMNS:
            raise ArtifactError(f"{path}: expected at most {MAX_TABLE_COLUMNS} columns")
        text = []
        for i in range(found.num_columns):
            column = file.schema.column(i)
            if column.max_repetition_level or "." in column.path:
                raise ArtifactError(f"{path}: {column.name}: expected a column that is not nested")
            if column.physical_type == "BYTE_ARRAY":
                text.append(column.name)
        for group in range(found.num_row_groups):
            for i in range(found.num_columns):
                codec = found.row_group(group).column(i).compression
                if codec not in _CODECS:
                    raise ArtifactError(f"{path}: expected it packed with Snappy, got {codec}")
    return pq.read_table(path, read_dictionary=text)


def labels(column: pa.ChunkedArray) -> tuple[list[str], NDArray[np.int64]]:
    """The distinct texts of a column that `read_table` read, and the position of each row's.

    Raises:
        ValueError: if it is no text, or a row has none.
    """
    if not pa.types.is_dictionary(column.type) or column.null_count:
        raise ValueError("expected a text in every row")
    whole = column.unify_dictionaries().combine_chunks()
    whole = pa.concat_arrays(whole.chunks) if isinstance(whole, pa.ChunkedArray) else whole
    texts: list[str] = whole.dictionary.cast(pa.string()).to_pylist()
    return texts, np.asarray(whole.indices.to_numpy(), np.int64)
