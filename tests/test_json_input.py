"""JSON from outside: what Python, diffusers and transformers make of a text, and one line for the rest."""

import json
import math
import re

import diffusers
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from psa_jax.errors import PSAError
from psa_jax.json_input import MAX_DEPTH, parse_json, read_json

BOM = b"\xef\xbb\xbf"
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def refused(text: str | bytes, **settings) -> str:
    with pytest.raises(PSAError) as caught:
        parse_json(text, "there", **settings)
    line = str(caught.value)
    assert line.startswith("there: ") and "\n" not in line and len(line) < 300
    return line


@given(value=VALUES, ascii_=st.booleans())
def test_what_python_reads_is_read_alike(value, ascii_):
    text = json.dumps(value, ensure_ascii=ascii_)
    assert parse_json(text, "there", None) == parse_json(text.encode(), "there", None) == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not valid JSON .*line 1 column 1"),
        ("{", "not valid JSON"),
        ("{'a': 1}", "not valid JSON"),
        (b'{"a": "\xe9"}', "byte 7 is not UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        ("[]", "expected a JSON object, found a list"),
        ("null", "expected a JSON object, found None"),
        ("3", "expected a JSON object, found 3"),
        ('{"a": 1, "b": {"c": 1, "d": 2, "c": 1}}', "key 'c' is given twice"),
        ('{"a": 1, "\\u0061": 2}', "key 'a' is given twice"),
        ('{"a": NaN}', "holds NaN"),
        ('{"a": [-Infinity]}', "holds -Infinity"),
        ('{"a": 1e999}', "1e999 .beyond a float"),
        ('{"a": ' + "1" * 5000 + "}", "not valid JSON"),
        ('{"a": "\\ud800"}', "lone surrogate"),
        ('{"\\udc00": 1}', "lone surrogate"),
        ('{"a": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}", "nested deeper than 100"),
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, "nested deeper than 100"),
        ("[" * 100_000, "nested deeper than 100"),
        ("[" * (MAX_DEPTH + 1), "nested deeper than 100"),
        ('["\\"", "' + '", ["' * MAX_DEPTH, "nested deeper than 100"),  # a string that ends at the second quote
        ('"\\"' + "[" * 200, "Unterminated string"),
        (BOM + b"{}", "byte order mark"),
        ("\ufeff{}", "byte order mark"),
    ],
    ids=range(24),
)
def test_what_is_refused(text, says, tmp_path):
    assert re.search(says, refused(text))
    path = tmp_path / "config.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    with pytest.raises(PSAError, match=says) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_as_deep_as_allowed_is_read_and_brackets_in_text_do_not_count():
    text = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(text, "there", list) == json.loads(text)
    for inside in ("[{" * 500, '"[' * 500, "\\[" * 500, '[\\"' * 500 + "\\"):
        assert parse_json(json.dumps({"a": inside}), "there") == {"a": inside}
    assert parse_json('{"a": "\\ud83d\\ude00"}', "there") == {"a": "😀"}


def test_size_files_and_folders(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": 1}')
    assert read_json(path, limit=8) == {"a": 1}
    with pytest.raises(PSAError, match="larger than 7 bytes"):
        read_json(path, limit=7)
    for absent in (tmp_path, tmp_path / "none"):
        with pytest.raises(PSAError, match="file not found; look again"):
            read_json(absent, hint="look again")


def test_what_may_be_asked_for():
    assert parse_json(BOM + b"{}", "there", bom=True) == parse_json("\ufeff{}", "there", bom=True) == {}
    found = parse_json('{"a": -Infinity, "b": 1e999, "c": NaN}', "there", constants=True)
    assert found["a"] == -math.inf and found["b"] == math.inf and math.isnan(found["c"])
    line = refused('{"religion": 1, "religion": 2}', quote=False)
    assert "religion" not in line and "twice" in line
    for text in ('"female"', '{"age": 9e999}'):
        assert "9" not in (line := refused(text, quote=False)) and "female" not in line


def test_the_libraries_that_read_these_files_take_no_byte_order_mark_either(tmp_path):
    for folder, reader in (("a", transformers.CLIPTextConfig), ("b", diffusers.DDIMScheduler)):
        (tmp_path / folder).mkdir()
        name = "config.json" if folder == "a" else "scheduler_config.json"
        (tmp_path / folder / name).write_bytes(BOM + b'{"model_type": "clip_text_model"}')
        with pytest.raises(OSError, match="valid JSON"):
            reader.from_pretrained(tmp_path / folder)


@settings(max_examples=300)
@given(
    st.binary(max_size=60)
    | st.text(alphabet='[]{},:"\\u0d8ef1.-NaIity ', max_size=60)
    | st.text(max_size=30).map(lambda text: f'{{"a": "{text}"}}')
)
def test_any_text_is_a_value_or_one_line(text):
    try:
        value = parse_json(text, "there", None)
    except PSAError as error:
        assert "\n" not in str(error)
    else:
        assert value == json.loads(text if isinstance(text, str) else text.decode())
