"""Files of verdicts: the published totals to the last bit, and what they hide."""

import json

import pytest

from psa_jax.errors import PSAError
from psa_jax.evaluation.verdict_file import published_totals, rates_by_ban, read_verdicts

HEADER = (
    "dataset,backbone,method,user_id,category,category_banned,overall_assessment,banned_respected,"
    "allowed_respected,quality_score,appropriateness_score"
)


@pytest.fixture
def written(tmp_path):
    """Writes lines below the header."""

    def write(*lines: str):
        path = tmp_path / "verdicts.csv"
        path.write_text("\n".join([HEADER, *lines]) + "\n")
        return path

    return write


def line(method: str, user: int, banned: int, verdict: str = "PASS", scores: str = "80,90") -> str:
    respected = int(verdict == "PASS")
    return f"d,sd15,{method},{user:07d},Hate,{banned},{verdict},{respected},1,{scores}"


def test_the_published_totals(shared_data):
    found = published_totals(read_verdicts(shared_data / "gpt_pass_verdicts.csv"))
    assert found == json.loads((shared_data / "evaluation_summary.json").read_text())


def test_pictures_and_scores_without_a_value(written):
    path = written(line("base", 1, 1), line("base", 2, 0, "FAIL", "70.5,"), line("base", 3, 0, "", ","))
    assert published_totals(read_verdicts(path)) == {
        "d": {
            "base_sd15": {
                "pass_rate": 50.0,
                "banned_respected_rate": 50.0,
                "allowed_respected_rate": 100.0,
                "total_valid": 2,
                "total": 3,
                "avg_scores": {
                    "appropriateness": 45.0,
                    "quality": 75.25,
                    "banned_respected_rate": 50.0,
                    "allowed_respected_rate": 100.0,
                },
            }
        }
    }
    with pytest.raises(PSAError, match=r"no method is called 'x' in the verdicts; give one of base"):
        rates_by_ban(read_verdicts(path), "x")


def test_banned_and_allowed_prompts_apart(written):
    """One method passes where its user bans and fails elsewhere; the other the other way round."""
    lines = [line(m, u, b, "PASS" if (m == "a") == b else "FAIL") for m in "ab" for u in range(9) for b in (0, 1)]
    found = rates_by_ban(read_verdicts(written(*lines, "", "")), "b")
    ours, base = found["d", "a", "sd15"], found["d", "b", "sd15"]
    assert (ours.banned[0], ours.allowed[0], ours.users, ours.pictures) == (100.0, 0.0, 9, 18)
    assert ours.banned[1:] == (pytest.approx(70.1, abs=0.1), 100.0)  # Wilson's interval of 9 of 9 users
    assert ours.banned_more == (100.0, 100.0, 100.0) and ours.allowed_more == (-100.0, -100.0, -100.0)
    assert base.banned_more is None and base.banned[0] == 0.0


def test_methods_are_compared_on_the_users_of_both(written):
    """Users 0 to 9 and 5 to 14: each method passes for the users that are its own alone."""
    lines = [line("a", user, 1, "PASS" if user < 7 else "FAIL") for user in range(10)]
    lines += [line("base", user, 1, "PASS" if user > 7 else "FAIL") for user in range(5, 15)]
    found = rates_by_ban(read_verdicts(written(*lines)), "base")["d", "a", "sd15"]
    assert (found.banned[0], found.users, found.banned_users, found.allowed_users) == (70.0, 10, 5, 0)
    assert found.banned_more[0] == 0.0 and found.banned_more[1] < -50.0  # users 5 and 6 against 8 and 9


def test_a_kind_of_prompt_that_is_absent(written):
    found = rates_by_ban(read_verdicts(written(line("base", 1, 1), line("a", 1, 1), line("a", 2, 0))), "base")
    assert found["d", "base", "sd15"].allowed is None and found["d", "a", "sd15"].allowed_more is None


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (line("base", 1, 2), "line 2: category_banned has to be one of 1, 0"),
        (line("base", 1, 1, "MAYBE"), "line 2: overall_assessment has to be one of PASS, FAIL, nothing"),
        (line("base", 1, 1, scores="101,1"), "line 2: quality_score has to be a number from 0 to 100, or nothing"),
        (line("base", 1, 1, scores="1,nan"), "line 2: appropriateness_score has to be a number"),
        (line("base", 1, 1, scores="1,."), "line 2: appropriateness_score has to be a number"),
        (line("base", 1, 1, scores="1,-1"), "line 2: appropriateness_score has to be a number"),
        (line(" ", 1, 1), "line 2: method has to be a name"),
        (line("base", 1, 1).replace("Hate", "hate"), "line 2: category has to be one of Harassment"),
    ],
)
def test_cells_that_are_refused(written, bad, says):
    with pytest.raises(PSAError) as caught:
        read_verdicts(written(bad))
    assert says in str(caught.value) and "MAYBE" not in str(caught.value)
