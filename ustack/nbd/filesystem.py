"""Exports for fsspec: `fsspec.open("nbd://10.77.0.1/disk")`, and with it for pandas, Dask, zarr and others.

A server is a directory, its exports are the files in it, which have a fixed size and cannot be made or removed. Needs the extra
`fsspec`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ustack.nbd.connector import ExportEntry, ask_server
from ustack.nbd.errors import NbdOptionError
from ustack.nbd.file import LoopThread, open_file
from ustack.nbd.handshake import Purpose
from ustack.nbd.uri import SCHEMES, NbdUri

if TYPE_CHECKING:
    import io

try:
    from fsspec.spec import AbstractFileSystem
except ImportError as error:
    raise ImportError("NBD exports as an fsspec filesystem need fsspec: pip install 'ustack[fsspec]'") from error


class NbdFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """NBD servers as an fsspec filesystem. Paths are whole NBD URIs. `options` are those of `ustack.nbd.connect`."""

    protocol = SCHEMES
    root_marker = ""

    def __init__(self, *args: Any, **options: Any) -> None:
        names = ("skip_instance_cache", "use_listings_cache", "listings_expiry_time", "max_paths", "asynchronous", "loop")
        super().__init__(*args, **{name: value for name, value in options.items() if name in names})
        self._options = {name: value for name, value in options.items() if name not in names}

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        # The scheme says whether TLS is demanded, and the query where the socket is: the whole URI is the path.
        return path if isinstance(path, list) else str(path)

    def unstrip_protocol(self, name: str) -> str:
        """Paths are URIs already."""
        return name

    @classmethod
    def _parent(cls, path: str) -> str:
        return str(replace(NbdUri.parse(path), export=""))

    def ls(self, path: str, detail: bool = True, **_kwargs: Any) -> list[Any]:
        """All exports of the server, or the one that `path` names."""
        uri = NbdUri.parse(path)
        if uri.export:
            entries = [self.info(path)]
        else:
            entries = [self._entry(uri, each) for each in self._ask(uri, Purpose.LIST)]
        return entries if detail else [entry["name"] for entry in entries]

    def info(self, path: str, **_kwargs: Any) -> dict[str, Any]:
        """Name, size and type of an export; a URI that names none is the directory of all."""
        uri = NbdUri.parse(path)
        if not uri.export:
            return {"name": path, "size": 0, "type": "directory"}
        try:
            (found,) = self._ask(uri, Purpose.INFO)
        except NbdOptionError as error:
            raise FileNotFoundError(error.errno, error.strerror, path) from error
        return self._entry(uri, found)

    def _ask(self, uri: NbdUri, purpose: Purpose) -> list[ExportEntry]:
        loop = LoopThread()
        try:
            return loop.run(ask_server(uri, purpose, create_connection=self._options.get("create_connection"))).exports
        finally:
            loop.stop()

    @staticmethod
    def _entry(uri: NbdUri, export: ExportEntry) -> dict[str, Any]:
        size = export.info.size if export.info is not None else None
        name = str(replace(uri, export=export.name))
        return {"name": name, "size": size, "type": "file", "description": export.description}

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,
        cache_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> io.BufferedIOBase:
        options = self._options | kwargs
        if block_size is not None:
            options["buffering"] = block_size
        return open_file(path, mode, **options)
