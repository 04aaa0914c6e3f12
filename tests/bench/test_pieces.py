"""A file in pieces: split, carried one at a time, joined; what is refused."""

import shutil

import pytest

from bench.gpu import pieces
from bench.gpu.pieces import Refused, keep, main, split
from lorapar.model import locate as models

CONTENT = bytes(range(256)) * 20_000 + b"end"  # 5 MB, no multiple of a block


@pytest.fixture
def file(tmp_path):
    (tmp_path / "model.gguf").write_bytes(CONTENT)
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_pieces_brought_one_at_a_time_are_the_file(file, tmp_path, parts):
    made = split(file, tmp_path / "pieces", parts)
    assert [piece.parent.name for piece in made] == [str(n + 1) for n in range(parts)]
    assert max(piece.stat().st_size for piece in made) == -(-len(CONTENT) // parts)
    cache = tmp_path / "cache"
    # The last one first: their order does not matter.
    for number in range(parts, 0, -1):
        missing = keep(tmp_path / "pieces" / str(number), cache)
        assert missing == [f"model.gguf.part{n}of{parts}" for n in range(1, number)]
    assert (cache / "model.gguf").read_bytes() == CONTENT
    assert [path.name for path in cache.iterdir()] == ["model.gguf"]


def test_all_pieces_in_one_folder_are_joined_in_their_order(file, tmp_path):
    split(file, tmp_path / "pieces", 12)
    assert keep(tmp_path / "pieces", tmp_path / "cache") == []
    assert (tmp_path / "cache" / "model.gguf").read_bytes() == CONTENT


def test_a_missing_piece_is_named(file, tmp_path, capsys):
    split(file, tmp_path / "pieces", 3)
    shutil.rmtree(tmp_path / "pieces" / "2")
    assert main(["keep", str(tmp_path / "pieces"), str(tmp_path / "cache")]) == 0
    assert capsys.readouterr().out == "still missing: model.gguf.part2of3\n"
    assert not (tmp_path / "cache" / "model.gguf").exists()


def test_a_corrupted_piece_is_refused_and_not_kept(file, tmp_path, capsys):
    first, _ = split(file, tmp_path / "pieces", 2)
    damaged = bytearray(first.read_bytes())
    damaged[1000] ^= 1
    first.write_bytes(damaged)
    assert main(["keep", str(tmp_path / "pieces"), str(tmp_path / "cache")]) == 1
    assert f"{first}: not what its sha256 says" in capsys.readouterr().err
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_was_damaged_after_it_was_kept_is_refused_when_it_is_joined(file, tmp_path):
    split(file, tmp_path / "pieces", 2)
    keep(tmp_path / "pieces" / "1", tmp_path / "cache")
    (tmp_path / "cache" / "model.gguf.part1of2").write_bytes(b"short")
    with pytest.raises(Refused, match=r"joined, it has sha256 .*, and model.gguf.sha256 says"):
        keep(tmp_path / "pieces" / "2", tmp_path / "cache")
    assert not (tmp_path / "cache" / "model.gguf").exists()


def test_a_file_under_the_models_name_must_be_the_model(tmp_path):
    name = models.ALIAS_MEMBER.rsplit("/", 1)[-1]
    (tmp_path / name).write_bytes(CONTENT)
    split(tmp_path / name, tmp_path / "pieces", 2)
    with pytest.raises(Refused, match=f"and lorapar says {models.ALIAS_SHA256}"):
        keep(tmp_path / "pieces", tmp_path / "cache")
    assert not (tmp_path / "cache" / name).exists()


def test_no_piece_and_too_many_parts_are_refused(file, tmp_path):
    with pytest.raises(Refused, match="no piece"):
        keep(tmp_path, tmp_path / "cache")
    with pytest.raises(Refused, match="--parts: got 0"):
        split(file, tmp_path / "pieces", 0)
    assert pieces.main(["split", str(tmp_path / "none"), str(tmp_path)]) == 1
