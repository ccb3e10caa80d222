"""`psa-jax check`: verifies a SAGE folder. Writes bad rows to a quarantine file; exit code 1 if there are any."""

import contextlib
import json
import os
from argparse import Namespace
from pathlib import Path

from psa_jax.data.check import Report, check_sage, quarantine
from psa_jax.data.rows import PROMPT_KINDS, SPLITS
from psa_jax.errors import PSAError
from psa_jax.files import check_new, write_private
from psa_jax.profiles.population import read_users_csv
from psa_jax.profiles.schema import CATEGORIES

SHOWN = 10
"""Most bad rows that are printed; the quarantine has all of them."""
_LAST_LINE = ("ok", "rows", "bad", "checks", "pictures", "decoded", "seconds", "quarantine")


def run(args: Namespace) -> int:
    """Checks, prints the table and writes quarantine and report. The last line on stdout is JSON."""
    if not args.sage_dir.is_dir():
        raise PSAError(f"{args.sage_dir}: no such folder; give a folder in SAGE's layout")
    store = args.quarantine or args.sage_dir / "quarantine.jsonl"
    for path in filter(None, (store, args.json)):
        _check_writable(path)  # before an hour of decoding
    for path in filter(None, (args.quarantine, args.json)):
        check_new(path)
    if store != args.quarantine:
        _check_own(store)
    report = check_sage(
        args.sage_dir,
        users=read_users_csv(args.users) if args.users else None,
        images=args.images,
        processes=args.processes,
    )
    write_private(store, quarantine(report))
    answer = report.to_mapping() | {"sage": str(args.sage_dir), "quarantine": str(store)}
    if args.json:
        write_private(args.json, json.dumps(answer, indent=1).encode() + b"\n")
    print(_table(report))
    for row in report.bad[:SHOWN]:
        print(f"{row.file}, line {row.line}: {row.reason}")
    if len(report.bad) > SHOWN:
        print(f"… and {len(report.bad) - SHOWN} more")
    print(json.dumps({key: answer[key] for key in _LAST_LINE}))
    return 0 if report.ok else 1


def _check_writable(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise PSAError(f"{path}: cannot be written; choose a file in an existing folder of yours")


def _check_own(store: Path) -> None:
    """Checks that a file at the default place is a quarantine, which may be replaced."""
    with contextlib.suppress(FileNotFoundError), store.open("rb") as file:
        first = file.readline(1 << 16)
        if first and not first.startswith(b'{"file": "'):
            raise PSAError(f"{store}: exists already and is no quarantine; give another with --quarantine")


def _table(report: Report) -> str:
    """Rows and bad rows by split, category and kind of prompt."""
    bad = report.bad_rows
    lines = [f"{'split':12} {'category':11} {'safe':>7} {'bad':>6} {'unsafe':>7} {'bad':>6}"]
    for split in SPLITS:
        if split in report.absent:
            lines.append(f"{split:12} absent")
            continue
        for category in CATEGORIES:
            cells = [(split, category, kind) for kind in PROMPT_KINDS]
            numbers = " ".join(f"{report.rows.get(cell, 0):7} {bad[cell]:6}" for cell in cells)
            lines.append(f"{split:12} {category:11} {numbers}")
        if unreadable := bad[split, "unreadable", "unreadable"]:
            lines.append(f"{split:12} unreadable {unreadable:8} {unreadable:6}")
    failed = ", ".join(f"{check} {count}" for check, count in report.by_check.items() if count) or "none"
    lines += [
        f"{sum(report.rows.values())} rows, {len(report.bad)} bad; failed checks by row: {failed}",
        f"{report.pictures} pictures, {report.decoded} decoded; {report.seconds:.1f} s",
    ]
    if report.shared_prompts:
        lines.append(f"{report.shared_prompts} rows of val have a prompt of train: its users are new, not its prompts")
    return "\n".join(lines)
