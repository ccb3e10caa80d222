"""`psa-jax evaluate erase`: a base model without some concepts, for everybody. The last line on stdout is JSON."""

import json
from argparse import Namespace

from psa_jax.diffusion.concept_distillation import Distillation, distil_concepts
from psa_jax.diffusion.concept_editing import edit_concepts, read_replacements
from psa_jax.errors import PSAError
from psa_jax.interop.base_model import BaseModel
from psa_jax.interop.diffusers import save_stable_diffusion


def run(args: Namespace) -> int:
    """Writes the model as a folder of diffusers.

    Raises:
      PSAError: the list, the model, or the folder is wrong.
    """
    if args.out.is_file() or (args.out.is_dir() and any(args.out.iterdir())):
        raise PSAError(f"{args.out}: not an empty folder; give a new one")
    given = {name: value for name in Distillation._fields if (value := getattr(args, name)) is not None}
    if args.method == "uce" and given:
        raise PSAError(f"--{min(given).replace('_', '-')} is of --method=esd; uce is a closed form")
    replacements = read_replacements(args.concepts)
    model = BaseModel.from_config(vars(args)).load()
    if args.method == "uce":
        edited = edit_concepts(model, replacements)
    else:
        erased = [each.concept for each in replacements if each.concept != each.guide]
        edited = distil_concepts(model, erased, Distillation(**given))
    save_stable_diffusion(edited, args.out)
    print(json.dumps({"model": str(args.out), "method": args.method, "concepts": len(replacements)}))
    return 0
