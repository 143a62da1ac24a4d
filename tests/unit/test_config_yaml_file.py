from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpcft.config.yaml_file import MAX_BYTES, dump_yaml, load_yaml
from hpcft.errors import UserError

# What YAML 1.1 or YAML 1.2 takes for something else than text, or for syntax.
TRAPS = [
    "No",
    "y",
    "on",
    "1e-3",
    "1:00:00",
    "0x1f",
    "0o17",
    "08",
    "1_000",
    "2020-01-01",
    "~",
    "null",
    "true",
    "",
]
TRAPS += [
    "<<",
    "=",
    "# x",
    "a: b",
    "- a",
    "*x",
    "&x",
    "!x",
    ".inf",
    ".nan",
    "%",
    "@",
    "`",
    "\t",
    "\x00",
    "\x85",
    "\ufeff",
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "some.yaml"


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_yaml(path)
    return str(caught.value)


def test_every_key_and_list_item_knows_its_line(file: Path) -> None:
    flow, block = "c: [x,\n      y]", "d:\n  - e: 2\n    f: |\n      text\n      text\n  - 3"
    file.write_text(f"# a comment\na: 1\n\nb:\n  {flow}\n  {block}\n")
    document = load_yaml(file)
    assert document.data == {"a": 1, "b": {"c": ["x", "y"], "d": [{"e": 2, "f": "text\ntext\n"}, 3]}}
    lines: dict[tuple[str | int, ...], int] = {
        (): 2,
        ("a",): 2,
        ("b",): 4,
        ("b", "c"): 5,
        ("b", "c", 1): 6,
        ("b", "d", 0, "f"): 9,
        ("b", "d", 1): 12,
    }
    assert {key_path: document.line_of(key_path) for key_path in lines} == lines
    assert document.line_of(("b", "nothing")) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("No", "No"),  # nobelium; YAML 1.1 says false
        ("Y", "Y"),
        ("1e-3", 1e-3),  # YAML 1.1 says text
        ("1:00:00", "1:00:00"),  # YAML 1.1 says 3600
        ("2020-01-01", "2020-01-01"),
        ("010", 10),
        ("0x1f", 31),
        ("-.5", -0.5),
        ("true", True),
        ("'true'", "true"),
        ("", None),
        ("~", None),
    ],
)
def test_scalars_follow_yaml_1_2(file: Path, text: str, value: object) -> None:
    file.write_text(f"key: {text}")
    assert load_yaml(file).data == {"key": value}


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        ("a: 1\nb:\n  x: 1\n  y: 2\n  x: 3\n", 5, "the key 'x' is already on line 3; delete one of the two"),
        ("a: 1\n'a': 2\n", 2, "the key 'a' is already on line 1"),
        (
            "a: 1\nb: !!python/object/apply:os.system [id]\n",
            2,
            "the tag 'tag:yaml.org,2002:python/",
        ),
        ("a: !!python/name:os.system\n", 1, "is not allowed; write the plain value"),
        ("!!python/object/new:dict {a: 1}\n", 1, "the tag"),
        ("a: !!binary aGk=\n", 1, "the tag 'tag:yaml.org,2002:binary'"),
        ("a: !local x\n", 1, "the tag '!local'"),
        ("!!str a: 1\n", 1, "the tag"),
        ("a: &x 1\nb: 2\n", 1, "anchors and aliases (&x) are not allowed; write the value out"),
        ("a: 1\nb: *x\n", 2, "anchors and aliases (*x)"),
        ("&x a: 1\n", 1, "anchors and aliases (&x)"),
        ("a:\n  <<: *x\n", 2, "anchors and aliases (*x)"),
        ("a: 1\nb: .inf\n", 2, "not a finite number"),
        ("a: -1e999\n", 1, "not a finite number"),
        (f"a: {'9' * 5000}\n", 1, "a number of 5000 digits"),
        ("a: 1\n2: b\n", 2, "a key must be text; put quotes around it"),
        ("a: 1\ntrue: b\n", 2, "a key must be text"),
        ("? [a, b]\n: 1\n", 1, "a key must be text"),
        (f"a: {'[' * 200_000}", 1, "nested more than 20 levels deep"),
        ("- " * 200_000, 1, "the top level must be keys and values"),
        ("a:\n" + "".join(" " * n + "b:\n" for n in range(1, 300)), 22, "nested more than 20 levels deep"),
        ("- a\n- b\n", 1, "the top level must be keys and values"),
        ("just text\n", 1, "the top level must be keys and values"),
        ("# only a comment\n", 2, "the file holds nothing"),
        ("", 1, "the file holds nothing"),
        ("a: 1\n---\nb: 2\n", 2, "a second document starts here"),
        ("a: 1\n  b: 2\n", 2, "not valid YAML: mapping values are not allowed here; check indentation"),
        ("a: 1\nb:\n\t- 1\n", 3, "YAML is indented with spaces only, so replace the tab"),
        ("a: [1, 2\nb: 3\n", 2, "(while parsing a flow sequence that starts on line 1)"),
        ('a: 1\nb: "x\n', 3, "(while scanning a quoted scalar that starts on line 2)"),
        ("a: 1\nb: x\x07y\n", 2, "the control character 0x07 is not allowed in YAML"),
        (b"a: 1\nb: \xff\n", 2, "is not UTF-8 text; save it as UTF-8"),
        ("a: 1\n".encode("utf-16"), 1, "is not UTF-8 text"),
    ],
)
def test_what_is_not_plain_yaml_is_refused_with_file_and_line(
    file: Path, content: str | bytes, line: int, problem: str
) -> None:
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(file)
    assert message.startswith(f"{file}:{line}: ")
    assert problem in message
    assert len(message.splitlines()) == 1


def test_an_alias_bomb_is_refused_before_it_grows(file: Path) -> None:
    levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    file.write_text("\n".join(["a0: &a0 lol", *levels]))
    assert refusal(file).startswith(f"{file}:1: anchors and aliases (&a0) are not allowed")


def test_a_file_over_the_size_bound_is_refused_without_being_parsed(file: Path) -> None:
    file.write_text("a: 1 #" + "x" * MAX_BYTES)
    assert refusal(file).startswith(f"{file}: is larger than 1000000 bytes")


def test_a_missing_file_says_where_it_was_looked_for(file: Path) -> None:
    assert refusal(file) == f"{file}: no such file; check its name (you are in {Path.cwd()})"


def test_a_folder_instead_of_a_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path}: is a directory; name the YAML file in it"


def test_a_pipe_is_refused_without_waiting_for_its_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in refusal(tmp_path / "pipe")


def test_a_link_to_itself_is_refused(file: Path) -> None:
    file.symlink_to(file)
    assert "cannot be read" in refusal(file)


def test_a_byte_order_mark_and_carriage_returns_do_no_harm(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: x\r\n")
    document = load_yaml(file)
    assert document.data == {"a": 1, "b": "x"}
    assert document.line_of(("b",)) == 2


texts = st.sampled_from(TRAPS) | st.text(max_size=20)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**64), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=10,
)


@given(data=st.dictionaries(texts, trees, min_size=1, max_size=4))
def test_whatever_is_dumped_loads_as_equal_data(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]
) -> None:
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump_yaml(data), encoding="utf-8", newline="")
    assert load_yaml(path).data == data


def test_a_list_that_occurs_twice_is_dumped_twice(file: Path) -> None:
    shared = [1, 2]
    file.write_text(dump_yaml({"a": shared, "b": shared}))
    assert load_yaml(file).data == {"a": [1, 2], "b": [1, 2]}
