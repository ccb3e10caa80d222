"""Files of `torch.save` as torch reads them, and files built to run code: refused, and nothing runs."""

import builtins
import contextlib
import copyreg
import io
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from psa_jax.errors import PSAError
from psa_jax.interop import unpickle
from psa_jax.interop.unpickle import read_state


def save(path: Path, value, **options) -> Path:
    torch.save(value, path, **options)
    return path


def archive(path: Path, program: bytes, storages: dict[str, bytes] | None = None, **entries: bytes) -> Path:
    """A file in torch's zip format with the given pickle, by hand."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", program)
        for name, content in (storages or {}).items():
            file.writestr(f"archive/data/{name}", content)
        for name, content in entries.items():
            file.writestr(name, content)
    return path


def refused(path: Path) -> str:
    with pytest.raises(PSAError) as caught:
        read_state(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    assert len(text) < 400
    return text


# --- what torch writes


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "older"])
def test_as_torch_reads_it(tmp_path, zipped):
    state = {
        "psa_adapter": torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)).state_dict(),  # with _metadata
        "user_proj": {
            "half": torch.randn(3, 4).half(),
            "brain": torch.randn(5).bfloat16(),
            "double": torch.randn(2, 2, 2).double(),
            "turned": torch.randn(4, 3).T,
            "part": torch.arange(10.0)[2:8:3],
            "shared": torch.nn.Parameter(torch.ones(2)),
            "scalar": torch.tensor(3.5),
            "empty": torch.zeros(0, 3),
        },
    }
    state["user_proj"]["again"] = state["user_proj"]["shared"]
    found = read_state(save(tmp_path / "a.bin", state, _use_new_zipfile_serialization=zipped))
    expected = torch.load(tmp_path / "a.bin", weights_only=True)
    assert {group: set(tensors) for group, tensors in found.items()} == {g: set(t) for g, t in expected.items()}
    for group, tensors in expected.items():
        for name, tensor in tensors.items():
            array = found[group][name]
            assert array.shape == tuple(tensor.shape), name
            assert array.astype(np.float64).tolist() == tensor.double().tolist(), name


def test_two_entries_of_one_name(tmp_path):
    program = b"\x80\x02}(X\x01\x00\x00\x00a}X\x01\x00\x00\x00a}u."
    assert "two entries named 'a'" in refused(archive(tmp_path / "a.bin", program))


def test_a_flat_state_dict(tmp_path):
    found = read_state(save(tmp_path / "a.bin", OrderedDict(weight=torch.eye(2))))
    np.testing.assert_array_equal(found["weight"], np.eye(2))


@pytest.mark.parametrize("length", [0, 3, 100, 700, -1, -30])
def test_a_truncated_file(tmp_path, length):
    path = save(tmp_path / "a.bin", {"a": torch.randn(8, 8)})
    path.write_bytes(path.read_bytes()[:length])
    assert "not a whole file of torch.save" in refused(path)


def test_no_such_file(tmp_path):
    assert "no such file" in refused(tmp_path / "a.bin")


def test_integers_where_they_are_asked_for(tmp_path):
    for zipped in (True, False):
        path = save(tmp_path / "a.bin", torch.nn.BatchNorm1d(2).state_dict(), _use_new_zipfile_serialization=zipped)
        assert "LongStorage" in refused(path)
        found = read_state(path, integers=True)
        assert (found["num_batches_tracked"].dtype, found["num_batches_tracked"].tolist()) == (np.int64, 0)


# --- the format before torch 1.6: five pickles, then the numbers


def older(tmp_path: Path) -> Path:
    state = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)).state_dict()
    return save(tmp_path / "old.bin", state, _use_new_zipfile_serialization=False)


def test_an_older_file_that_ends_early_or_late(tmp_path):
    content = older(tmp_path).read_bytes()
    path = tmp_path / "a.bin"
    for length in (21, 60, 200, len(content) - 100, len(content) - 44, len(content) - 1):
        path.write_bytes(content[:length])
        assert "not a whole file of torch.save" in refused(path)
    path.write_bytes(content + b"\0")
    assert "goes on behind its end" in refused(path)


def changed(content: bytes, before: bytes, after: bytes) -> bytes:
    assert content.count(before) == 1
    return content.replace(before, after)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: changed(c, b"little_endianq\x02\x88", b"little_endianq\x02\x89"), "big-endian"),
        (lambda c: changed(c, b"]q\x00(", b"]q\x00K\x01("), "its list of storages uses BININT1"),
        (lambda c: changed(c, b"cpuq\x07K\x06", b"cpuq\x07K\x05"), "out of its storage"),
        (
            lambda c: changed(c, (6).to_bytes(8, "little"), (5).to_bytes(8, "little")),
            "another length than the 6 numbers",
        ),
        (lambda c: changed(c, b"cpuq\x07K\x06", b"cpuq\x07J\xff\xff\xff\x7f"), "more than the file has"),
        (lambda c: changed(c, b"cpuq\x07K\x06", b"cpuq\x07J\xff\xff\xff\xff"), "announces -1 numbers"),
    ],
)
def test_an_older_file_that_is_not_what_it_says(tmp_path, change, says):
    path = older(tmp_path)
    path.write_bytes(change(path.read_bytes()))
    assert says in refused(path)


def test_an_older_file_that_lists_other_storages(tmp_path):
    path = older(tmp_path)
    content = path.read_bytes()
    start = content.rindex(b"\x80\x02]q")
    key = re.search(rb"X(....)(\d+)", content[start:], re.DOTALL)[2]
    path.write_bytes(content[:start] + content[start:].replace(key, key[::-1]))
    assert key != key[::-1] and "lists other storages than it uses" in refused(path)


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        ("MAX_PICKLE_BYTES", "not a whole file"),
        ("MAX_ENTRIES", "one of more than 2"),
        ("MAX_BYTES", "larger than any state dict"),
    ],
)
def test_limits_of_an_older_file(tmp_path, monkeypatch, limit, says):
    path = older(tmp_path)
    monkeypatch.setattr(unpickle, limit, 2)
    assert says in refused(path)


# --- what is built to do harm. Each program, run by `pickle`, makes the file "ran".


class Call:
    """Pickles as a call."""

    def __init__(self, function, *args):
        self.how = function, args

    def __reduce__(self):
        return self.how


class SetState:
    """Pickles as an object whose state is set."""

    def __init__(self, function, args, state):
        self.how = function, args, state

    def __reduce__(self):
        return self.how


def touch(path: Path) -> str:
    return f"touch {path}"


def opcodes(text: str, **values: str) -> bytes:
    return text.format(**values).encode()


CODE = "__import__('pathlib').Path({ran!r}).touch()"

PROGRAMS = {
    "reduce os.system": lambda ran: pickle.dumps({"a": Call(os.system, touch(ran))}, 2),
    "reduce eval": lambda ran: pickle.dumps({"a": Call(eval, CODE.format(ran=str(ran)))}, 2),
    "reduce exec": lambda ran: pickle.dumps(Call(exec, CODE.format(ran=str(ran))), 2),
    "protocol 0 GLOBAL": lambda ran: opcodes("cos\nsystem\n(S'{command}'\ntR.", command=touch(ran)),
    "protocol 4 STACK_GLOBAL": lambda ran: pickle.dumps(Call(os.system, touch(ran)), 4),
    "protocol 5 in frames": lambda ran: pickle.dumps([Call(os.system, touch(ran))] * 3, 5),
    "INST": lambda ran: opcodes("(S'{command}'\nios\nsystem\n.", command=touch(ran)),
    "OBJ": lambda ran: opcodes("(cos\nsystem\nS'{command}'\no.", command=touch(ran)),
    "chain of getattr": lambda ran: pickle.dumps(
        Call(Chained(), Call(getattr, Call(__import__, "os"), "system"), touch(ran)), 2
    ),
    "import of torch": lambda ran: b"\x80\x02ctorch\nload\nX\x01\x00\x00\x00a\x85R.",
    "dotted name": lambda ran: pickle.dumps(Call(os.path.os.system, touch(ran)), 4),
    "numpy's exec": lambda ran: (
        b"\x80\x02cnumpy.testing._private.utils\nruncode\n" + pickle.dumps((touch(ran),), 2)[2:-1] + b"R."
    ),
    "NEWOBJ": lambda ran: pickle.dumps({"a": Opened(ran)}, 2),
    "NEWOBJ_EX": lambda ran: b"\x80\x04cbuiltins\nobject\n)}\x92.",
    "BUILD on what is allowed": lambda ran: pickle.dumps(
        SetState(OrderedDict, (), {"__setstate__": Call(os.system, touch(ran))}), 2
    ),
    "BUILD on an allowed name": lambda ran: b"\x80\x02ccollections\nOrderedDict\n}X\x09\x00\x00\x00_metadata}sb.",
    "called with what is allowed": lambda ran: b"\x80\x02ccollections\nOrderedDict\n(cos\nsystem\ntR.",
    "an allowed name as a tensor's argument": lambda ran: (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(ccollections\nOrderedDict\nK\x00)))tR."
    ),
    "calls a tensor": lambda ran: b"\x80\x02}(K\x01)R.",
    "persistent id as text": lambda ran: b"Parchive/data/0\n.",
    "persistent id with a path": lambda ran: (
        b"\x80\x02(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        b"X\x0a\x00\x00\x00../../aaaaX\x03\x00\x00\x00cpuK\x01tQ."
    ),
    "persistent id with a module": lambda ran: (
        b"\x80\x02(X\x07\x00\x00\x00storagecos\nsystem\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ."
    ),
    "extension registry": lambda ran: b"\x80\x02\x82\xf0X\x04\x00\x00\x00true\x85R.",
    "out-of-band buffer": lambda ran: b"\x80\x05\x97.",
    "state that is no dict": lambda ran: b"\x80\x02ccollections\nOrderedDict\n)RK\x01b.",
    "a list": lambda ran: b"\x80\x02].",
    "a number": lambda ran: b"\x80\x02}X\x01\x00\x00\x00aK\x01s.",
    "an empty program": lambda ran: b"",
    "no end": lambda ran: b"\x80\x02}",
    "takes what is not there": lambda ran: b"\x80\x02R.",
    "a mark that is not there": lambda ran: b"\x80\x02t.",
    "memo that is not there": lambda ran: b"\x80\x02h\x05.",
    "leaves something over": lambda ran: b"\x80\x02}}.",
}


class Chained:
    """A callable that pickles as `map`'s cousin: calls its first argument with the rest."""

    def __reduce__(self):
        return getattr, (Call(__import__, "operator"), "call")

    def __call__(self, function, *args):
        raise AssertionError("only pickled")


