import csv
import io
import json

import pyarrow
import pyarrow.parquet
import pytest

from stages import manifest
from stages.names import name_rule, same_file
from stages.types import Row


def read(tmp_path, content, name="lessons.csv"):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return manifest.read(str(file))


def values(result):
    rows, problems = result
    assert problems == []
    return [row.values for row in rows]


def only_problem(result):
    rows, problems = result
    assert rows == []
    assert len(problems) == 1
    return problems[0]


def test_every_csv_value_is_a_string_as_it_stands(tmp_path):
    rows, problems = read(tmp_path, "lesson_id,image,num_clip,x_note\n001,a.png,07,\n2, b c.png ,,1e3\n")
    assert problems == []
    assert rows == [
        Row(1, {"lesson_id": "001", "image": "a.png", "num_clip": "07"}),
        Row(2, {"lesson_id": "2", "image": "b c.png", "x_note": "1e3"}),
    ]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk", "utf-16"])
def test_chinese_manifests_of_excel(tmp_path, delimiter, encoding):
    text = "lesson_id,audio\r\n第一课,录音/第 1 课.wav\r\n".replace(",", delimiter)
    assert values(read(tmp_path, text.encode(encoding))) == [
        {"lesson_id": "第一课", "audio": "录音/第 1 课.wav"}
    ]


def test_blank_lines_are_not_rows(tmp_path):
    rows, problems = read(tmp_path, "\n\nlesson_id,image\n\na,1.png\n , \n\nb,2.png\n\n")
    assert problems == []
    assert [(row.number, row.values["lesson_id"]) for row in rows] == [(1, "a"), (2, "b")]


def test_quoted_newlines_and_delimiters_belong_to_the_value(tmp_path):
    text = 'lesson_id;prompt\na;"One; two\nthree ""four"", five"\n'
    assert values(read(tmp_path, text)) == [{"lesson_id": "a", "prompt": 'One; two\nthree "four", five'}]


def test_empty_columns_without_a_name_are_ignored_but_not_their_values(tmp_path):
    assert values(read(tmp_path, "lesson_id,,\na,,\n")) == [{"lesson_id": "a"}]
    assert "no name" in only_problem(read(tmp_path, "lesson_id,,\na,lost,\n")).rule


def test_ragged_line_is_a_problem_and_the_others_are_kept(tmp_path):
    rows, problems = read(tmp_path, "lesson_id,image\na,1.png,more\nb,2.png\nc\n")
    assert [row.values["lesson_id"] for row in rows] == ["b"]
    assert [(problem.row, problem.rule) for problem in problems] == [
        (1, "has 3 cells, but the header has 2"),
        (3, "has 1 cells, but the header has 2"),
    ]


def test_duplicate_column_names_are_a_problem_of_the_manifest(tmp_path):
    problem = only_problem(read(tmp_path, "lesson_id,image,image\na,1.png,2.png\n"))
    assert problem.row == 0
    assert "more than one column called image" in problem.rule


@pytest.mark.parametrize("text", ['a,"open\n', 'a,"b"c\n'])
def test_broken_quotes_are_a_problem_of_the_manifest(tmp_path, text):
    problem = only_problem(read(tmp_path, "lesson_id,prompt\n" + text))
    assert (problem.row, "not valid CSV" in problem.rule) == (0, True)


def test_manifest_that_does_not_exist_is_a_problem(tmp_path):
    _, problems = manifest.read(str(tmp_path / "no.csv"))
    assert [(problem.row, problem.field, problem.rule) for problem in problems] == [
        (0, "manifest", "no such file")
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "lesson_id,image\n"),
        ("a.csv", "\n"),
        ("a.jsonl", "\n\n"),
        ("a.json", "{}"),
        ("a.yaml", "{}"),
    ],
)
def test_manifest_without_rows_is_a_problem(tmp_path, name, content):
    problem = only_problem(read(tmp_path, content, name))
    assert (problem.row, problem.rule) == (0, "has no rows")


@pytest.mark.parametrize("content", [b"lesson_id\n\xff\xff\x80\n", b"lesson_id\n\x00\x01\n"])
def test_manifest_that_is_no_text_is_a_problem(tmp_path, content):
    assert "is not text" in only_problem(read(tmp_path, content)).rule


