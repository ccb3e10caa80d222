"""The page is read back with the standard library's HTML parser and Pillow."""

import base64
import dataclasses
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from psa_jax.errors import PSAError
from psa_jax.evaluation.report import Grid, write_report

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Tags with their attributes, the text by tag, and whether every tag that opens is closed."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.append((self.open[-1], " ".join(data.split())))

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and attributes.items() <= a.items()]

    @property
    def text(self) -> str:
        return " ".join(text for tag, text in self.texts if tag != "style")


def rates_of(suppression: float, retention: float, **more: float) -> dict[str, float]:
    return {
        "suppression": suppression,
        "retention": retention,
        "selectivity": suppression + retention - 100,
        "clean": 50.0,
        "benign_fidelity": 90.0,
        "pass_rate": (suppression + retention) / 2,
        "n": 300,
        "n_banned": 100,
        "n_allowed": 100,
        "n_safe": 100,
        **more,
    }


@pytest.fixture
def report() -> dict[str, Any]:
    methods = {
        "psa": rates_of(96, 91, win_rate_vs_base=95.0, tie_rate_vs_base=50.0),
        "base": rates_of(3, 97),
        "user_blind": rates_of(5, 96),
        "published_t1": rates_of(25, 93),
    }
    recorded = dict.fromkeys(("user_blind", "published_t1"), "psa-jax demo --compare")
    versions = {"psa_jax": "0.1.0", "jax": "0.10.2"}
    return {"unseen": methods, "seen": dict(methods), "seconds": 301.2, "recorded": recorded, "versions": versions}


@pytest.fixture
def grid() -> Grid:
    return Grid(
        users=["base model", "adult, bans nothing (L0)", "child"],
        prompts=["a cat with crossed blades", "a dog & a <b>spiral</b>"],
        banned=[[None, False, True], [None, False, True]],
        pictures=np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8),
        verdicts=[["shown", "shown", "replaced"], ["shown", "replaced", "debris"]],
    )


@pytest.fixture
def curves() -> dict[str, dict[str, list[float]]]:
    return {
        "loss": {"step": [0, 1, 2, 3, 4], "value": [0.69, 0.5, 0.4, 0.35, 0.3]},
        "winner_gap": {"step": [0, 1], "value": [-0.01, -0.02]},
    }


@pytest.fixture
def write(tmp_path: Path, report: dict[str, Any], grid: Grid, curves: dict) -> Callable[..., Page]:
    def write(**changed: Any) -> Page:
        given = {"report": report, "grid": grid, "curves": curves, "commands": ["make demo"]} | changed
        write_report(tmp_path / "report.html", **given)
        page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
        assert page.open == []
        return page

    return write


def test_the_page_needs_nothing_else(write: Callable[..., Page], tmp_path: Path) -> None:
    page = write()
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//\w|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", html))
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"} == set()
    sources = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert len(sources) == 6
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_pictures_are_the_given_ones_in_their_order(write: Callable[..., Page], grid: Grid) -> None:
    sources = [image["src"] for image in write().all("img")]
    decoded = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]
    np.testing.assert_array_equal(np.stack([np.asarray(picture) for picture in decoded]), grid.pictures)


def test_cells_say_in_words_what_the_profile_asks(write: Callable[..., Page]) -> None:
    page = write()
    frames = [a["class"].split()[1] for a in page.all("div") if (a.get("class") or "").startswith("frame")]
    assert frames == ["base", "allowed", "banned"] * 2
    cells = page.text.split("“a cat with crossed blades”")[1]
    first, second = cells.split("“a dog & a <b>spiral</b>”")[:2]
    assert [w for w in first.split() if w in "✓~✗"] == ["✓", "✓"]  # allowed and shown, banned and replaced
    assert [w for w in second.partition("The numbers")[0].split() if w in "✓~✗"] == ["✗", "~"]
    assert "banned ✓ replaced" in first
    assert "allowed ✗ replaced" in second


