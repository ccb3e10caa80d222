"""The page of a sweep: in a browser it is filtered and read; it needs nothing from elsewhere."""

import json
import re

import pytest

from psa_jax.cli import main
from psa_jax.sweeps.plan import PLAN_FILE

BETAS, RATES, SEEDS = ("30.0", "60.0", "<b>"), ("0.0001", "0.001"), ("0", "1")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Of 3 × 2 settings and two seeds each: the loss is known, one point has diverged, one has just begun."""
    root = tmp_path_factory.mktemp("sweep")
    points = {}
    for b, beta in enumerate(BETAS):
        for r, rate in enumerate(RATES):
            for seed in SEEDS:
                name = f"{b}-{r}-{seed}"
                points[name] = {"objective.beta": beta, "optimizer.learning_rate": rate, "seed": seed}
                (root / name).mkdir()
                loss = 1.0 + b + 10 * r + 0.5 * int(seed)
                rows = [{"step": step, "loss": loss + 3 - step, "held_out_accuracy": 0.5} for step in (1, 2, 3)]
                ends = (b, r, seed) not in ((2, 1, "1"), (1, 1, "0"))
                (root / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
                if ends:
                    (root / name / "psa_adapter.safetensors").touch()
                elif b == 2:
                    (root / name / "nonfinite_3.json").touch()
    plan = {"config": "tiny:dpo", "overrides": {"steps": "3"}, "points": points}
    (root / PLAN_FILE).write_text(json.dumps(plan))
    return root / "sweep.html"


@pytest.fixture(scope="module")
def last(page):
    """The last line of the command that writes the page."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["sweep", "report", str(page.parent)]) == 0
    return json.loads(out.getvalue().splitlines()[-1])


def test_the_best_is_said_and_aggregated(page, last):
    """Seeds of the best: 1 and 1.5, mean 1.25, s = 0.353553, t of one degree of freedom 12.7062, so ± 3.17655."""
    assert last["best"]["overrides"] == {"objective.beta": "30.0", "optimizer.learning_rate": "0.0001"}
    assert last["best"]["mean"] == 1.25 and last["best"]["half"] == pytest.approx(3.17655, abs=1e-5)
    assert (last["points"], last["done"], last["diverged"], last["unfinished"]) == (12, 10, 1, 1)
    text = page.read_text()
    assert "Best loss (min): <strong>1.25 ± 3.177</strong> with beta 30.0, learning_rate 0.0001." in text
    assert text.count('<tr class="best"') == 1
    assert len((page.parent / "sweep.csv").read_text().splitlines()) == 13


def test_it_holds_all_it_needs(page, last):
    text = page.read_text()
    assert re.findall(r'(?:src|href)="(?!data:)', text) == [] and "http" not in text.replace("http-equiv", "")
    assert "<b>" not in text and "&lt;b&gt;" in text and text.count("<script>") == 1


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_filters(page, last, browser, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    opened, failed = context.new_page(), []
    opened.on("pageerror", lambda error: failed.append(str(error)))
    opened.on("console", lambda line: failed.append(line.text))
    opened.goto(page.as_uri())
    lines, rows = opened.locator(".point:not(.out)"), opened.locator("tbody tr:visible")
    assert (lines.count(), rows.count()) == (11, 6)  # the one that diverged has no line
    assert opened.locator(".point.unfinished").count() == 1
    opened.get_by_label("objective.beta").select_option("60.0")
    assert (lines.count(), rows.count()) == (4, 2)
    opened.get_by_label("seed").select_option("1")
    assert (lines.count(), rows.count()) == (2, 2)  # a row is of all seeds
    assert opened.locator("#count").inner_text() == "2 of 11 points"
    opened.get_by_label("objective.beta").select_option("")
    opened.get_by_label("seed").select_option("")
    assert lines.count() == 11
    # The best is on top; axes are where the values are; every title is inside the drawing.
    assert opened.locator(".point title").last.text_content() == "0-0-0: loss 1"
    titles = opened.evaluate("[...document.querySelectorAll('.parallel .title')].map((each) => each.textContent)")
    assert titles == ["beta", "learning_rate", "seed", "loss"]
    inside = """[...document.querySelectorAll('.parallel text')].every((each) => {
        const text = each.getBoundingClientRect(), box = document.querySelector('.parallel').getBoundingClientRect();
        return text.left >= box.left && text.right <= box.right + 1 && text.top >= box.top && text.bottom <= box.bottom;
    })"""
    assert opened.evaluate(inside)
    assert opened.evaluate("document.documentElement.scrollWidth") <= width  # tables scroll by themselves
    background = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(251, 250, 248)" if scheme == "light" else "rgb(21, 22, 23)")
    assert opened.locator(".curves figure h3").all_inner_texts() == ["loss", "held out accuracy"]
    assert failed == []
    context.close()


def test_without_scripts_everything_is_there(page, last, browser):
    context = browser.new_context(java_script_enabled=False)
    opened = context.new_page()
    opened.goto(page.as_uri())
    assert opened.locator(".point").count() == 11 and opened.locator("#filters").is_hidden()
    context.close()


def test_another_metric_and_none(page, capsys):
    root = page.parent
    assert main(["sweep", "report", str(root), "--metric=held_out_accuracy"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["best"]["mean"] == 0.5 and "Best held_out_accuracy (max)" in page.read_text()
    assert main(["sweep", "report", str(root), "--best=max"]) == 0
    assert json.loads(capsys.readouterr().out)["best"]["mean"] == 11.25
    assert main(["sweep", "report", str(root), "--metric=accuracy"]) == 1
    assert "--metric=accuracy: no point has it; did you mean held_out_accuracy?" in capsys.readouterr().err
    assert main(["sweep", "report", str(root / "absent")]) == 1
    assert "give the --workdir of a psa-jax sweep" in capsys.readouterr().err
    assert main(["sweep", "report", str(root)]) == 0


def test_only_what_diverged(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / "a" / "nonfinite_2.json").touch()
    plan = {"config": "tiny", "overrides": {}, "points": {"a": {"seed": "0"}, "b": {"seed": "1"}}}
    (tmp_path / PLAN_FILE).write_text(json.dumps(plan))
    assert main(["sweep", "report", str(tmp_path)]) == 0
    text = (tmp_path / "sweep.html").read_text()
    assert "No setting is best yet" in text and "0 done, 1 diverged, 1 not begun" in text and "<svg class=" not in text
