"""Turns a profile into the seven numbers that a server needs, on the user's own device. Takes Python and numpy alone.

    python psa_gates.py '{"age": 9, "gender": "female"}'             numbers from 0 to 1
    python psa_gates.py '{"age": 9, "gender": "female"}' --bits      rounded to 0 and 1: says the least

The profile stays here. Each number says how sure the adapter is that this user bans a category.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np


def read_gates(path):
    """The contents of gates.npz by name."""
    with np.load(path, allow_pickle=False) as file:
        found = {name: file[name] for name in file.files}
    if str(found.get("format")) != "psa_jax.gates/1":
        raise ValueError(f"{path}: not a gate file of psa_jax")
    return found


def features(gates, profile):
    """The numbers that stand for a profile, in the order of the adapter's encoder.

    Args:
      gates: as `read_gates` gives them.
      profile: age, gender and, where they differ from "None" and "healthy", religion, physical_condition and
        mental_condition; bans, a list of categories, where the user bans more than the rules say.

    Raises:
      ValueError: a key or value that does not exist, or one that is missing.
    """
    known = [str(field) for field in gates["fields"]]
    choices = {}
    for field in known:
        name, equals, value = field.partition("=")
        if equals and name != "bans":
            choices.setdefault(name, []).append(value)
    given = dict(pair.split("=", 1) for pair in map(str, gates["neutral"])) | dict(profile)
    age, own = given.pop("age", None), given.pop("bans", [])
    if type(age) is not int or not 0 <= age <= int(gates["max_age"]):
        raise ValueError(f"age must be a whole number from 0 to {int(gates['max_age'])}")
    for text in map(str, gates["age_groups"]):
        group, _, youngest = text.partition("|")
        if age >= int(youngest):
            given["age_group"] = group
    if given.keys() != choices.keys():
        raise ValueError(f"a profile has age and {', '.join(name for name in choices if name != 'age_group')}")
    for name, value in given.items():
        if value not in choices[name]:
            raise ValueError(f"{name} must be one of {', '.join(choices[name])}")
    categories = [str(name) for name in gates["categories"]]
    if not isinstance(own, list | tuple) or any(name not in categories for name in own):
        raise ValueError(f"bans must be a list of {', '.join(categories)}")
    if own and not any(field.startswith("bans=") for field in known):
        raise ValueError("this adapter's encoder has no place for bans of one's own; leave them out")
    banned = set(own)
    for text in map(str, gates["bans"]):
        holds, *categories = text.split("|")
        name, _, value = holds.partition("=")
        if given[name] == value:
            banned.update(categories)
    row = []
    for field in known:
        name, equals, value = field.partition("=")
        if not equals:
            row.append(age / int(gates["max_age"]))
        else:
            row.append(float(value in banned if name == "bans" else given[name] == value))
    return np.asarray(row, np.float32)


def answers(gates, row):
    """The seven numbers, from the weights and the numbers that stand for a profile."""
    x = row @ gates["0.weight"].T + gates["0.bias"]
    x = np.asarray([0.5 * v * (1.0 + math.erf(v / math.sqrt(2.0))) for v in x], np.float32)
    logits = x @ gates["2.weight"].T + gates["2.bias"]
    return [1.0 / (1.0 + math.exp(min(-float(v), 700.0))) for v in logits]  # of 710 exp has no float


def bans(gates, profile, bits=False):
    """Category -> how sure the adapter is that this user bans it, from 0 to 1; with `bits` 0.0 or 1.0.

    Args:
      gates, profile: as for `features`.
      bits: round, which is all that most servers need.
    """
    numbers = answers(gates, features(gates, profile))
    names = [str(name) for name in gates["categories"]]
    if any(numbers[names.index(name)] <= 0.5 for name in profile.get("bans", [])):
        raise ValueError("this adapter does not act on every ban of the profile; use one that is trained for it")
    return {name: float(round(b)) if bits else b for name, b in zip(names, numbers, strict=True)}


def main():
    """Prints the numbers as JSON."""
    words = [word for word in sys.argv[1:] if word != "--bits"]
    if len(words) != 1:
        sys.exit("give one profile as JSON, and --bits to round")
    gates = read_gates(Path(__file__).with_name("gates.npz"))
    try:
        print(json.dumps(bans(gates, json.loads(words[0]), bits="--bits" in sys.argv)))
    except ValueError as error:
        sys.exit(f"psa_gates: {error}")


if __name__ == "__main__":
    main()
