"""Files as people have them: packed, under other suffixes, in folders, with other separators; and what is refused."""

import csv
import gzip
import json
from pathlib import Path

import pyarrow
import pytest
from datasets import Dataset, DatasetDict

from lorapar.data.sources import read_source
from lorapar.data.tables import local_files, read_table
from lorapar.errors import InputError
from lorapar.recipe.sections import SourceConfig

ROWS = [{"prompt": f"Add {i} and 1, é", "completion": str(i + 1)} for i in range(4)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)
TABLE = "prompt,completion\n" + "".join(f'"{row["prompt"]}",{row["completion"]}\n' for row in ROWS)


def read(name: object, **settings) -> list[dict]:
    return [row for _, row in read_source(SourceConfig(str(name), **settings))]


def error_of(name: object, **settings) -> str:
    with pytest.raises(InputError) as caught:
        read(name, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def packed(text: str, compression: str) -> bytes:
    return pyarrow.compress(text.encode(), codec=compression, asbytes=True)


FILES = {
    "rows.JSONL": LINES.encode(),
    "rows.ndjson": LINES.encode(),
    "rows.jsonl.gz": gzip.compress(LINES.encode()),
    "rows.JSON.GZ": gzip.compress(json.dumps(ROWS).encode()),
    "rows.csv.gz": gzip.compress(TABLE.encode()),
    "rows.jsonl.zst": packed(LINES, "zstd"),
    "rows.csv": TABLE.encode(),
    "bom.csv": b"\xef\xbb\xbf" + TABLE.replace("\n", "\r\n").encode(),
    "semicolon.csv": TABLE.replace('",', '";').replace("prompt,", "prompt;").encode(),
    "tabs.csv": TABLE.replace('",', '"\t').replace("prompt,", "prompt\t").encode(),
    "said.csv": b"sep=;\n" + TABLE.replace('",', '";').replace("prompt,", "prompt;").encode(),
    "rows.tsv": TABLE.replace('",', '"\t').replace("prompt,", "prompt\t").encode(),
    "array.jsonl": json.dumps(ROWS, indent=2).encode(),
    "lines.json": LINES.encode(),
    "indented.json": json.dumps(ROWS, indent=2).encode(),
    "under_a_key.json": json.dumps({"version": "1", "data": ROWS}).encode(),
    "blank_lines.jsonl": b"\xef\xbb\xbf\n \n" + LINES.replace("\n", "\r\n\n").encode() + b"   \n",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_whatever_it_is_called_and_packed_in(name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(FILES[name])
    assert read(tmp_path / name) == ROWS


def test_columnar_files(tmp_path: Path):
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.PARQUET")
    assert read(tmp_path / "rows.PARQUET") == ROWS
    table = pyarrow.Table.from_pylist(ROWS)
    for name, writer in (("stream.arrow", pyarrow.ipc.new_stream), ("file.arrow", pyarrow.ipc.new_file)):
        with writer(str(tmp_path / name), table.schema) as out:
            out.write_table(table)
        assert read(tmp_path / name) == ROWS


def test_one_row_and_one_chat_are_rows_not_tables(tmp_path: Path):
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    tools = {"tools": [{"name": "f"}]}
    for row in (
        chat,
        ROWS[0],
        {**chat, **tools},
        {**ROWS[0], **tools},
        {"messages": []},
        {"conversations": [], **tools},
    ):
        for name in ("one.json", "one.jsonl"):
            (tmp_path / name).write_text(json.dumps(row))
            assert read(tmp_path / name) == [row]


def test_a_folder_holds_its_files_in_order(tmp_path: Path):
    folder = tmp_path / "with [brackets]"
    for name, rows in (("b.jsonl", ROWS[2:]), ("a/part.jsonl", ROWS[:2])):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("README.md", "dataset_infos.json", ".hidden.jsonl", "_tmp.jsonl"):
        (folder / name).write_text("{")
    assert read(folder) == ROWS
    assert read(folder, size=3) == ROWS[:3]
    places = [where for where, _ in read_source(SourceConfig(str(folder)))]
    assert places[2] == f"{folder / 'b.jsonl'}: row 1"
    (tmp_path / "empty").mkdir()
    assert "a folder without data files" in error_of(tmp_path / "empty")


def test_a_folder_s_splits_are_kept_apart(tmp_path: Path):
    for name, rows in (("train-0.parquet", ROWS[:1]), ("train-1.parquet", ROWS[1:2]), ("test.parquet", ROWS[2:])):
        Dataset.from_list(rows).to_parquet(tmp_path / name)
    assert read(tmp_path) == ROWS[:2]
    assert read(tmp_path, split="test") == ROWS[2:]
    assert "has the splits test, train, by its files' names, and no 'validation'" in error_of(
        tmp_path, split="validation"
    )
    # One word alone divides nothing.
    (tmp_path / "train-0.parquet").unlink()
    (tmp_path / "train-1.parquet").unlink()
    assert read(tmp_path) == ROWS[2:]


def test_what_datasets_saved_is_a_folder_of_data_files(tmp_path: Path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert read(tmp_path / "one") == ROWS
    DatasetDict(train=Dataset.from_list(ROWS[:3]), test=Dataset.from_list(ROWS[3:])).save_to_disk(tmp_path / "both")
    assert read(tmp_path / "both") == ROWS[:3]
    assert read(tmp_path / "both", split="test") == ROWS[3:]


def test_a_pattern_names_files(tmp_path: Path, monkeypatch):
    for i, row in enumerate(ROWS):
        Dataset.from_list([row]).to_parquet(tmp_path / f"train-{i}.parquet")
    (tmp_path / "train.txt").write_text("no data")
    assert read(tmp_path / "*.parquet") == ROWS
    assert read(tmp_path / "train*") == ROWS
    assert read(tmp_path.parent / "**" / f"{tmp_path.name}/train-[12].parquet") == ROWS[1:3]
    assert "no data file fits the pattern" in error_of(tmp_path / "test-*.parquet")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("~/*.parquet") == ROWS
    assert local_files("~/train-1.parquet") == [tmp_path / "train-1.parquet"]
    # A file of that very name comes first.
    (tmp_path / "[a].jsonl").write_text(LINES)
    assert read(tmp_path / "[a].jsonl") == ROWS


def test_values_of_text_files_stay_as_they_are(tmp_path: Path):
    (tmp_path / "rows.csv").write_text(",prompt,completion,,\n0,007, 1.50 ,,\n1,NA,null,,\n")
    assert read(tmp_path / "rows.csv") == [
        {"prompt": "007", "completion": " 1.50 "},
        {"prompt": "NA", "completion": "null"},
    ]


def test_a_long_field_is_read(tmp_path: Path):
    csv.field_size_limit(131072)
    (tmp_path / "rows.csv").write_text(f"prompt,completion\n{'x' * 200_000},1\n")
    assert len(read(tmp_path / "rows.csv")[0]["prompt"]) == 200_000


REFUSED = {
    "utf16.jsonl": (LINES.encode("utf-16"), "not a UTF-8 text file but UTF-16; save it as UTF-8: iconv"),
    "utf16le.csv": (TABLE.encode("utf-16-le"), "not a UTF-8 text file but UTF-16"),
    "latin1.jsonl": (LINES.encode("latin-1"), "line 1 has the byte 0xe9); save it as UTF-8"),
    "cut.jsonl.gz": (gzip.compress(LINES.encode() * 99)[:-20], "corrupt or truncated gzip"),
    "plain.jsonl.gz": (LINES.encode(), "corrupt or truncated gzip"),
    "cut.json.zst": (packed(LINES, "zstd")[:-9], "corrupt or truncated zstd"),
    "packed.jsonl": (gzip.compress(LINES.encode()), "a compressed one; name it packed.jsonl.gz"),
    "packed.csv": (b"PK\x03\x04 and more", "a compressed one; unpack it"),
    "cut.jsonl": (LINES[:-10].encode(), "line 4 is corrupt or truncated JSON"),
    "cut.json": (json.dumps(ROWS)[:-10].encode(), "corrupt or truncated JSON"),
    "cut_array.jsonl": (json.dumps(ROWS)[:-10].encode(), "corrupt or truncated JSON"),
    "deep.jsonl": (b'{"a": ' + b"[" * 100_000, "is corrupt or truncated JSON"),
    "digits.jsonl": (b'{"a": ' + b"9" * 5000 + b"}\n", "line 1 is corrupt or truncated JSON (Exceeds the limit"),
    "word.jsonl": (b"hello\n", "line 1 is corrupt or truncated JSON"),
    "scalar.json": (b"3", "expected a list of rows, got int"),
    "lists.jsonl": (b'["a", "b"]\n["c", "d"]\n', "row 1 is not an object of columns but"),
    "splits.json": (json.dumps({"train": ROWS, "test": ROWS}).encode(), "under several keys (train, test)"),
    "columns.json": (b'{"prompt": ["a"], "completion": ["b"]}', "an object of columns (prompt, completion)"),
    "pandas.json": (b'{"prompt": {"0": "a"}, "completion": {"0": "b"}}', "to_json(orient='records')"),
    "mixed.csv": (b"prompt;completion|level\na;b|c\n", "has no ',', and more than one other separator"),
    "short.csv": (b"prompt,completion\na,b\nc\n", "row 2 has another number of fields than the header (1, not 2"),
    "open.csv": (b'prompt,completion\na,b\n"c,d\ne,f\n', "row 2 (to line 4) has quotes that do not close"),
    "twice.csv": (b"prompt,prompt\na,b\n", "column 'prompt' comes twice in the header"),
    "cut.parquet": (b"PAR1 cut off", "corrupt or truncated parquet"),
    "cut.arrow": (b"ARROW1 cut off", "corrupt or truncated arrow"),
    "empty.json": (b"", "has no rows"),
    "header.csv": (b"prompt,completion\n", "has no rows"),
    "rows.xlsx": (b"PK", "not a data file; allowed: .jsonl, .json, .csv, .parquet"),
    "rows.txt.gz": (b"PK", "not a data file"),
}


def test_one_line_of_lists_is_a_row(tmp_path: Path):
    for row in ({"prompt": ["a"]}, {"prompt": {"a": 1}}, {"conversation": [], "n": [1]}):
        (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
        assert read(tmp_path / "rows.jsonl") == [row]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(name: str, tmp_path: Path):
    data, says = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    error = error_of(tmp_path / name)
    assert says in error
    assert name in error


def test_names_that_no_file_can_have():
    for name in ("x" * 5000 + ".jsonl", "~nobody-of-that-name/rows.jsonl"):
        assert "cannot be a file's name" in error_of(name)


def test_a_file_that_is_not_there(tmp_path: Path):
    assert "rows.jsonl.gz: no such file" in error_of(tmp_path / "rows.jsonl.gz")
    with pytest.raises(InputError, match="cannot be read"):
        read_table(tmp_path)