class Opened:
    """An object of a class of this module, made with __new__."""

    def __init__(self, ran):
        self.ran = ran

    def __setstate__(self, state):
        state["ran"].touch()


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_refused_and_nothing_runs(tmp_path, name):
    ran = tmp_path / "ran"
    refused(archive(tmp_path / "a.bin", PROGRAMS[name](ran), {"0": b"\0" * 4}))
    # In the older format in place of the state, and of the system's description before it.
    content = older(tmp_path).read_bytes()
    for place in (content.index(b"\x80\x02ccollections"), len(unpickle._OLD)):
        program = PROGRAMS[name](ran)
        (tmp_path / "b.bin").write_bytes(content[:place] + program + (content[place:] if program else b""))
        refused(tmp_path / "b.bin")
    assert not ran.exists()


def test_the_programs_are_not_blanks(tmp_path):
    """Most of them do run where `pickle` reads them."""
    running = 0
    for index, program in enumerate(PROGRAMS.values()):
        ran = tmp_path / str(index)
        with contextlib.suppress(Exception):  # some are only malformed
            pickle.loads(program(ran))
        running += ran.exists()
    assert running >= 10


def test_the_registry_of_extensions_is_not_asked(tmp_path):
    code, ran = 240, tmp_path / "ran"
    copyreg.add_extension("os", "system", code)
    try:
        program = b"\x80\x02\x82" + bytes([code]) + pickle.dumps((touch(ran),), 2)[2:-1] + b"R."
        pickle.loads(program)
        assert ran.exists()  # and is in pickle's own cache now
        ran.unlink()
        assert "EXT1" in refused(archive(tmp_path / "a.bin", program))
        assert not ran.exists()
    finally:
        copyreg.remove_extension("os", "system", code)
        copyreg.clear_extension_cache()


