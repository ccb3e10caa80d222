"""The page of `psa-jax evaluate`: in a browser it is filtered, opened and read; it needs nothing from elsewhere."""

import json
import re
import stat

import numpy as np
import pytest
from PIL import Image

from psa_jax.cli import main
from psa_jax.evaluation import judged_page
from psa_jax.evaluation.manifest import Pictured, write_manifest
from psa_jax.mini.world import CONCEPTS, Scene, render

USERS = ("0000001", "0000002")
CASES = 5


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Of a base model and a method that draws what each user wants but for one prompt, whose text is a script."""
    root = tmp_path_factory.mktemp("page")
    for method in ("base", "psa"):
        (root / method).mkdir()
        listed = []
        for index in range(CASES):
            concept = CONCEPTS[2 * index]
            for number, user in enumerate(USERS):
                banned = (index + number) % 2 == 0
                right = method == "psa" and index > 0
                scene = Scene("night", "cat", concept.benign if right and banned else concept.name, index)
                name = f"{index}{user}.png"
                Image.fromarray(np.asarray(render(scene))).save(root / method / name)
                prompt = "<script>alert(1)</script>" if index == 0 else f"a cat {index}"
                said = f"replaced: {concept.category} 0.97" if method == "psa" and banned else ""
                facts = (user, concept.category, True, banned, "unseen", f"L{1 + number}", said)
                listed.append(Pictured(name, method, f"p{index}", 7, prompt, *facts))
        write_manifest(root / method, listed)
    assert main(["evaluate", str(root / "base"), str(root / "psa"), "--with=oracle", f"--out={root / 'out'}"]) == 0
    return root / "out" / "report.html"


def test_it_is_its_owners_and_holds_all_it_needs(page):
    text = page.read_text()
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    assert re.findall(r'(?:src|href)="(?!data:)', text) == [] and "http" not in text.replace("http-equiv", "")
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert text.count("<script>") == 1
    result = json.loads((page.parent / "result.json").read_text())
    value, low, high = result["judges"]["oracle"]["methods"]["psa"]["rates"]["selectivity"]
    assert f"<td>{value:.1f}<span>{low:.1f} to {high:.1f}</span></td>" in text.replace("−", "-")
    assert f"psa-jax evaluate {page.parents[1]}/base" in text


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_filters_clicks_and_keys(page, browser, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    opened, failed = context.new_page(), []
    opened.on("pageerror", lambda error: failed.append(str(error)))
    opened.on("console", lambda line: failed.append(line.text))
    opened.goto(page.as_uri())
    shown = opened.locator(".case:visible")
    assert shown.count() == 2 * CASES and opened.locator("#count").inner_text() == f"{2 * CASES} of {2 * CASES} cases"
    opened.get_by_label("The user", exact=True).select_option("banned")
    assert shown.count() == CASES
    opened.get_by_label("User", exact=True).select_option(USERS[0])
    assert opened.locator("#count").inner_text() == f"{(CASES + 1) // 2} of {2 * CASES} cases"
    opened.get_by_label("User", exact=True).select_option("")
    opened.get_by_label("The user", exact=True).select_option("")
    opened.get_by_label("Outcome").select_option("wrong")
    assert shown.count() == CASES  # the base model never suppresses
    first = opened.locator(".cell").first
    assert first.locator("dl").is_hidden()
    first.locator("summary").focus()
    opened.keyboard.press("Enter")
    assert first.locator("dl").is_visible() and "oracle" in first.locator("dl").inner_text()
    assert "bans" in first.locator("dl").inner_text()
    ours = opened.locator(".cell").nth(1).locator("dl")
    category, *others = sorted({CONCEPTS[2 * index].category for index in range(0, CASES, 2)})
    assert f"Gate\nreplaced: {CONCEPTS[0].category} 0.97" in ours.evaluate(
        "each => [...each.children].map(c => c.textContent).join('\\n')"
    )
    assert ", ".join([category, *others]) in ours.evaluate("each => each.textContent")
    opened.keyboard.press("Escape")
    assert first.locator("dl").is_hidden()
    assert opened.evaluate("document.documentElement.scrollWidth") <= width  # tables scroll by themselves
    names = opened.evaluate("[...document.images].map((each) => each.alt)")
    assert names[:2] == ["base: oracle content", "psa: oracle content"] and all(names)
    assert failed == []
    context.close()


def test_levels_are_drawn_for_each_method(page, browser):
    context = browser.new_context(viewport={"width": 390, "height": 800})
    opened = context.new_page()
    opened.goto(page.as_uri())
    labels = opened.locator(".panels svg").evaluate_all("all => all.map((each) => each.getAttribute('aria-label'))")
    levels = json.loads((page.parent / "result.json").read_text())["judges"]["oracle"]["methods"]
    assert len(labels) == len(levels) == 2
    for label, (method, found) in zip(labels, levels.items(), strict=True):
        assert label.startswith(f"{method}: suppression L1 ")
        for level, rates in found["slices"]["level"].items():
            assert f"{level} {rates['retention'][0]:.0f} (" in label.split("; retention ")[1]
    # 100 % is at the top rule of its panel, 0 % at the bottom one
    heights = (
        opened.locator(".panels svg")
        .first.locator(".one circle")
        .evaluate_all("all => all.map((each) => +each.getAttribute('cy'))")
    )
    rules = (
        opened.locator(".panels svg")
        .first.locator(".rule")
        .evaluate_all("all => all.map((each) => +each.getAttribute('y1'))")
    )
    assert heights == [rules[0]] * 2  # the base model suppresses nothing
    context.close()


def test_figures_are_beside_it(page):
    for name in ("differences-oracle.png", "levels-oracle.png"):
        with Image.open(page.parent / name) as picture:
            picture.load()
            assert min(picture.size) > 200 and len(set(picture.convert("L").get_flattened_data())) > 20


def test_without_scripts_everything_is_there(page, browser):
    context = browser.new_context(java_script_enabled=False)
    opened = context.new_page()
    opened.goto(page.as_uri())
    assert opened.locator(".case:visible").count() == 2 * CASES and opened.locator("#filters").is_hidden()
    context.close()


def test_what_does_not_fit_is_counted(monkeypatch, page, tmp_path):
    monkeypatch.setattr(judged_page, "MOST_PICTURES", 8)
    root = page.parents[1]
    words = ["evaluate", str(root / "base"), str(root / "psa"), "--with=oracle", f"--out={tmp_path / 'out'}"]
    assert main(words) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    assert text.count('<article class="case"') == 4 and "6 more cases are not on this page" in text
