"""The page in a browser: keyboard, narrow and dark screens, and no request that leaves this machine."""

import time

import pytest
from support.playground_server import serving

from psa_jax.playground.asked import MOST_USERS
from psa_jax.playground.page import EXAMPLES, FIRST, PRESETS, render_page
from psa_jax.profiles.schema import UserProfile

CONTROLS = ("preset", "age", "gender", "religion", "physical_condition", "mental_condition")


@pytest.fixture
def opened(browser):
    """Returns a function that opens a page; afterwards: nothing went elsewhere, no script failed, nothing is kept."""
    contexts, asked, failed = [], [], []

    def open_page(served, width: int = 1280, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("request", lambda request: asked.append((served.url, request.url)))
        page.on("pageerror", lambda error: failed.append(str(error)))
        page.on("console", lambda line: failed.append(line.text) if "Content Security" in line.text else None)
        page.goto(served.url)
        return page

    yield open_page
    for context in contexts:
        assert context.cookies() == [] and context.storage_state()["origins"] == []
        context.close()
    assert failed == []
    assert {url for own, url in asked if not url.startswith((f"{own}/", "data:"))} == set()
    assert {url.removeprefix(own) for own, url in asked if url.startswith(own)} <= {"/", "/draw"}


def pictures(page) -> list[str]:
    return page.eval_on_selector_all(".user .frame img", "images => images.map(image => image.src)")


def drawn(page, before: list[str] | None = None) -> list[str]:
    """Waits until a set is there, with `before` another one, and returns its pictures."""
    ready = """before => {
      const sources = [...document.querySelectorAll(".user .frame img")].map((image) => image.src);
      const idle = document.querySelector("#users").ariaBusy === "false";
      const said = document.querySelector("#status").textContent;
      return idle && said.startsWith("Drawn") && JSON.stringify(sources) !== JSON.stringify(before);
    }"""
    page.wait_for_function(ready, arg=before)
    return pictures(page)


def focused(page) -> str:
    """The control that has the focus, by its field, id or class."""
    return page.evaluate("() => { const e = document.activeElement; return e.dataset.field ?? (e.id || e.className); }")


def test_by_keyboard_alone(opened, served):
    page = opened(served)
    assert focused(page) == "prompt"
    page.keyboard.type("a cat")
    page.keyboard.press("Enter")
    first = drawn(page)
    assert len(set(first)) == len(FIRST) == 3
    order = []
    for _ in range(60):
        page.keyboard.press("Tab")
        order.append(focused(page))
        ring = page.evaluate("getComputedStyle(document.activeElement).outline")
        assert "3px" in ring and "solid" in ring, order
        if order[-1] == "add":
            break
    one = ["plain remove", "", "", *CONTROLS, ""]  # summaries: the gate, the profile, its own bans
    assert order == [
        "draw",
        "plain example",
        "plain example",
        "seed",
        "next",
        "steps",
        "guidance",
        "scale",
        *one * 3,
        "add",
    ]


def test_the_slider_by_keyboard(opened, served):
    page = opened(served)
    page.keyboard.type("a cat")
    page.keyboard.press("Enter")
    first = drawn(page)
    page.focus("#scale")
    for _ in range(3):
        page.keyboard.press("ArrowLeft")
    assert page.text_content("#scale-shown") == "0.85"
    second = drawn(page, first)
    assert all(one != other for one, other in zip(first, second, strict=True))
    page.keyboard.press("End")
    assert drawn(page, second) == first
    page.keyboard.press("Home")
    assert page.text_content("#scale-shown") == "0.05"  # not the base model


def test_users_come_and_go(opened, served):
    page = opened(served)
    page.fill("#prompt", "a cat")
    page.keyboard.press("Enter")
    first = drawn(page)
    page.select_option(".user:nth-child(2) [data-field=preset]", "Child")
    second = drawn(page, first)
    assert second == [first[0], first[0], first[2]]  # the same profile, noise and prompt
    page.fill(".user:nth-child(2) [data-field=age]", "300")
    page.keyboard.press("Tab")
    page.wait_for_selector(".user:nth-child(2) .error:not(:empty)")
    assert 'user 2: "age" has a value that is not allowed' in page.text_content(".user:nth-child(2) .error")
    assert page.get_attribute(".user:nth-child(2) [data-field=age]", "aria-invalid") == "true"
    assert pictures(page) == []  # an old picture beside a new profile would mislead
    page.click(".user:nth-child(2) .remove")
    page.click(".user:nth-child(2) .remove")
    assert focused(page) == "plain remove"
    page.click(".user .remove")
    page.click("#draw")
    page.wait_for_selector("#users-error:not(:empty)")
    assert page.text_content("#users-error") == "nobody is there to draw for; add a user"
    page.click("#add")
    assert drawn(page) == [first[0]]
    for _ in range(MOST_USERS - 1):
        page.click("#add")
    assert page.is_disabled("#add") and page.locator(".user").count() == MOST_USERS


def test_a_ban_of_ones_own_changes_the_picture(opened, served_bits):
    page = opened(served_bits)
    page.fill("#prompt", "a cat")
    page.keyboard.press("Enter")
    first = drawn(page)
    adult = page.locator(".user:nth-child(2)")
    adult.locator(".bans summary").press("Enter")
    adult.locator(".bans input[value=Violence]").press("Space")
    second = drawn(page, first)
    assert [one == other for one, other in zip(first, second, strict=True)] == [True, False, True]
    assert adult.locator(".bans summary").text_content() == "Own bans: Violence"
    assert adult.locator("h2").text_content() == "2. Own profile"
    assert adult.locator(".gates dt").first.text_content() == "Violence"
    adult.locator(".bans input[value=Hate]").press("Space")  # which this gate does not act on
    page.wait_for_selector("#status.failed")
    assert "not sure to act on the bans" in page.text_content("#status") and pictures(page) == []
    adult.locator("[data-field=preset]").select_option("Adult")  # a preset has no bans of its own
    assert drawn(page) == first and adult.locator(".bans :checked").count() == 0


def test_the_base_model_is_labelled(opened, served_open):
    page = opened(served_open)
    page.fill("#prompt", "a cat")
    page.keyboard.press("Enter")
    drawn(page)
    assert page.text_content(".unprotected .tag") == "Unprotected"
    assert page.get_attribute(".unprotected img", "alt") == "a cat, drawn by the base model, unprotected"
    page.uncheck("#base")
    page.wait_for_selector(".unprotected img", state="detached")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_has_nothing_beside_it(opened, served_open, scheme):
    page = opened(served_open, width=360, scheme=scheme)
    page.fill("#prompt", "a very long word: " + "x" * 300)
    page.keyboard.press("Enter")
    drawn(page)
    for each in page.locator(".user details").all():
        each.evaluate("details => { details.open = true; }")
    assert page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth, innerWidth]") == [360] * 3
    page.fill("#seed", "x")
    page.keyboard.press("Enter")
    page.wait_for_selector("#seed-error:not(:empty)")
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_dark_is_dark(opened, served):
    colours = {}
    for scheme in ("light", "dark"):
        page = opened(served, scheme=scheme)
        for part in ("body", ".card", "#prompt"):
            shades = "element => { const s = getComputedStyle(element); return [s.color, s.backgroundColor]; }"
            text, back = page.eval_on_selector(part, shades)
            ink, paper = (sum(map(int, colour[4:-1].split(", "))) for colour in (text, back))
            assert (ink > paper) == (scheme == "dark") and abs(ink - paper) > 450
            colours[scheme, part] = text, back
    assert all(colours["light", part] != colours["dark", part] for part in ("body", ".card", "#prompt"))