def test_find_class_is_never_reached(tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the pickle module is not used")

    path = save(tmp_path / "a.bin", {"a": torch.ones(2)})
    monkeypatch.setattr(pickle, "Unpickler", never)
    monkeypatch.setattr(pickle, "loads", never)
    monkeypatch.setattr(builtins, "eval", never)
    assert read_state(path)["a"].tolist() == [1, 1]


# --- tensors that are not what they say


def tensor_program(count: int, offset: int, shape: tuple, strides: tuple, kind: str = "FloatStorage") -> bytes:
    """{"a": tensor over storage 0}."""
    out = io.BytesIO()

    class Pickler(pickle._Pickler):  # the Python one, so that torch's names can be written without torch's objects
        def persistent_id(self, value):
            return value.pid if isinstance(value, Stored) else None

        def save_global(self, value, name=None):
            self.write(b"c" + value.name.encode() + b"\n")

        dispatch = dict(pickle._Pickler.dispatch)

    class Stored:
        def __init__(self, pid):
            self.pid = pid

    class Named:
        def __init__(self, name):
            self.name = name

        def __call__(self):
            raise AssertionError("only pickled")

    Pickler.dispatch[Named] = Pickler.save_global

    class Tensor:
        def __reduce__(self):
            stored = Stored(("storage", Named(f"torch\n{kind}"), "0", "cpu", count))
            arguments = (stored, offset, shape, strides, False, None)
            return Named("torch._utils\n_rebuild_tensor_v2"), arguments

    Pickler(out, 2).dump({"a": Tensor()})
    return out.getvalue()


def test_the_hand_made_tensor_is_a_tensor(tmp_path):
    path = archive(
        tmp_path / "a.bin", tensor_program(6, 1, (2, 2), (1, 2)), {"0": np.arange(6.0, dtype="<f4").tobytes()}
    )
    assert read_state(path)["a"].tolist() == [[1, 3], [2, 4]]


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (tensor_program(6, 0, (7,), (1,)), "out of its storage"),
        (tensor_program(6, 0, (3, 2), (3, 1)), "out of its storage"),
        (tensor_program(6, 6, (1,), (1,)), "out of its storage"),
        (tensor_program(6, -1, (2,), (1,)), "negative or huge"),
        (tensor_program(6, 5, (2,), (-1,)), "negative or huge"),
        (tensor_program(6, 0, (-2,), (1,)), "negative or huge"),
        (tensor_program(6, 0, (2,), (1 << 62,)), "negative or huge"),
        (tensor_program(6, 1 << 62, (2,), (1,)), "negative or huge"),
        (tensor_program(6, 0, (1 << 20, 1 << 20), (0, 0)), "out of its storage"),
        (tensor_program(6, 0, (2,), (True,)), "negative or huge"),
        (tensor_program(6, 0, (2.0,), (1,)), "negative or huge"),
        (tensor_program(6, 0, (2,), ()), "do not go together"),
        (tensor_program(6, 0, (1,) * 40, (1,) * 40), "do not go together"),
        (tensor_program(7, 0, (2,), (1,)), "has 24 bytes"),
        (tensor_program(1 << 60, 0, (2,), (1,)), "has 24 bytes"),
        (tensor_program(-6, 0, (2,), (1,)), "has 24 bytes"),
        (tensor_program(6, 0, (2,), (1,), "LongStorage"), "LongStorage"),
    ],
)
def test_a_tensor_stays_in_its_storage(tmp_path, program, says):
    assert says in refused(archive(tmp_path / "a.bin", program, {"0": b"\0" * 24}))


