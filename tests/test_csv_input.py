"""CSV files from outside: what is read, and what is one clear line."""

import pytest

from psa_jax.csv_input import read_csv, read_records
from psa_jax.errors import PSAError


def test_quotes_marks_and_empty_lines_at_the_end(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('\ufeffname,"said, twice"\n"a\nb","x ""y"""\n,\n\n'.encode())
    assert read_csv(path) == [(1, ["name", "said, twice"]), (3, ["a\nb", 'x "y"'])]
    assert read_records(path, ("said, twice",)) == [(3, {"said, twice": 'x "y"'})]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", 'column "name" is missing; the first line has to name name, age, each once'),
        (b"name\nx\n", 'column "age" is missing'),
        (b"name,age,name\nsecret,1,x\n", 'column "name" is there twice'),
        (b"name,age\n", "only a header; give a file with lines below it"),
        (b"name,age\nx,1\nsecret\n", "line 3: 1 cells; the header has 2"),
        (b"name,age\n\xff,1\n", "not a UTF-8 CSV file"),
        (b'name,age\n"secret,1\n', "not a UTF-8 CSV file"),
    ],
)
def test_files_that_are_refused(tmp_path, content, says):
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(PSAError) as caught:
        read_records(path, ("name", "age"))
    assert says in str(caught.value) and str(path) in str(caught.value) and "secret" not in str(caught.value)
