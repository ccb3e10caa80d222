"""Optimised HLO, read from the compiler's text: computations, instructions, loops and source lines.

Only what a count of costs needs is read. The text is that of `jax.stages.Compiled.as_text()`.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

_COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%(?P<name>\S+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"\s+(?P<root>ROOT )?%(?P<name>\S+) = (?P<type>.*?) (?P<opcode>[a-z][a-z0-9-]*)\((?P<rest>.*)"
)
_SHAPE = re.compile(r"\b([a-z]+\d+[a-z0-9]*|pred)\[([\d,]*)\]")
_OPERAND = re.compile(r"%([\w.-]+)")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CALLED = re.compile(r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_FRAME = re.compile(r"stack_frame_id=(\d+)")
_SOURCE = re.compile(r'source_file="([^"]*)" source_line=(\d+)')
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_MOVES = ("copy", "bitcast", "reshape", "convert")
"""Opcodes that hand a number on."""


class Array(NamedTuple):
    """Type of an array.

    Attributes:
      dtype: in HLO's words, such as bf16.
      shape: its sizes.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        size = 1
        for axis in self.shape:
            size *= axis
        return size

    @property
    def bytes(self) -> int:
        """Bytes without padding; numbers of less than 8 bits count as one byte."""
        bits = re.search(r"\d+", self.dtype)
        return self.size * max(1, int(bits[0]) // 8 if bits else 1)


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
      name, opcode: in the compiler's words.
      results: the arrays that it makes.
      operands: names of its operands.
      rest: the text after the opening parenthesis: operands, attributes, metadata, configuration.
      root: whether the computation returns it.
    """

    name: str
    opcode: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def op_name(self) -> str:
        """Scopes and primitive, such as `jit(step)/unet/dot_general`; empty for what the compiler added itself."""
        found = _OP_NAME.search(self.rest)
        return found[1].replace("\\'", "'") if found else ""

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate; None where it makes none."""
        found = _CYCLES.search(self.rest)
        return None if found is None else int(found[1])

    @property
    def called(self) -> dict[str, str]:
        """Role -> name of the computations that it calls, such as `body`; branches are numbered from branch_0."""
        called = dict(_CALLED.findall(self.rest))
        branches = _BRANCHES.search(self.rest)
        if branches:
            called |= {f"branch_{i}": name for i, name in enumerate(_OPERAND.findall(branches[1]))}
        return called


Computation = dict[str, Instruction]
"""Instructions by name, in the order in which they run."""


class Module(NamedTuple):
    """A compiled program.

    Attributes:
      entry: name of the computation that runs.
      computations: all of them, by name.
      lines: number of a stack frame -> the innermost file and line of this project in it, such as `models/unet.py:210`.
    """

    entry: str
    computations: dict[str, Computation]
    lines: dict[int, str]

    def source(self, instruction: Instruction) -> str:
        """File and line that an instruction comes from; empty where it is not known."""
        frame = _FRAME.search(instruction.rest)
        if frame:
            return self.lines.get(int(frame[1]), "")
        found = _SOURCE.search(instruction.rest)
        return f"{_within(found[1])}:{found[2]}" if found else ""

    def root(self, computation: str) -> Instruction:
        """What a computation returns."""
        return next(each for each in self.computations[computation].values() if each.root)

    def trips(self, loop: Instruction, around: Computation) -> int | None:
        """How many times the body of a `while` runs; None where the text does not say it.

        A loop of `lax.scan` counts from a constant to a constant: the condition is i < n, and the body adds a constant.

        Args:
          loop: the instruction.
          around: the computation that it is in.
        """
        known = _KNOWN_TRIPS.search(loop.rest)
        if known:
            return int(known[1])
        condition, body = loop.called["condition"], loop.called["body"]
        test = self.root(condition)
        if test.opcode != "compare" or "direction=LT" not in test.rest:
            return None
        inside = self.computations[condition]
        counter = inside.get(test.operands[0])
        end = _constant(inside, test.operands[1])
        if end is None or counter is None or counter.opcode != "get-tuple-element":
            return None
        number = _index(counter)
        start, step = _element(around, loop.operands[0], number), self._step(body, number)
        if start is None or not step:
            return None
        return max(0, -(-(end - start) // step))

    def _step(self, body: str, number: int) -> int | None:
        """What a body adds to element `number` of its state."""
        inside, root = self.computations[body], self.root(body)
        if root.opcode != "tuple":
            return None
        added = _followed(inside, root.operands[number])
        if added is None or added.opcode != "add":
            return None
        parts = [_followed(inside, name) for name in added.operands]
        is_counter = [part is not None and part.opcode == "get-tuple-element" for part in parts]
        if not any(is_counter) or _index(parts[is_counter.index(True)]) != number:
            return None
        return _constant(inside, added.operands[1 - is_counter.index(True)])


def parse(text: str) -> Module:
    """Reads the text of a compiled program."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.endswith("{") and (begins := _COMPUTATION.match(line)):
            current = computations.setdefault(begins["name"], {})
            entry = begins["name"] if begins["entry"] else entry
        elif line == "}":
            current = None
        elif current is not None and (found := _INSTRUCTION.match(line)):
            current[found["name"]] = Instruction(
                found["name"],
                found["opcode"],
                tuple(_arrays(found["type"])),
                tuple(_OPERAND.findall(_inside(found["rest"]))),
                found["rest"],
                bool(found["root"]),
            )
    return Module(entry, computations, _frame_lines(text))


def _arrays(text: str) -> Iterator[Array]:
    for dtype, sizes in _SHAPE.findall(text):
        yield Array(dtype, tuple(int(size) for size in sizes.split(",") if size))


def _inside(rest: str) -> str:
    """The operands: up to the parenthesis that closes the first."""
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return rest[:place]
    return rest


def _index(instruction: Instruction) -> int:
    return int(re.search(r"\bindex=(\d+)", instruction.rest)[1])


def _followed(inside: Computation, name: str) -> Instruction | None:
    """The instruction behind copies."""
    found = inside.get(name)
    while found is not None and found.opcode in _MOVES:
        found = inside.get(found.operands[0])
    return found


def _constant(inside: Computation, name: str) -> int | None:
    found = _followed(inside, name)
    value = found and found.opcode == "constant" and re.match(r"(-?\d+)\)", found.rest)
    return int(value[1]) if value else None


def _element(inside: Computation, name: str, number: int) -> int | None:
    """The constant that is element `number` of a tuple."""
    found = inside.get(name)
    return None if found is None or found.opcode != "tuple" else _constant(inside, found.operands[number])


def _within(path: str) -> str:
    """A path from the package on, or from the folder of installed packages on: not where they are on this machine."""
    for folder in ("/psa_jax/", "/site-packages/"):
        if folder in path:
            return path.rpartition(folder)[2]
    return path.rpartition("/")[2]


def _frame_lines(text: str) -> dict[int, str]:
    """The tables in front of the computations: files, their places, and frames, each with the one around it."""
    head = text[: text.find("\n%")]
    files = {int(n): path for n, path in re.findall(r'^(\d+) "(.*)"$', _table(head, "FileNames"), re.MULTILINE)}
    places = {
        int(n): (int(file), int(line))
        for n, file, line in re.findall(r"^(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)", head, re.MULTILINE)
    }
    frames = {
        int(n): (int(place), int(parent or 0))
        for n, place, parent in re.findall(
            r"^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?", head, re.MULTILINE
        )
    }
    return {number: line for number in frames if (line := _line(number, files, places, frames))}


def _table(head: str, name: str) -> str:
    return head.partition(f"\n{name}\n")[2].partition("\n\n")[0]


def _line(
    number: int, files: dict[int, str], places: dict[int, tuple[int, int]], frames: dict[int, tuple[int, int]]
) -> str:
    """The innermost line of this project; of other code where there is none."""
    innermost, seen = "", set()
    while number in frames and number not in seen:
        seen.add(number)
        place, around = frames[number]
        number = around - 1  # the table counts the frame around from one more, so that 1 is none
        file, line = places.get(place, (0, 0))
        path = files.get(file, "")
        if "/psa_jax/" in path:
            return f"{_within(path)}:{line}"
        innermost = innermost or (f"{_within(path)}:{line}" if path else "")
    return innermost
