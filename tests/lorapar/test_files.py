"""Every artefact is written whole or not at all, and a reader says which file is damaged."""

import errno
import os
import stat
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorapar import InputError
from lorapar import files as artefacts
from lorapar.files import (
    atomic_folder,
    disk_is_full,
    load_tensors,
    read_json,
    read_jsonl,
    remove_left_over,
    save_tensors,
    why_not_whole,
    write_json,
    write_jsonl,
    write_text,
)

WRITERS = {
    "text": lambda path: write_text(path, "new"),
    "json": lambda path: write_json(path, {"new": 1}),
    "jsonl": lambda path: write_jsonl(path, [{"new": 1}]),
    "tensors": lambda path: save_tensors(path, {"t": torch.arange(6)}, {"new": 1}),
}


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(kind: str, moment: str, tmp_path: Path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    with monkeypatch.context() as patched:
        patched.setattr(os, moment, no_space)
        with pytest.raises(InputError, match=r"file: the disk is full; free some space"):
            WRITERS[kind](path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    WRITERS[kind](path)
    assert path.read_bytes() != b"old"


@pytest.mark.parametrize("kind", WRITERS)
def test_any_other_failure_is_passed_on_and_leaves_the_old_file(kind: str, tmp_path: Path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="broken"):
        WRITERS[kind](path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_flush_on_windows_is_of_a_file_open_for_writing(tmp_path: Path, monkeypatch):
    import fcntl

    def fsync(handle: int) -> None:
        """As Windows does."""
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(os, "fsync", fsync)
    for write in WRITERS.values():
        write(tmp_path / "file")
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "one").write_text("1")
    assert (tmp_path / "folder" / "one").exists()


def test_line_ends_do_not_depend_on_the_system(tmp_path: Path, monkeypatch):
    real = open

    def windows_open(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **options):
        """Writes "\\r\\n" for "\\n" where it is not told otherwise."""
        if newline is None and mode in ("w", "a", "x"):
            newline = "\r\n"
        return real(file, mode, buffering, encoding, errors, newline, **options)

    monkeypatch.setattr("io.open", windows_open)
    monkeypatch.setattr("builtins.open", windows_open)
    write_text(tmp_path / "text", "a\nb\r\n")
    write_jsonl(tmp_path / "rows", [{"a": 1}])
    assert (tmp_path / "text").read_bytes() == b"a\nb\r\n"
    assert (tmp_path / "rows").read_bytes() == b'{"a": 1}\n'


def test_a_row_that_cannot_be_written_leaves_no_half_file(tmp_path: Path):
    def rows():
        yield {"a": 1}
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_jsonl(tmp_path / "rows.jsonl", rows())
    assert os.listdir(tmp_path) == []


def test_files_have_the_permissions_that_the_umask_says(tmp_path: Path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
        with atomic_folder(tmp_path / "folder") as temporary:
            (temporary / "x").write_text("x")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o750


def test_a_folder_is_replaced_as_a_whole_or_stays(tmp_path: Path):
    folder = tmp_path / "folder"
    with atomic_folder(folder) as temporary:
        (temporary / "one").write_text("1")
    with pytest.raises(RuntimeError, match="stop"), atomic_folder(folder) as temporary:  # noqa: PT012
        (temporary / "two").write_text("2")
        raise RuntimeError("stop")
    assert os.listdir(folder) == ["one"]
    with pytest.raises(InputError, match="the disk is full"), atomic_folder(folder):
        no_space()
    assert os.listdir(folder) == ["one"]
    with atomic_folder(folder) as temporary:
        (temporary / "three").write_text("3")
    assert os.listdir(folder) == ["three"]
    assert os.listdir(tmp_path) == ["folder"]


def test_a_disk_is_asked_before_the_folder_that_fills_it_is_cleared_away(tmp_path: Path, monkeypatch):
    """NumPy's tofile gives no error number, and afterwards the disk has room again."""
    usage = artefacts.shutil.disk_usage(tmp_path)

    def free(_: object):
        return usage._replace(free=1000 if list(tmp_path.glob(".folder.*.tmp")) else 1 << 40)

    monkeypatch.setattr(artefacts.shutil, "disk_usage", free)
    with pytest.raises(InputError, match="folder: the disk is full"), atomic_folder(tmp_path / "folder"):
        raise OSError("4096 requested and 3888 written")
    assert os.listdir(tmp_path) == []


def test_only_our_left_overs_are_removed(tmp_path: Path):
    (tmp_path / "sft").mkdir()
    for name in (".labels.jsonl.ab12.tmp", "sft/.lorapar.json.x.tmp", "mine.tmp", ".hidden", "sft/.keep"):
        (tmp_path / name).write_text("")
    (tmp_path / ".adapter.abc.tmp").mkdir()
    (tmp_path / ".adapter.abc.tmp" / "half").write_text("")
    remove_left_over(tmp_path)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == [".hidden", "mine.tmp", "sft", "sft/.keep"]


def test_tensors_come_back_with_their_metadata_and_equal_ones_are_equal_files(tmp_path: Path):
    tensors = {"b": torch.randn(3, 4).T, "a": torch.arange(5), "c": torch.zeros(0), "d": torch.tensor(1.5).bfloat16()}
    for name in ("one", "two"):
        save_tensors(tmp_path / name, tensors, {"theta": 0.9, "names": ["x"]})
    back, metadata = load_tensors(tmp_path / "one")
    assert metadata == {"theta": 0.9, "names": ["x"]}
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_tensors_that_were_read_do_not_hold_their_file(tmp_path: Path):
    """Windows refuses to replace a file that is mapped into memory."""
    save_tensors(tmp_path / "scores", {"t": torch.zeros(1000)}, {})
    tensors, _ = load_tensors(tmp_path / "scores")
    assert str(tmp_path / "scores") not in Path("/proc/self/maps").read_text()
    assert tensors["t"].numel() == 1000


def test_every_truncation_and_every_flipped_bit_of_a_tensor_file_is_noticed(tmp_path: Path):
    path = tmp_path / "t.safetensors"
    save_tensors(path, {"t": torch.arange(8, dtype=torch.float32)}, {"theta": 0.9})
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"t\.safetensors: corrupt or truncated safetensors"):
            load_tensors(path)
    for position in range(len(whole) - 32, len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(InputError, match=r"t\.safetensors: corrupt: its tensors do not give the sha256"):
            load_tensors(path)


def test_a_tensor_file_of_someone_else_or_none_is_refused(tmp_path: Path):
    save_file({"t": torch.zeros(1)}, tmp_path / "t.safetensors")
    with pytest.raises(InputError, match="not an artefact of lorapar"):
        load_tensors(tmp_path / "t.safetensors")
    with pytest.raises(InputError, match="no such file"):
        load_tensors(tmp_path / "gone")


def test_rows_come_back_whatever_they_hold(tmp_path: Path):
    rows = [{"text": "a\u2028b\nc\r\n\x85é😀", "n": None, "list": [1, {"x": "y"}]}, {"text": ""}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert read_jsonl(tmp_path / "rows.jsonl") == rows


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"a": 1}\n{"a": ', "line 2 is corrupt or truncated JSON"),
        (b"", "line 1 is corrupt or truncated JSON"),
        (b'{"a": 1}\n\n{"a": 2}\n', "line 2 is corrupt or truncated JSON"),
        (b"[1]\n", "line 1 is not an object of columns but list"),
        (b'{"a": "\xff"}\n', "not a UTF-8 text file"),
    ],
)
def test_a_damaged_row_is_named_by_its_line(data: bytes, says: str, tmp_path: Path):
    (tmp_path / "rows.jsonl").write_bytes(data)
    with pytest.raises(InputError, match=says):
        read_jsonl(tmp_path / "rows.jsonl")


def test_json_that_is_damaged_missing_or_a_folder(tmp_path: Path):
    (tmp_path / "x.json").write_text('{"a": ')
    for path, says in (("x.json", "corrupt or truncated JSON"), ("gone", "no such file"), (".", "cannot be read")):
        with pytest.raises(InputError, match=says):
            read_json(tmp_path / path)


def test_what_is_wrong_with_a_file_of_a_checkpoint(tmp_path: Path):
    write_json(tmp_path / "a.json", {})
    torch.save({"x": torch.zeros(100)}, tmp_path / "b.pt")
    save_file({"x": torch.zeros(100)}, tmp_path / "c.safetensors")
    for name in ("a.json", "b.pt", "c.safetensors"):
        path = tmp_path / name
        assert why_not_whole(path) is None
        os.truncate(path, path.stat().st_size - 1 - 2 * (name == "a.json"))
        assert str(why_not_whole(path)).startswith(f"{name} is corrupt or truncated")
        path.unlink()
        assert why_not_whole(path) == f"{name} is missing"


def test_a_full_disk_is_told_from_other_failures(tmp_path: Path, monkeypatch):
    assert disk_is_full(OSError(errno.ENOSPC, "x"), tmp_path)
    assert disk_is_full(RuntimeError("I/O error: No space left on device (os error 28)"), tmp_path)
    assert not disk_is_full(OSError(errno.EIO, "x"), tmp_path)
    assert not disk_is_full(None, tmp_path)
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = OSError(errno.EDQUOT, "x")
    assert disk_is_full(wrapped, tmp_path)
    # torch.save and NumPy do not say why, so the disk is asked.
    torchs = [RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
              RuntimeError("basic_ios::clear: iostream error"), OSError("4096 requested and 3888 written")]  # fmt: skip
    assert not any(disk_is_full(error, tmp_path) for error in torchs)
    usage = artefacts.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(artefacts.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert all(disk_is_full(error, tmp_path) for error in torchs)