def test_json_lines_become_strings_and_nulls_are_left_out(tmp_path):
    first = '{"lesson_id": "001", "num_clip": 3, "sample_shift": 3.50, "image": null, "x_b": true}'
    text = first + '\n\n{"lesson_id": 7}'
    assert values(read(tmp_path, text, "a.jsonl")) == [
        {"lesson_id": "001", "num_clip": "3", "sample_shift": "3.50", "x_b": "true"},
        {"lesson_id": "7"},
    ]


def test_json_lines_are_known_by_content(tmp_path):
    assert values(read(tmp_path, '{"lesson_id": "a"}\n', "lessons")) == [{"lesson_id": "a"}]


def test_line_separator_inside_a_json_string_does_not_end_the_line(tmp_path):
    assert (
        values(read(tmp_path, '{"lesson_id": "a", "prompt": "one\u2028two"}', "a.jsonl"))[0]["prompt"]
        == "one\u2028two"
    )


@pytest.mark.parametrize(
    ("line", "field", "rule"),
    [
        ('{"lesson_id": "b", "image": ["1.png"]}', "image", "single value"),
        ('{"lesson_id": "b", "image": {"path": "1.png"}}', "image", "single value"),
        ('{"lesson_id": "b", "image": "1.png", "image": "2.png"}', "image", "given twice"),
        ('{"lesson_id": "b", ', "row", "not valid JSON"),
        ('["b", "1.png"]', "row", "must be a JSON object"),
        ("[" * 100_000, "row", "nested too deeply"),
        (r'{"lesson_id": "b", "image": "\ud83d"}', "image", "half of a character"),
    ],
)
def test_broken_json_line_is_a_problem_and_the_others_are_kept(tmp_path, line, field, rule):
    rows, (problem,) = read(tmp_path, f'{{"lesson_id": "a"}}\n{line}\n{{"lesson_id": "c"}}\n', "a.jsonl")
    assert [(row.number, row.values["lesson_id"]) for row in rows] == [(1, "a"), (3, "c")]
    assert (problem.row, problem.field) == (2, field)
    assert rule in problem.rule
    assert problem.lesson_id == ("b" if line.startswith("{") and field == "image" else "")


