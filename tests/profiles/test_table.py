"""The embedding table: round trips, real embeddings, standardisation, and everything it must refuse."""

import json
import stat
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from psa_jax.errors import PSAError
from psa_jax.profiles.encoders import get_encoder
from psa_jax.profiles.population import sample_population
from psa_jax.profiles.schema import UserProfile
from psa_jax.profiles.table import EmbeddingTable

IDS = ["0000003", "0000001", "0000002"]


def make_table(embeddings=None, ids=IDS, **kwargs) -> EmbeddingTable:
    if embeddings is None:
        embeddings = np.asarray([[1, 2, 5], [3, 4, 5], [5, 12, 5]], np.float32)
    return EmbeddingTable(list(ids), embeddings, "features", "features-test", **kwargs)


def test_lookup_gives_rows_in_the_order_asked_for_and_a_copy():
    table = make_table()
    rows = table.lookup(["0000002", "0000003", "0000002"])
    np.testing.assert_array_equal(rows, [[5, 12, 5], [1, 2, 5], [5, 12, 5]])
    rows[:] = 0
    np.testing.assert_array_equal(table.lookup(["0000003"]), [[1, 2, 5]])
    assert table.lookup([]).shape == (0, 3)


def test_an_unknown_user_is_an_error_that_names_it():
    with pytest.raises(PSAError, match="'0000009' is not in the embedding table"):
        make_table().lookup(["0000001", "0000009"])


@pytest.mark.parametrize("standardise", [False, True])
def test_round_trip_is_bit_equal_private_and_deterministic(tmp_path, standardise):
    values = np.random.RandomState(0).standard_normal((3, 40)).astype(np.float32) * 1e-3
    table = make_table(values, notes={"pooling": "mean", "template": "ab12"})
    table = table.standardised() if standardise else table
    for name in ("a", "b"):
        table.save(tmp_path / name)
    loaded = EmbeddingTable.load(tmp_path / "a")
    np.testing.assert_array_equal(loaded.embeddings, table.embeddings)
    np.testing.assert_array_equal(loaded.apply(values), table.apply(values))
    assert (loaded.ids, loaded.encoder, loaded.fingerprint) == (IDS, "features", "features-test")
    assert loaded.notes == {"pooling": "mean", "template": "ab12"}
    assert (loaded.mean is not None) == standardise
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a", "b"]


def test_standardised_by_hand():
    table = make_table().standardised()
    # column 1: mean 3, variance (4 + 0 + 4) / 3; column 2: mean 6, variance (16 + 4 + 36) / 3; column 3: constant
    a, b = (8 / 3) ** 0.5, (56 / 3) ** 0.5
    np.testing.assert_allclose(table.mean, [3, 6, 5])
    np.testing.assert_allclose(table.std, [a, b, 1], rtol=1e-6)
    np.testing.assert_allclose(table.embeddings, [[-2 / a, -4 / b, 0], [0, -2 / b, 0], [2 / a, 6 / b, 0]], rtol=1e-6)
    np.testing.assert_allclose(table.apply(np.asarray([[4, 6, 6]], np.float32)), [[1 / a, 0, 1]], rtol=1e-6)


def test_a_constant_column_does_not_blow_up():
    values = np.full((1000, 2), 0.1, np.float32)  # 0.1 is not exact: its mean rounds, and a naive std is not 0
    values[0, 1] = 0.2
    table = make_table(values, ids=[f"{number:07d}" for number in range(1000)]).standardised()
    assert not table.embeddings[:, 0].any() and table.std[0] == 1
    np.testing.assert_allclose(table.embeddings[:, 1].std(), 1, rtol=1e-4)


def test_an_unseen_profile_is_scaled_like_a_seen_one():
    users, encoder = sample_population(60), get_encoder("features")
    raw = EmbeddingTable.from_profiles(users, encoder)
    table = raw.standardised()
    assert (raw.encoder, raw.fingerprint, raw.dim) == ("features", encoder.fingerprint, encoder.dim)
    np.testing.assert_array_equal(raw.lookup(["0000007"]), encoder.encode([users[6]]))
    np.testing.assert_array_equal(table.apply(encoder.encode([users[6]])), table.lookup(["0000007"]))
    np.testing.assert_array_equal(raw.apply(encoder.encode([users[6]])), raw.lookup(["0000007"]))


