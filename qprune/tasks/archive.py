"""Files out of an archive, read into memory: nothing is extracted, and an archive that could do harm elsewhere is refused whole."""

from __future__ import annotations

import gzip
import hashlib
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from .order import DataError

MAX_MEMBERS = 100
MOST_ENDS = 8
MARGIN = 2**20
"""Of bytes beside the wanted ones: headers, and files like a readme."""


class _Limited:
    """An unpacked stream that ends in a DataError after `limit` bytes, so that a small file cannot become a huge one, and in an EOFError
    when it is read on and on behind its end: tarfile passes over what a header announces block by block, whether it is there or not."""

    def __init__(self, file: Any, path: Path, limit: int) -> None:
        self.file, self.path, self.left, self.ends = file, path, limit, 0

    def read(self, size: int) -> bytes:
        content: bytes = self.file.read(size)
        self.left -= len(content)
        self.ends += not content
        if self.ends > MOST_ENDS:
            raise EOFError("it ends before a member does")
        if self.left < 0:
            raise DataError(f"{self.path} unpacks to far more than the data set has; it was not made by the data set's authors")
        return content


def read_members(path: Path, wanted: Mapping[str, int]) -> dict[str, bytes]:
    """{name: content} of the members `wanted` of a .tar.gz, which maps their names to the most bytes that they may have.

    Raises DataError for an archive that is damaged, lacks one of them, has one twice or too large, or holds absolute names, names with
    "..", links or devices, more than a hundred members, or unpacks to more than twice what is wanted.
    """
    found: dict[str, bytes] = {}
    largest = sum(wanted.values())
    try:
        with gzip.open(path) as unpacked:
            limited: Any = _Limited(unpacked, path, 2 * largest + MARGIN)
            archive = tarfile.open(fileobj=limited, mode="r|")  # noqa: SIM115 - it owns nothing that needs closing
            for number, member in enumerate(archive):
                name = _checked(path, member)
                if number >= MAX_MEMBERS:
                    raise DataError(f"{path} has more than {MAX_MEMBERS} members; expected {', '.join(wanted)}")
                if name not in wanted:
                    continue
                if member.size > wanted[name]:
                    raise DataError(f"{path}: member {name} has {member.size} bytes, at most {wanted[name]} expected")
                if name in found:
                    raise DataError(f"{path} holds {name} twice")
                file = archive.extractfile(member)
                if file is None:
                    raise DataError(f"{path}: member {name} is no file")
                found[name] = file.read()
            while limited.read(2**20):  # to the end, where the checksum is
                pass
    except DataError:
        raise
    # tarfile converts numbers in headers without a look at them
    except (tarfile.TarError, zlib.error, EOFError, OSError, ValueError, TypeError, LookupError, OverflowError) as error:
        raise DataError(f"{path} cannot be read as an archive: {error or type(error).__name__}; copy it here again") from error
    missing = [name for name in wanted if name not in found]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}")
    return found


def _checked(path: Path, member: tarfile.TarInfo) -> str:
    """The member's name without a leading "./"."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\\" in member.name:
        raise DataError(f"{path}: member {member.name!r} points out of the archive; it was not made by the data set's authors")
    if not (member.isreg() or member.isdir()):
        raise DataError(f"{path}: member {member.name!r} is a link or a device; only files and folders are expected")
    return str(name)


def check_md5(path: Path, expected: str) -> None:
    """Raises DataError for a file with another MD5 sum. It tells a damaged download from a whole one, not a forged one."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    found = digest.hexdigest()
    if found != expected:
        raise DataError(f"{path} has MD5 {found}, expected {expected}; copy it here again")
