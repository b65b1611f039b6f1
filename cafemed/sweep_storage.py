"""Where a sweep's history lies: the files of a folder, or of a URL's object store."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyarrow import fs

from cafemed import artifacts


class Storage:
    """Reads and writes small JSON files; a reader sees one before or after, never half of it.

    Attributes:
        name: the folder or URL as messages have it.
        files: of pyarrow.
        root: the folder within `files`.

    Args:
        place: absolute folder, or URL (`s3://bucket/folder`, `gs://…`, `file:///…`).
    """

    def __init__(self, place: str | Path) -> None:
        self.name = str(place)
        self.files: fs.FileSystem
        self.root: str
        if "://" in self.name:
            self.files, self.root = fs.FileSystem.from_uri(self.name)
        else:
            self.files, self.root = fs.LocalFileSystem(), self.name
        if self.folder is not None:
            self.name = self.root

    @property
    def folder(self) -> Path | None:
        """The folder, where it is one of this machine's file system."""
        return Path(self.root) if isinstance(self.files, fs.LocalFileSystem) else None

    def is_at(self, other: "Storage") -> bool:
        """Says whether another one is the same place."""
        if self.folder is not None and other.folder is not None:
            return self.folder.resolve() == other.folder.resolve()
        return self.name.rstrip("/") == other.name.rstrip("/")

    def path(self, name: str) -> str:
        """A place below the storage, as `files` knows it."""
        return f"{self.root}/{name}"

    def url(self, name: str) -> str:
        """How a place below the storage is written; a URL's options stay behind it."""
        base, mark, options = self.name.partition("?")
        return f"{base}/{name}{mark}{options}"

    def has(self, name: str) -> bool:
        """Says whether there is a file of this name."""
        return bool(self.files.get_file_info(self.path(name)).type == fs.FileType.File)

    def names(self, folder: str = "") -> list[str]:
        """Names of what is in a folder; none if it is not there."""
        place = self.path(folder).rstrip("/")
        selector = fs.FileSelector(place, allow_not_found=True)
        return [info.base_name for info in self.files.get_file_info(selector)]

    def read(self, name: str) -> dict[str, Any]:
        """Reads a JSON file.

        Raises:
            OSError: if it is not there, among others.
            ValueError: if it is not JSON.
        """
        with self.files.open_input_stream(self.path(name)) as file:
            return dict(json.loads(file.read()))

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """The one function that writes.

        Raises:
            OSError: if the disk is full, among others.
        """
        text = json.dumps(content) + "\n"
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            artifacts.write_text(self.folder / name, text)
            return
        with self.files.open_output_stream(self.path(name)) as file:  # there once it is closed
            file.write(text.encode())

    def remove(self, name: str) -> None:
        """Removes a file, or a folder with all that is in it.

        Raises:
            OSError: if it cannot be removed.
        """
        info = self.files.get_file_info(self.path(name))
        if info.type == fs.FileType.Directory:
            self.files.delete_dir(info.path)
        elif info.type != fs.FileType.NotFound:
            self.files.delete_file(info.path)