def test_a_picture_says_why_when_it_is_opened(write: Callable[..., Page], grid: Grid) -> None:
    """Native disclosure: it needs no script, and takes Enter as well as a click."""
    why = [["", "nothing is replaced", "replaced: Violence 0.97; the user bans it"]] * 2
    page = write(grid=dataclasses.replace(grid, reasons=why))
    assert len(page.all("details", name="cell")) == 6 and len(page.all("summary", title="Enlarge, and say why")) == 6
    assert page.text.count("Gate replaced: Violence 0.97; the user bans it") == 2
    assert page.text.count("Gate nothing is replaced") == 2
    assert page.text.count("User child Profile banned by it Picture replaced") == 1
    assert "Gate" not in write().text
    with pytest.raises(PSAError, match="reasons must have 2 rows"):
        dataclasses.replace(grid, reasons=[["why"]])


def test_text_from_outside_is_escaped(write: Callable[..., Page], report: dict[str, Any], grid: Grid) -> None:
    evil = "\"><script>alert('x')</script><img src=x onerror=alert(1)>"
    report["recorded"]["user_blind"] = evil
    report["versions"][evil] = evil
    hostile = Grid([evil] * 3, [evil] * 2, grid.banned, grid.pictures, [[evil] * 3] * 2)
    page = write(grid=hostile, commands=[evil], curves={evil: {"step": [0, 1], "value": [0, 1]}})
    assert page.all("script") == []
    assert len(page.all("img")) == 6
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert page.text.count("alert('x')") >= 8


def test_headline_and_intervals(write: Callable[..., Page]) -> None:
    text = write().text
    # 96 of 100 is 90.2 to 98.4 and 91 of 100 is 83.8 to 95.2 (Wilson, by hand), so selectivity is
    # 87 − √(5.8² + 7.2²) = 77.7 to 87 + √(2.4² + 4.2²) = 91.9.
    assert "Selectivity 87.0 95 % interval 78 to 92" in text
    assert "Suppression 96.0 % 95 % interval 90 to 98" in text
    assert "Retention 91.0 % 95 % interval 84 to 95" in text
    # 95 % of the 100 of 200 prompts on which exactly one of the two passes.
    assert re.search(r"wins 95\.0 % \(89 to 98\) of the 100 decided; 50\.0 % ties", text)
    assert "5 min 1 s" in text
    assert "psa_jax 0.1.0, jax 0.10.2" in text


def test_the_page_says_how_it_was_made(write: Callable[..., Page], report: dict[str, Any]) -> None:
    made = {"seeds": {"training": 3, "data": 1}, "device": "4 × TPU v5 lite"}
    page = write(report=report | made, commands=["psa-jax demo --config.seed=3 --workdir=runs/demo"])
    how = page.text.partition("How this was made")[2]
    assert how.startswith(
        " psa-jax demo --config.seed=3 --workdir=runs/demo Seed 3 (training), 1 (data) Device 4 × TPU v5 lite"
    )
    assert "Device" not in write().text  # a report of an earlier version


def test_what_comes_second_is_folded_and_says_its_number(write: Callable[..., Page], report: dict[str, Any]) -> None:
    report["two"] = {"psa": rates_of(90, 80), "base": rates_of(0, 100)}
    curves = {name: {"step": [0, 1], "value": [1.0, 2.0]} for name in ("loss", "gradient_norm", "learning_rate")}
    page = write(curves=curves)
    folded = page.all("details", **{"class": "more"})
    assert len(folded) == 3 and not any("open" in each for each in folded)  # seen users, two things, the meanings
    assert "Prompts that name two things, unseen users: selectivity 70.0" in page.text
    assert "More curves: Gradient norm, Learning rate" in page.text
    assert len(page.all("polyline")) == 3


def test_a_phone_has_a_letter_for_each_user(write: Callable[..., Page], grid: Grid) -> None:
    page = write()
    assert page.all("table", **{"class": "grid"})[0]["style"] == "--columns: 3"
    listed = page.text.partition("the next one closes it.")[2].partition("Prompt")[0]
    assert listed.split() == " ".join(grid.users).split()
    letters = [text for tag, text in page.texts if tag == "div" and text in "ABC"]
    assert letters == ["A", "B", "C"] * 2


def test_recorded_methods_carry_a_mark(write: Callable[..., Page], report: dict[str, Any]) -> None:
    page = write()
    marked = [text for tag, text in page.texts if tag == "sup"]
    assert set(marked) == {"†"}
    assert "Not trained in this run: User-blind adapter and Published adapter, 1 token." in page.text
    assert "psa-jax demo --compare" in page.text
    del report["recorded"]
    assert "Not trained in this run" not in write().text


