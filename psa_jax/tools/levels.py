"""`psa-jax levels`: clusters the users of a table and plots them. The last line on stdout is JSON."""

import io
import json
from argparse import Namespace
from collections import Counter

from psa_jax.errors import PSAError
from psa_jax.files import check_new, write_private
from psa_jax.profiles.levels import CLUSTERS, Levels, find_levels, principal_axes
from psa_jax.profiles.population import read_users_csv
from psa_jax.profiles.table import EmbeddingTable


def run(args: Namespace) -> int:
    """Writes `levels.json` and `levels.png` (mode 0600); prints a table, and JSON in the last line."""
    for name in ("levels.json", "levels.png"):
        check_new(args.out / name, "give another --out, or remove it first")
    table = EmbeddingTable.load(args.table)
    levels = find_levels(table, read_users_csv(args.users), args.seed)
    counts = Counter(levels.level.tolist())
    picture = _plot(table, levels)
    args.out.mkdir(parents=True, exist_ok=True)
    found = {
        "centres": {f"L{place}": user_id for place, user_id in enumerate(levels.centres, start=1)},
        "users": {f"L{level}": counts.get(level, 0) for level in range(CLUSTERS + 1)},
        "level": dict(zip(levels.ids, levels.level.tolist(), strict=True)),
    }
    write_private(args.out / "levels.json", json.dumps(found, indent=1).encode())
    write_private(args.out / "levels.png", picture)
    print("level  users  centre user")
    for level in range(CLUSTERS + 1):
        print(f"L{level}  {counts.get(level, 0):8d}  {levels.centres[level - 1] if level else '(users without bans)'}")
    print(json.dumps({"out": str(args.out), "centres": found["centres"], "users": found["users"]}))
    return 0


def _plot(table: EmbeddingTable, levels: Levels) -> bytes:
    """Plots the users on the table's two principal axes, coloured by level, as PNG."""
    try:
        from matplotlib.figure import Figure  # imported late: slow, and of the `eval` extra
    except ModuleNotFoundError as error:
        raise PSAError("psa-jax levels plots with matplotlib: pip install 'psa_jax[eval]'") from error
    points = principal_axes(table.embeddings)
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.subplots()
    for level in range(CLUSTERS + 1):
        rows = levels.level == level
        axes.scatter(*points[rows].T, s=14, label=f"L{level} ({int(rows.sum())})")
    centres = [levels.ids.index(user_id) for user_id in levels.centres]
    axes.scatter(*points[centres].T, s=120, marker="*", color="black", label="centre users")
    axes.set(xlabel="first principal axis", ylabel="second principal axis", title=f"{len(levels.ids)} users by level")
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120, metadata={"Software": None})
    return content.getvalue()