def test_real_embeddings(shared_data):
    table = EmbeddingTable.from_npy_folder(shared_data / "embeddings")
    assert table.ids == ["0000001", "0000002"] and table.dim == 3584
    first, second = table.lookup(["0000001", "0000002"]).astype(np.float64)
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    assert cosine == pytest.approx(0.9946, abs=5e-5)
    np.testing.assert_array_equal(table.lookup(["0000002"])[0], np.load(shared_data / "embeddings" / "0000002.npy"))
    # two users: standardised they are each other's opposite, wherever they differ
    scaled = table.standardised().embeddings
    np.testing.assert_allclose(scaled[0], -scaled[1], atol=1e-3)


def test_npy_shapes_and_dtypes(tmp_path):
    vector = np.asarray([1.5, -2, 3])
    for name, array in (
        ("0000001", vector),
        ("0000002", vector[None].astype(np.float32)),
        ("0000003", vector[None, None].astype(np.float16)),
        ("0000004", vector.astype(">f8")),
    ):
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "README.txt").write_text("left alone")
    table = EmbeddingTable.from_npy_folder(tmp_path, encoder="qwen")
    assert table.ids == ["0000001", "0000002", "0000003", "0000004"] and table.encoder == "qwen"
    np.testing.assert_array_equal(table.embeddings, np.tile(vector.astype(np.float32), (4, 1)))


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("0000002", np.zeros((2, 3)), r"shape \(2, 3\)"),
        ("0000002", np.zeros((1, 1, 1, 3)), "shape"),
        ("0000002", np.zeros(()), "shape|plain"),
        ("0000002", np.zeros(0), "shape|plain"),
        ("0000002", np.zeros(4), r"0000002.npy: D = 4, but 0000001.npy has D = 3"),
        ("0000002", np.asarray([0, np.nan, 0]), "0000002.npy: NaN"),
        ("0000002", np.asarray([0, 1e300, 0]), "0000002.npy: NaN or infinity"),
        ("0000002", np.zeros(3, np.int64), "floating-point"),
        ("0000002", np.asarray([{}], dtype=object), "not a plain .npy"),
        ("2", np.zeros(3), "seven digits"),
        ("center", np.zeros(3), "seven digits"),
    ],
)
def test_bad_npy_files_are_refused(tmp_path, name, array, message):
    np.save(tmp_path / "0000001.npy", np.zeros(3, np.float32))
    np.save(tmp_path / f"{name}.npy", array, allow_pickle=True)
    with pytest.raises(PSAError, match=message):
        EmbeddingTable.from_npy_folder(tmp_path)


def test_damaged_or_missing_npy_files_are_refused(tmp_path):
    with pytest.raises(PSAError, match="no .npy files"):
        EmbeddingTable.from_npy_folder(tmp_path / "none")
    np.save(tmp_path / "0000001.npy", np.zeros(100))
    whole = (tmp_path / "0000001.npy").read_bytes()
    for content in (b"", b"text", whole[:50], whole[:-8]):
        (tmp_path / "0000001.npy").write_bytes(content)
        with pytest.raises(PSAError, match="0000001.npy"):
            EmbeddingTable.from_npy_folder(tmp_path)


BAD = np.zeros((3, 2), np.float32)
BAD[1, 1] = np.inf


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"embeddings": BAD}, "0000001 has NaN or infinity"),
        ({"embeddings": np.zeros((3, 0), np.float32)}, "expected float32"),
        ({"embeddings": np.zeros((0, 2), np.float32), "ids": []}, "0 ids"),
        ({"ids": IDS[:2]}, "2 ids for 3 rows"),
        ({"ids": [*IDS[:2], IDS[0]]}, "0000003 is listed twice"),
        ({"ids": [*IDS[:2], "7"]}, "seven digits"),
        ({"mean": np.zeros(3, np.float32)}, "go together"),
        ({"mean": np.zeros(3, np.float32), "std": np.zeros(3, np.float32)}, "above zero"),
        ({"mean": np.full(3, np.nan, np.float32), "std": np.ones(3, np.float32)}, "3 finite"),
    ],
)
def test_a_table_that_does_not_hold_is_refused(kwargs, message):
    with pytest.raises(PSAError, match=message):
        make_table(**kwargs)