def test_parquet_becomes_strings(tmp_path):
    table = pyarrow.table(
        {
            "lesson_id": ["001", "002"],
            "num_clip": [3.0, float("nan")],
            "x_rate": [0.5, None],
            "base_seed": [1, None],
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert values(manifest.read(str(tmp_path / "a.parquet"))) == [
        {"lesson_id": "001", "num_clip": "3", "x_rate": "0.5", "base_seed": "1"},
        {"lesson_id": "002"},
    ]


def test_nested_and_duplicate_parquet_columns_are_problems(tmp_path):
    pyarrow.parquet.write_table(
        pyarrow.table({"lesson_id": ["a"], "image": [["1.png"]]}), tmp_path / "a.parquet"
    )
    assert only_problem(manifest.read(str(tmp_path / "a.parquet"))).field == "image"
    twice = pyarrow.table([["a"], ["b"]], names=["lesson_id", "lesson_id"])
    pyarrow.parquet.write_table(twice, tmp_path / "b.parquet")
    assert "more than one column" in only_problem(manifest.read(str(tmp_path / "b.parquet"))).rule


def test_truncated_parquet_is_a_problem(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"lesson_id": ["a"]}), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()[:-20]
    assert "not a valid Parquet" in only_problem(read(tmp_path, data, "b.parquet")).rule


BATCH = {"01": {"prompt": "p", "image": "a.png", "audio": "a.wav", "num_clip": 10}, "二": {"audio": "b.wav"}}
BATCH_ROWS = [
    {"lesson_id": "01", "prompt": "p", "image": "a.png", "audio": "a.wav", "num_clip": "10"},
    {"lesson_id": "二", "audio": "b.wav"},
]


def test_upstreams_batch_json(tmp_path):
    assert values(read(tmp_path, json.dumps(BATCH), "a.json")) == BATCH_ROWS


def test_upstreams_batch_yaml(tmp_path):
    text = (
        "01:\n  prompt: p\n  image: a.png\n  audio: a.wav\n  num_clip: 10\n二:\n  audio: b.wav\n  image: ~\n"
    )
    assert values(read(tmp_path, text, "a.yaml")) == BATCH_ROWS


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"a": {"audio": "1.wav"}, "a": {"audio": "2.wav"}}'),
        ("a.yml", "a: {audio: 1.wav}\na: {audio: 2.wav}"),
    ],
)
def test_duplicate_names_in_a_batch_are_two_rows_and_none_is_swallowed(tmp_path, name, text):
    rows = values(read(tmp_path, text, name))
    assert rows == [{"lesson_id": "a", "audio": "1.wav"}, {"lesson_id": "a", "audio": "2.wav"}]


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.json", '{"a": {"audio": "1.wav", "audio": "2.wav"}}'), ("a.yml", "a: {audio: 1.wav, audio: 2.wav}")],
)
def test_duplicate_keys_of_a_batch_row_are_a_problem(tmp_path, name, text):
    problem = only_problem(read(tmp_path, text, name))
    assert (problem.row, problem.lesson_id, problem.field) == (1, "a", "audio")
    assert "given twice" in problem.rule


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("a.json", '[{"lesson_id": "a"}]', "mapping of names"),
        ("a.json", '{"lesson_id": "a"}\n{"lesson_id": "b"}\n', "JSON Lines are called .jsonl"),
        ("a.json", '{"a": "1.wav"}', "followed by a mapping"),
        ("a.yaml", "- a\n- b\n", "mapping of names"),
        ("a.yaml", "a: [1.wav]", "followed by a mapping"),
        ("a.yaml", "a: {audio: [1.wav]}", "single value"),
        ("a.yaml", "a: {audio: 1.wav", "not valid YAML"),
        ("a.yaml", "[" * 5000, "not valid YAML"),
    ],
)
def test_batch_of_another_shape_is_a_problem(tmp_path, name, text, rule):
    assert rule in only_problem(read(tmp_path, text, name)).rule


def test_init_lists_recordings_in_natural_order_with_unique_ids(tmp_path):
    for name in ("l10.wav", "l2.wav", "l2.MP3", "第1课.m4a", ".hidden.wav", "notes.txt"):
        (tmp_path / name).touch()
    text = manifest.init(str(tmp_path), image="t,1.png", prompt='say "hi"', manifest_dir=str(tmp_path.parent))
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [row["lesson_id"] for row in rows] == ["l2.MP3", "l2.wav", "l10", "第1课"]
    assert rows[0] == {
        "lesson_id": "l2.MP3",
        "image": "t,1.png",
        "audio": f"{tmp_path.name}/l2.MP3",
        "prompt": 'say "hi"',
    }


def test_what_init_writes_can_be_read(tmp_path):
    (tmp_path / "一.wav").touch()
    text = manifest.init(str(tmp_path))
    assert values(read(tmp_path, text)) == [{"lesson_id": "一", "audio": str(tmp_path / "一.wav")}]


def test_init_refuses_a_folder_without_recordings(tmp_path):
    with pytest.raises(ValueError, match="no recordings"):
        manifest.init(str(tmp_path))


def test_what_spreadsheet_programs_add_is_understood(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("sep=;\nlesson_id;audio\n1;a.wav;;\n2;b.wav\n", encoding="utf-8")
    rows, problems = manifest.read(str(path))
    assert not problems
    assert [row.values["audio"] for row in rows] == ["a.wav", "b.wav"]


def test_init_gives_ids_that_are_names_on_any_disk(tmp_path):
    for name in ('what: "why".wav', "Dup.wav", "dup.WAV", "dup.mp3"):
        (tmp_path / name).write_bytes(b"")
    lines = manifest.init(str(tmp_path)).splitlines()[1:]
    ids = [next(csv.reader([line]))[0] for line in lines]
    assert all(name_rule(name) is None for name in ids)
    assert len({same_file(name) for name in ids}) == 4
