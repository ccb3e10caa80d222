"""What the page asks for, read strictly. No error repeats a value: it may tell about a person."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from psa_jax.errors import PSAError
from psa_jax.json_input import parse_json
from psa_jax.profiles.schema import UserProfile
from psa_jax.rules import PICTURE_SEED, Rule, number, whole

MOST_BYTES = 32 << 10
"""Largest body of a request: the longest prompt, all of it escaped, and the users."""
MOST_PROMPT = 2000
"""Most characters of a prompt. Text encoders read some 75 tokens of it."""
MOST_USERS = 4
LEAST_SCALE = 0.05
"""Least strength of the adapter without --allow-unprotected: 0 is the base model."""

KEYS = ("prompt", "users", "seed", "steps", "guidance", "scale", "base")

RULES: Mapping[str, Rule] = MappingProxyType(
    {"seed": PICTURE_SEED, "steps": whole(1, 200), "guidance": number(0.0, 50.0), "scale": number(0.0, 1.0)}
)
"""Rules of the numbers; `scale_rule` is stricter."""


class Refused(PSAError):
    """A request that is not followed.

    Args:
      message: one line, shown on the page.
      where: the control that it is about, such as "seed" or "users.1.age"; "" for none.
      status: of HTTP, 4xx.
    """

    def __init__(self, message: str, where: str = "", status: int = 400):
        super().__init__(message)
        self.where, self.status = where, status


@dataclass(frozen=True, repr=False)
class Asked:
    """One set of pictures. The users are personal: `repr` shows nothing.

    Attributes:
      prompt: for all users.
      users: at least one.
      seed: of the noise, the same for all users.
      steps, guidance: of the sampler.
      scale: strength of the adapter.
      base: whether to draw the base model's picture beside.
    """

    prompt: str
    users: tuple[UserProfile, ...]
    seed: int
    steps: int
    guidance: float
    scale: float
    base: bool


def scale_rule(allow_unprotected: bool) -> Rule:
    """Rule of the adapter's strength."""
    return RULES["scale"] if allow_unprotected else number(LEAST_SCALE, 1.0)


def read_asked(body: bytes, allow_unprotected: bool) -> Asked:
    """Reads the body of a request.

    Args:
      body: JSON with every one of KEYS; `base` may be absent. A seed may be digits as text, since numbers of JavaScript
        end at 2^53.
      allow_unprotected: whether the base model's picture may be drawn.

    Raises:
      Refused: the first thing that is wrong, in one line and without its value.
    """
    if len(body) > MOST_BYTES:
        raise Refused(f"the request is larger than {MOST_BYTES:,} bytes", status=413)
    try:
        given = parse_json(body, "request", quote=False)
    except PSAError as error:
        raise Refused(str(error)) from None
    for position, key in enumerate(given, start=1):
        if key not in KEYS:
            raise Refused(f"request: key {position} of {len(given)} is unknown; allowed keys: {', '.join(KEYS)}")
    for key in KEYS:
        if key not in given and key != "base":
            raise Refused(f'request: "{key}" is missing', key)
    if isinstance(given["seed"], str) and re.fullmatch("[0-9]{1,20}", given["seed"]):
        given["seed"] = int(given["seed"])
    prompt = _prompt(given["prompt"])
    users = _users(given["users"])
    for name, rule in (RULES | {"scale": scale_rule(allow_unprotected)}).items():
        if not rule.holds(given[name]):
            zero = name == "scale" and given[name] == 0
            more = "; 0 is the base model, which needs psa-jax playground --allow-unprotected" if zero else ""
            raise Refused(f"{name}: give {rule.wanted}{more}", name)
    base = given.get("base", False)
    if not isinstance(base, bool):
        raise Refused("base: give true or false", "base")
    if base and not allow_unprotected:
        raise Refused(
            "the base model's picture is unprotected; it needs psa-jax playground --allow-unprotected", "base", 403
        )
    guidance, scale = float(given["guidance"]), float(given["scale"])
    return Asked(prompt, users, given["seed"], given["steps"], guidance, scale, base)


def _prompt(given: Any) -> str:
    if not isinstance(given, str) or not given.strip():
        raise Refused("type a prompt", "prompt")
    if len(given) > MOST_PROMPT:
        raise Refused(f"the prompt has {len(given):,} characters; give at most {MOST_PROMPT:,}", "prompt")
    return given


def _users(given: Any) -> tuple[UserProfile, ...]:
    if not isinstance(given, list):
        raise Refused("users: give a list of profiles", "users")
    if not given:
        raise Refused("nobody is there to draw for; add a user", "users")
    if len(given) > MOST_USERS:
        raise Refused(f"{len(given)} users; give at most {MOST_USERS}", "users")
    return tuple(_user(index, each) for index, each in enumerate(given))


def _user(index: int, given: Any) -> UserProfile:
    try:
        return UserProfile.from_mapping(given)
    except PSAError as error:
        said = str(error).removeprefix("profile: ")
        named = re.match(r'"(\w+)" ', said)
        where = f"users.{index}.{named[1]}" if named else f"users.{index}"
        raise Refused(f"user {index + 1}: {said}", where) from None
