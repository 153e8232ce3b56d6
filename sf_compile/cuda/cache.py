"""The cubins on disk: one checksummed file per compiled kernel.

An entry is never trusted blindly (a truncated or altered file is reported and rebuilt) and never seen half
written (a temporary file in the same folder, then an atomic rename). A folder that cannot be used is
reported once and done without: the kernels are then compiled again in every process.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path

CACHE_VARIABLE = "STYLEFORGE_CACHE_DIR"
FORMAT = 1
"""Number of the entry layout and of what a digest covers; raise it when either changes."""

_MAGIC = f"sf_compile cubin {FORMAT}\n".encode()
_HASH_BYTES = hashlib.sha256().digest_size

_log = logging.getLogger(__name__)
# Process-wide, not per object: "once" in a message means once per process. Adding to a set is atomic, and the
# worst a race between two threads can do is to print a warning twice.
_unusable: set[Path | None] = set()
_damaged: set[Path] = set()


def entry_digest(parts: Iterable[bytes]) -> str:
    """Return the SHA-256, as 64 hexadecimal digits, of ``parts`` and of the cache format number.

    Every part is preceded by its length, so that moving bytes from one part to the next changes the digest.
    """
    digest = hashlib.sha256(_MAGIC)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def default_directory() -> Path | None:
    """Return the cache folder, which need not exist yet.

    ``STYLEFORGE_CACHE_DIR`` where it is set; else ``sf_compile`` in the platform's cache folder:
    ``$XDG_CACHE_HOME`` or ``~/.cache`` (Linux, XDG Base Directory Specification), ``~/Library/Caches``
    (macOS), ``%LOCALAPPDATA%`` (Windows). None where the user has no home folder to put it in.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    try:
        if chosen:
            return Path(chosen).expanduser().absolute()
        if sys.platform == "win32":
            local = os.environ.get("LOCALAPPDATA")
            return (Path(local) if local else Path.home() / "AppData" / "Local") / "sf_compile"
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "sf_compile"
        # The specification says that a relative XDG_CACHE_HOME is to be ignored.
        xdg = os.environ.get("XDG_CACHE_HOME", "")
        return (Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache") / "sf_compile"
    except RuntimeError:  # what pathlib raises for a user without a home folder
        return None


class DiskCache:
    """Payloads (bytes) by digest (hexadecimal text) in one folder.

    ``directory`` None means ``default_directory()``. The folder is created by the first ``put``. No method
    raises for what is wrong with the folder or with a file: that is reported as a warning, once, and the
    caller goes on as if the entry were not there. Safe for any number of threads and processes at once.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self.directory = default_directory() if directory is None else Path(directory)

    def path(self, digest: str) -> Path | None:
        """Return where the entry ``digest`` is kept, or None when there is no folder."""
        return None if self.directory is None else self.directory / f"{digest}.cubin"

    def get(self, digest: str) -> bytes | None:
        """Return the payload stored under ``digest``; None where there is none or it is damaged."""
        path = self.path(digest)
        if path is None:
            self._report_unusable("no home folder was found for this user")
            return None
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._report_unusable(str(error))
            return None
        start = len(_MAGIC) + _HASH_BYTES
        payload = data[start:]
        if data[:start] == _MAGIC + hashlib.sha256(payload).digest():
            return payload
        if path not in _damaged:
            _damaged.add(path)
            _log.warning("The cached kernel %s is damaged (%d bytes, wrong checksum): rebuilding it.",
                         path, len(data))
        return None

    def put(self, digest: str, payload: bytes) -> None:
        """Store ``payload`` under ``digest``, replacing what is there in one step."""
        path = self.path(digest)
        if path is None or self.directory is None or self.directory in _unusable:
            return
        # Not tempfile: its files are private to the user, and a cache folder may be shared by a group.
        temporary = path.with_name(f".{digest}.{os.getpid()}.{uuid.uuid4().hex}.tmp")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "xb") as file:
                    file.write(_MAGIC + hashlib.sha256(payload).digest() + payload)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            finally:
                with contextlib.suppress(OSError):  # gone already, unless writing or renaming failed
                    temporary.unlink()
        except OSError as error:
            self._report_unusable(str(error))

    def _report_unusable(self, reason: str) -> None:
        if self.directory in _unusable:
            return
        _unusable.add(self.directory)
        _log.warning(
            "The kernel cache folder %s cannot be used (%s), so every process compiles its kernels again. "
            "Set %s to a folder that you can write to.",
            self.directory or "(none)", reason, CACHE_VARIABLE,
        )