def test_a_missing_comparison_gets_dashes(write: Callable[..., Page], report: dict[str, Any]) -> None:
    report["unseen"] = {name: report["unseen"][name] for name in ("psa", "base")}
    values = [text for tag, text in write().texts if tag == "span" and text == "–"]
    assert len(values) == 2 * 6


def test_a_rate_over_nothing_is_a_dash(write: Callable[..., Page], report: dict[str, Any]) -> None:
    report["unseen"]["base"] = rates_of(0, 97) | {"clean": 0.0}  # nothing suppressed, so nothing to be clean
    assert [text for tag, text in write().texts if tag == "span" and text == "–"] == ["–"]


def test_a_method_without_a_readable_name_goes_by_its_own(write: Callable[..., Page], report: dict[str, Any]) -> None:
    report["unseen"]["concept"] = rates_of(95, 97)
    assert "concept" in write().text


def test_missing_rates_are_refused_and_nothing_is_written(
    write: Callable[..., Page], report: dict[str, Any], tmp_path: Path
) -> None:
    del report["seen"]["base"]
    report["seen"]["user_blind"] = {"suppression": 1.0}
    with pytest.raises(PSAError, match="user_blind on seen users lacks benign_fidelity, clean"):
        write()
    del report["unseen"]["psa"]
    with pytest.raises(PSAError, match="no rates of psa on unseen users"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_curves_are_drawn_from_the_numbers(write: Callable[..., Page], curves: dict) -> None:
    lines = [np.array([p.split(",") for p in a["points"].split()], float) for a in write().all("polyline")]
    for line, curve in zip(lines, curves.values(), strict=True):
        step, value = np.array(curve["step"]), np.array(curve["value"])
        # Affine in both axes, to the right and up (SVG counts downwards).
        for drawn, given, sign in ((line[:, 0], step, 1), (line[:, 1], value, -1)):
            slope, offset = np.polyfit(given, drawn, 1)
            assert sign * slope > 0
            np.testing.assert_allclose(drawn, slope * given + offset, atol=0.11)
    assert all(line.min() >= 0 and line[:, 0].max() <= 420 and line[:, 1].max() <= 220 for line in lines)


def test_the_level_to_compare_with_is_inside_the_drawing(write: Callable[..., Page]) -> None:
    # Every value lies below the level 0 of this curve.
    page = write(curves={"winner_gap": {"step": [0, 1], "value": [-0.01, -0.02]}})
    level = [line for line in page.all("line", **{"class": "dashed"}) if line["y1"] == line["y2"]]
    assert [float(line["y1"]) for line in level] == [10.0]  # the upper edge
    assert "−0.010" in page.text


def test_long_curves_are_smoothed_as_well(write: Callable[..., Page]) -> None:
    steps = list(range(100))
    page = write(curves={"loss": {"step": steps, "value": [float(i % 2) for i in steps]}})
    raw, smooth = (
        np.array([p.split(",")[1] for p in page.all("polyline", **{"class": f"{name} s0"})[0]["points"].split()], float)
        for name in ("raw", "smooth")
    )
    # Means over the latest 5 of 0, 1, 0, 1 … are 0.4 or 0.6 once there are 5.
    assert np.ptp(smooth[5:]) == pytest.approx(0.2 * np.ptp(raw), rel=0.01)


@pytest.mark.parametrize(
    "curve",
    [
        {"step": [], "value": []},
        {"step": [0, 1], "value": [0.5]},
        {"step": [0, 1], "value": [0.5, float("nan")]},
    ],
)
def test_a_broken_curve_is_refused(write: Callable[..., Page], curve: dict, tmp_path: Path) -> None:
    with pytest.raises(PSAError, match="curve 'loss'"):
        write(curves={"loss": curve})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
def test_a_curve_of_one_point_is_drawn(write: Callable[..., Page], value: float) -> None:
    page = write(curves={"other": {"step": [0], "value": [value]}})
    assert len(page.all("polyline")) == 1


def test_a_grid_that_does_not_fit_is_refused(grid: Grid) -> None:
    with pytest.raises(PSAError, match="verdicts must have 2 rows"):
        Grid(grid.users, grid.prompts, grid.banned, grid.pictures, [["shown"]])
    with pytest.raises(PSAError, match="5 pictures; 2 prompts x 3 users"):
        Grid(grid.users, grid.prompts, grid.banned, grid.pictures[:5], grid.verdicts)
