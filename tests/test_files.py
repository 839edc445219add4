"""Files: whole or not at all, lines that were torn off, disks that are full."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from torchcam._files import append_lines, atomic_write, write_all


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Let no file of this process grow beyond a number of bytes, as on a disk that is full."""
    resource = pytest.importorskip("resource", reason="needs a system with limits on files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestAtomicWrite:
    def test_a_full_disk_leaves_the_old_file(self, tmp_path: Path) -> None:
        path = tmp_path / "new" / "file.txt"
        message = r"free some or write elsewhere: '.*file\.txt'"
        with pytest.raises(OSError, match=message), full_disk(100), atomic_write(path) as part:
            part.write_bytes(b"x" * 101)
        assert list(tmp_path.iterdir()) == []
        path.parent.mkdir()
        path.write_bytes(b"old")
        with pytest.raises(OSError, match="free some"), full_disk(100), atomic_write(path) as part:
            part.write_bytes(b"x" * 101)
        assert [one.read_bytes() for one in path.parent.iterdir()] == [b"old"]

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    def test_other_kinds_of_full(self, number: int, tmp_path: Path) -> None:
        with pytest.raises(OSError, match=r"free some .*: '.*file'") as caught, atomic_write(tmp_path / "file"):
            raise OSError(number, "No space left on device")
        assert caught.value.errno == number

    def test_other_errors_stay_what_they_are(self, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="broken") as caught, atomic_write(tmp_path / "file"):
            raise OSError(errno.EIO, "broken")
        assert caught.value.filename is None


class TestAppendLines:
    @pytest.mark.parametrize(
        ("before", "after"),
        [
            (b"", b"c\n"),
            (b"a\nb\n", b"a\nb\nc\n"),
            (b"a\nb", b"a\nc\n"),
            (b"a\n\xe2\x82", b"a\nc\n"),
            (b"a", b"c\n"),
        ],
    )
    def test_a_torn_line_is_dropped(self, before: bytes, after: bytes, tmp_path: Path) -> None:
        path = tmp_path / "table"
        path.write_bytes(before)
        append_lines(path, "c\n")
        assert path.read_bytes() == after

    def test_all_lines_or_none_on_a_full_disk(self, tmp_path: Path) -> None:
        path = tmp_path / "table"
        path.write_bytes(b"a\n" * 40)
        with pytest.raises(OSError, match=r"free some .*: '.*table'"), full_disk(100):
            append_lines(path, "b\n" * 30)
        assert path.read_bytes() == b"a\n" * 40
        append_lines(path, "b\n" * 30)
        assert path.read_bytes() == b"a\n" * 40 + b"b\n" * 30

    def test_a_disk_that_takes_a_few_bytes_at_a_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Slow(FileIO):
            def write(self, content: Any) -> int:
                return super().write(content[:3])

        path = tmp_path / "table"
        with Slow(path, "w") as file:
            write_all(file, b"0123456789")
        assert path.read_bytes() == b"0123456789"
