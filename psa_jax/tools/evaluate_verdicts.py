"""`psa-jax evaluate verdicts`: totals of a file of verdicts. The last line on stdout is JSON."""

import dataclasses
import json
from argparse import Namespace

from psa_jax.evaluation.clustered import Interval
from psa_jax.evaluation.verdict_file import published_totals, rates_by_ban, read_verdicts
from psa_jax.files import check_new, write


def run(args: Namespace) -> int:
    """Prints the totals of a file of verdicts; with --json writes them to a file.

    Raises:
      PSAError: a file that cannot be read, a baseline that is not in it, or a result that is there already.
    """
    if args.json is not None:
        check_new(args.json)
    verdicts = read_verdicts(args.file)
    by_ban = rates_by_ban(verdicts, args.baseline)
    width = max(len(" ".join(group)) for group in by_ban)
    print(
        f"{'dataset, method, backbone':{width}}  users  pictures  pass, banned         pass, allowed        "
        f"banned, less {args.baseline}    allowed, less {args.baseline}"
    )
    for group, rates in by_ban.items():
        cells = [_cell(each) for each in (rates.banned, rates.allowed, rates.banned_more, rates.allowed_more)]
        print(f"{' '.join(group):{width}}  {rates.users:5d}  {rates.pictures:8d}  " + "  ".join(cells).rstrip())
    result = {
        "baseline": args.baseline,
        "totals": published_totals(verdicts),
        "by_ban": [
            {"dataset": dataset, "method": method, "backbone": backbone} | dataclasses.asdict(rates)
            for (dataset, method, backbone), rates in by_ban.items()
        ],
    }
    if args.json is not None:
        write(args.json, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    return 0


def _cell(interval: Interval | None) -> str:
    return f"{'–' if interval is None else '{:z.1f} ({:z.1f} to {:z.1f})'.format(*interval):19}"
