"""Small files to read."""

import pytest

from cafemed.sources import reading


@pytest.fixture
def table_file(tmp_path):
    """Writes bytes or text as a file and identifies it."""

    def write(content, name="table.csv"):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return reading.identify(path)

    return write
