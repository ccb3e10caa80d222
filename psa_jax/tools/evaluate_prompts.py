"""`psa-jax evaluate prompts`: the prompts of a set, ready to be drawn. The last line on stdout is JSON."""

import json
from argparse import Namespace

from psa_jax.errors import PSAError
from psa_jax.evaluation.prompt_sets import read_set, rewritten, sage_cases, with_levels, with_seeds, write_cases
from psa_jax.evaluation.protocol import USER_GROUPS
from psa_jax.files import check_new

_GROUP_OF = {split: group for group, split in USER_GROUPS.items()}


def run(args: Namespace) -> int:
    """Writes the list for `psa-jax generate --prompts`.

    Raises:
      PSAError: a set that cannot be read, flags of another set, or a list that is there already.
    """
    check_new(args.out)
    if args.set == "sage":
        split = args.split or "test_unseen"
        cases = [(case, None) for case in sage_cases(args.source, split, args.per_rate, args.seed)]
        wanted = with_seeds(cases, args.protocol, args.images, _GROUP_OF.get(split, split))
        if args.rewrite is not None:
            wanted = rewritten(wanted, args.rewrite)
        if args.levels is not None:
            wanted = with_levels(wanted, args.levels)
    elif any(each is not None for each in (args.split, args.per_rate, args.rewrite, args.levels)):
        raise PSAError("--split, --per-rate, --rewrite and --levels are of sage, which has users")
    else:
        wanted = with_seeds(read_set(args.set, args.source), args.protocol, args.images)
    write_cases(args.out, wanted)
    counts = {
        "pictures": len(wanted),
        "prompts": len({each.case.prompt for each in wanted}),
        "users": len({each.case.user_id for each in wanted} - {""}),
        "without_category": sum(not each.case.category for each in wanted),
    }
    print(json.dumps({"cases": str(args.out), **counts}))
    return 0