def test_views_of_one_storage_do_not_pile_up(tmp_path):
    one = torch.zeros(1000)
    path = save(tmp_path / "a.bin", {str(i): one[:] for i in range(50)})
    assert "larger than the file" in refused(path)


def test_nested_and_recursive(tmp_path):
    deep = {"a": torch.ones(1)}
    for _ in range(5):
        deep = {"a": deep}
    assert "neither a tensor nor a dict" in refused(save(tmp_path / "a.bin", deep))
    # d["a"] = d
    assert "neither a tensor nor a dict" in refused(
        archive(tmp_path / "b.bin", b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.")
    )
    # 100,000 tuples, one in the other: no recursion, no crash
    refused(archive(tmp_path / "c.bin", b"\x80\x02)" + b"\x85" * 100_000 + b"."))
    # 2**60 items, were it ever unfolded
    refused(archive(tmp_path / "d.bin", b"\x80\x02)" + b"q\x00h\x00\x86" * 60 + b"."))


def test_damage_anywhere_is_an_error_or_leaves_a_dict_of_arrays(tmp_path):
    """Bytes changed at random, in the pickle (in a sound archive) and in the file as a whole."""
    rng = np.random.default_rng(0)
    state = {"a": torch.nn.Linear(2, 3).state_dict(), "b": {"c": torch.ones(2)}}
    whole = save(tmp_path / "whole.bin", state)
    old = save(tmp_path / "old.bin", state, _use_new_zipfile_serialization=False).read_bytes()
    with zipfile.ZipFile(whole) as file:
        (name,) = [name for name in file.namelist() if name.endswith("data.pkl")]
        program = file.read(name)
        storages = {str(i): file.read(name.replace("data.pkl", f"data/{i}")) for i in range(3)}
    path, errors = tmp_path / "a.bin", 0
    for turn in range(900):
        content = bytearray((whole.read_bytes(), program, old)[turn % 3])
        for _ in range(rng.integers(1, 4)):
            content[rng.integers(len(content))] = rng.integers(256)
        if turn % 3 == 1:
            archive(path, bytes(content), storages)
        else:
            path.write_bytes(content)
        try:
            found = read_state(path)
        except PSAError:
            errors += 1
            continue
        for group in found.values():
            assert all(type(tensor) is np.ndarray for tensor in (group.values() if type(group) is dict else [group]))
    assert 300 < errors < 900


# --- archives


def test_a_compressed_entry(tmp_path):
    path = tmp_path / "a.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", tensor_program(6, 0, (2,), (1,)))
        file.writestr("archive/data/0", b"\0" * (1 << 24))
    assert "is compressed" in refused(path)