def test_a_reply_that_is_out_of_date_is_not_shown(opened, studio):
    seeds = []

    def slow(asked):
        seeds.append(asked.seed)
        time.sleep(0.5 if asked.seed == 1 else 0.0)
        return studio.draw(asked) | {"notes": [f"seed {asked.seed}"]}

    with serving(slow) as there:
        page = opened(there)
        page.fill("#prompt", "a cat")
        page.keyboard.press("Enter")
        page.wait_for_function("() => document.querySelector('#users').ariaBusy === 'true'")
        page.fill("#seed", "2")
        for _ in range(3):
            page.keyboard.press("Enter")
        drawn(page)
        assert page.text_content("#status").endswith("seed 2") and seeds == [1, 2]


def test_the_presets_are_profiles():
    assert {name: UserProfile.from_mapping(profile).age for name, profile in PRESETS.items()}["Child"] == 9
    assert set(FIRST) < set(PRESETS)
    about = {"facts": {}, "steps": 20, "guidance": 7.5, "size": 512, "examples": (), "allow_unprotected": False}
    page = render_page("n", **about, own_bans=False)
    assert "Own bans" not in page and "Own bans" in render_page("n", **about, own_bans=True)
    assert not any(example in page for example in EXAMPLES) and 'min="0.05"' in page and 'class="users "' in page
