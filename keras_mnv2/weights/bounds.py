"""How much a file may claim to hold, and the members of zip archives within that."""

import os
import zipfile
from pathlib import Path

# Trained numbers hardly compress: a file whose arrays are said to take much more than the file itself is none of a
# network. The allowance is for small files, in which what has no numbers weighs more.
EXPANSION = 8
ALLOWANCE = 2**20


def check_claim(claimed: int, size: int) -> None:
    """Raises `ValueError` where what a file is said to hold is far beyond it.

    Args:
        claimed: bytes of all its parts so far, once they are read.
        size: bytes of the file.
    """
    if claimed > EXPANSION * size + ALLOWANCE:
        raise ValueError(
            f"its parts would take {claimed} bytes, which is more than {EXPANSION} times the {size} it has"
        )


class Archive(zipfile.ZipFile):
    """A zip file that is read by the sizes in its headers, which are summed up and checked first.

    Attributes:
        size: bytes of the file.

    Raises:
        EOFError: where the list of members, which is the last part of a zip file, is missing.
        ValueError: where the members that were read would take far more than the file.
    """

    def __init__(self, path: Path) -> None:
        if not zipfile.is_zipfile(path):
            raise EOFError("the list at the end of its zip archive is missing")
        super().__init__(path)
        self.size = os.path.getsize(path)
        self._claimed = 0

    def member(self, name: str) -> bytearray:
        """The bytes of a member, whose checksum is checked."""
        info = self.getinfo(name)
        # The others may give more bytes than their headers say before anybody counts them.
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} is compressed by another method than zip's usual one")
        self._claimed += info.file_size
        check_claim(self._claimed, self.size)
        return bytearray(self.read(info))
