"""Verdicts on disk: judged once, and the same bytes however often the run was stopped."""

import dataclasses
import random
import stat

import numpy as np
import pytest
from PIL import Image

from psa_jax.errors import PSAError
from psa_jax.evaluation.protocol import Case, Verdicts
from psa_jax.evaluation.readings import Readings

CASE = Case("", "a cat", "Violence", True, False)


class Brightness:
    """A judge that says what any reader of the picture can work out, and counts what it is asked.

    Its scores depend on the batch, as sums in another order do.
    """

    sees = frozenset({"Violence"})
    batch = 4

    def __init__(self, reads_prompts: bool = False, stops_after: int | None = None, **about):
        self.about = {"judge": "brightness", "threshold": 0.5} | about
        self.reads_prompts, self.asked, self._left = reads_prompts, [], stops_after

    def __call__(self, pictures, cases):
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise KeyboardInterrupt
        means = np.array([picture.mean() / 255 for picture in pictures])
        self.asked += [round(float(mean), 3) for mean in means]
        return Verdicts(means > 0.5, clean=means < 0.9, scores=means + 1e-9 * len(pictures))


@pytest.fixture
def paths(tmp_path):
    found = []
    for index in range(22):
        found.append(tmp_path / f"{index}.png")
        Image.fromarray(np.full((2 + index, 3, 3), 11 * index, np.uint8)).save(found[-1])
    return found


def test_verdicts_are_those_of_the_judge_and_asked_for_once(tmp_path, paths):
    judge = Brightness()
    twice = [*paths, *paths[:3]]
    readings = Readings(tmp_path / "r.jsonl", judge)
    found = readings.judged(twice, [CASE] * len(twice), "brightness")
    wanted = [11 * index / 255 > 0.5 for index in range(22)]
    assert found.has_content.tolist() == [*wanted, *wanted[:3]] and len(judge.asked) == len(readings) == 22
    assert found.clean.tolist()[-4:] == [False, True, True, True] and found.faithful is None
    again = Brightness(stops_after=0)
    later = Readings(tmp_path / "r.jsonl", again).judged(twice, [CASE] * len(twice), "brightness")
    for name, values in dataclasses.asdict(found).items():
        np.testing.assert_array_equal(values, getattr(later, name))


def test_a_run_stopped_five_times_ends_with_the_same_bytes(tmp_path, paths):
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    Readings(whole, Brightness()).judged(paths, [CASE] * 22, "all")
    for seed in range(5):
        with pytest.raises(KeyboardInterrupt):
            Readings(stopped, Brightness(stops_after=1)).judged(paths, [CASE] * 22, "some")
        content = stopped.read_bytes()
        # A kill in the middle of a write leaves any number of bytes of the last lines.
        stopped.write_bytes(content[: len(content) - random.Random(seed).randrange(150)])
    Readings(stopped, Brightness()).judged(paths, [CASE] * 22, "the rest")
    assert stopped.read_bytes() == whole.read_bytes()


def test_hosts_share_the_work(tmp_path, paths):
    """Three hosts, one of them stopped: the last call judges what is missing; verdicts are those of one host."""
    alone = Readings(tmp_path / "alone.jsonl", Brightness()).judged(paths, [CASE] * 22, "alone")
    judges = [Brightness(), Brightness(stops_after=1), Brightness()]
    for host in (0, 2):
        assert Readings(tmp_path / "r.jsonl", judges[host], (host, 3)).judged(paths, [CASE] * 22, "part") is None
    with pytest.raises(KeyboardInterrupt):
        Readings(tmp_path / "r.jsonl", judges[1], (1, 3)).judged(paths, [CASE] * 22, "part")
    assert [len(judge.asked) for judge in judges] == [8, 4, 6]  # 22 pictures in batches of 4, by turns
    last = Brightness()
    together = Readings(tmp_path / "r.jsonl", last).judged(paths, [CASE] * 22, "all")
    assert len(last.asked) == 4
    for name, values in dataclasses.asdict(alone).items():
        np.testing.assert_array_equal(values, getattr(together, name))
    with pytest.raises(PSAError, match=r"r\.0-of-3\.jsonl: holds verdicts of another judge \(threshold\)"):
        Readings(tmp_path / "r.jsonl", Brightness(threshold=0.7))


def test_a_judge_that_reads_prompts_is_asked_for_each(tmp_path, paths):
    cases = [CASE, CASE, dataclasses.replace(CASE, category="Hate"), dataclasses.replace(CASE, prompt="a dog")]
    cases.append(dataclasses.replace(CASE, user_id="0000001", banned=True))  # nothing that it is told
    for reads, asked in ((True, 3), (False, 1)):
        judge = Brightness(reads_prompts=reads)
        Readings(tmp_path / f"{reads}.jsonl", judge).judged([paths[0]] * 5, cases, "one")
        assert len(judge.asked) == asked


def test_another_judge_is_refused_and_what_differs_is_named(tmp_path, paths):
    path = tmp_path / "r.jsonl"
    Readings(path, Brightness()).judged(paths[:1], [CASE], "one")
    for about in ({"threshold": 0.6}, {"weights": "0"}):
        with pytest.raises(
            PSAError, match=f"r.jsonl: holds verdicts of another judge .{next(iter(about))}.; give anot"
        ):
            Readings(path, Brightness(**about))
    path.write_text("no JSON\n")
    with pytest.raises(PSAError, match="r.jsonl, line 1"):
        Readings(path, Brightness())


@pytest.mark.parametrize("line", ["{}", '{"key": "a", "content": true}', "[]", "{"])
def test_a_damaged_line_is_named(tmp_path, paths, line):
    path = tmp_path / "r.jsonl"
    Readings(path, Brightness()).judged(paths[:1], [CASE], "one")
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(PSAError, match="r.jsonl, line 3"):
        Readings(path, Brightness())


def test_a_picture_that_cannot_be_read_is_no_verdict(tmp_path, paths):
    paths[2].write_bytes(paths[2].read_bytes()[:40])
    with pytest.raises(PSAError, match=r"2\.png"):
        Readings(tmp_path / "r.jsonl", Brightness()).judged(paths, [CASE] * 22, "all")
    assert (tmp_path / "r.jsonl").read_bytes().count(b"\n") == 1  # the header alone


def test_an_error_of_the_judge_names_the_picture(tmp_path, paths):
    class Refuses(Brightness):
        def __call__(self, pictures, cases):
            raise PSAError("no")

    with pytest.raises(PSAError, match=r"/0\.png and what follows it: no"):
        Readings(tmp_path / "r.jsonl", Refuses()).judged(paths, [CASE] * 22, "all")


def test_the_file_is_private_where_the_folder_is(tmp_path, paths):
    from psa_jax.files import owner_only

    with owner_only():
        Readings(tmp_path / "r.jsonl", Brightness()).judged(paths[:1], [CASE], "one")
    assert stat.S_IMODE((tmp_path / "r.jsonl").stat().st_mode) == 0o600