@pytest.mark.parametrize(
    "name", ["archive/../../escape", "/archive/x", "other/data/0", "archive//x", "archive\\x", "x"]
)
def test_names_that_lead_elsewhere(tmp_path, name):
    assert "an entry is named" in refused(archive(tmp_path / "a.bin", b"\x80\x02}.", **{name: b""}))
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_one_entry_twice(tmp_path):
    assert "twice" in refused(archive(tmp_path / "a.bin", b"\x80\x02}.", **{"archive/data.pkl": b"\x80\x02}."}))


def test_overlapping_entries(tmp_path):
    """Two names for the same bytes: more content than file."""
    path = archive(tmp_path / "a.bin", b"\x80\x02}.", {"0": bytes(5000), "1": bytes(5000)})
    with zipfile.ZipFile(path) as file:
        first, second = file.getinfo("archive/data/0"), file.getinfo("archive/data/1")
        with path.open("rb") as raw:
            content = raw.read()
    start, end = second.header_offset, file.start_dir
    moved = content[:start] + content[end:]
    # The second entry's place in the directory is set to the first's; the directory itself has moved up.
    moved = moved.replace(second.header_offset.to_bytes(4, "little"), first.header_offset.to_bytes(4, "little"))
    moved = moved.replace(end.to_bytes(4, "little"), start.to_bytes(4, "little"))
    path.write_bytes(moved)
    assert len(zipfile.ZipFile(path).infolist()) == 3
    assert "larger than it is" in refused(path)


@pytest.mark.parametrize(
    ("limit", "says"),
    [("MAX_PICKLE_BYTES", "pickle is larger"), ("MAX_ENTRIES", "entries"), ("MAX_BYTES", "larger than any state dict")],
)
def test_limits(tmp_path, monkeypatch, limit, says):
    path = save(tmp_path / "a.bin", {"a": torch.ones(3)})
    monkeypatch.setattr(unpickle, limit, 2)
    assert says in refused(path)


def test_other_byte_order(tmp_path):
    path = archive(tmp_path / "a.bin", b"\x80\x02}.", **{"archive/byteorder": b"big"})
    assert "big-endian" in refused(path)