def test_wrong_types_are_refused_where_annotations_are_not_checked():
    # A process of its own: in this one the checked annotations would refuse them before the table does.
    code = """
import numpy as np
from psa_jax.errors import PSAError
from psa_jax.profiles.table import EmbeddingTable
good, two = np.zeros((2, 3), np.float32), np.ones(2, np.float32)
wrong_mean = {"mean": two, "std": two}
for embeddings, more in ((good.astype(float), {}), (good[0], {}), (good.tolist(), {}), (good, wrong_mean)):
    try: EmbeddingTable(["0000001", "0000002"], embeddings, "e", "f", **more)
    except PSAError as error: print(error)
"""
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines == [
        "embedding table: expected float32 [N, D], got float64 [2, 3]",
        "embedding table: expected float32 [N, D], got float32 [3]",
        "embedding table: expected float32 [N, D], got list",
        "embedding table: mean must be 3 finite float32 numbers",
    ]


def test_apply_refuses_other_widths_and_nan():
    for table in (make_table(), make_table().standardised()):
        with pytest.raises(PSAError, match="D = 2, the table has D = 3"):
            table.apply(np.zeros((1, 2), np.float32))
        with pytest.raises(PSAError, match="NaN"):
            table.apply(np.full((1, 3), np.nan, np.float32))


def test_standardising_twice_or_one_user_is_refused():
    with pytest.raises(PSAError, match="already"):
        make_table().standardised().standardised()
    with pytest.raises(PSAError, match="two users"):
        make_table(np.ones((1, 2), np.float32), ids=IDS[:1]).standardised()


def test_an_anonymous_profile_has_no_row():
    with pytest.raises(PSAError, match="user_id"):
        EmbeddingTable.from_profiles([UserProfile.from_mapping({"age": 9, "gender": "male"})], get_encoder("features"))


def test_files_that_are_no_table_are_refused(tmp_path):
    path = tmp_path / "table.safetensors"
    make_table().save(path)
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:100], whole[:-4]):
        path.write_bytes(content)
        with pytest.raises(PSAError, match="table.safetensors: not a whole safetensors file"):
            EmbeddingTable.load(path)
    with pytest.raises(PSAError, match="none.safetensors: file not found; check the path"):
        EmbeddingTable.load(tmp_path / "none.safetensors")
    with pytest.raises(PSAError, match="file not found; check the path"):
        EmbeddingTable.load(tmp_path)
    save_file({"embeddings": np.zeros((1, 2), np.float32)}, path)
    with pytest.raises(PSAError, match="not an embedding table"):
        EmbeddingTable.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "psa_jax.embedding_table/2"}, "metadata"),
        ({"ids": "0000001"}, "metadata"),
        ({"ids": [1, 2, 3]}, "metadata"),
        ({"ids": ["1", "2", "3"]}, "seven digits"),
        ({"ids": IDS[:2]}, "2 ids for 3 rows"),
        ({"extra": 1}, "metadata"),
        ({"mean": [0.0, 0.0, 0.0]}, "go together"),
        ({"mean": ["a"], "std": [1.0]}, "metadata"),
        ({"notes": {"a": 1}}, "metadata"),
    ],
)
def test_tampered_metadata_is_refused(tmp_path, change, message):
    table = make_table()
    metadata = {"format": "psa_jax.embedding_table/1", "ids": IDS, "encoder": "features", "fingerprint": "f"}
    metadata |= {"notes": {}, "mean": None, "std": None}
    path = tmp_path / "table.safetensors"

    def write(fields):
        save_file({"embeddings": table.embeddings}, path, {"psa_jax.embedding_table": json.dumps(fields)})

    write(metadata)
    assert EmbeddingTable.load(path).ids == IDS
    write({**metadata, **change})
    with pytest.raises(PSAError, match=message) as caught:
        EmbeddingTable.load(path)
    assert str(caught.value).startswith(str(path))


def test_repr_shows_sizes_only():
    assert repr(make_table()) == "EmbeddingTable(3 users, D=3, encoder='features')"
