"""`dare models`: the models that `dare train model=NAME` knows."""

import json as json_format
from typing import Annotated

import typer


def models(
    json: Annotated[bool, typer.Option("--json", help="End standard output with one JSON object.")] = False,
) -> None:
    """List the models: what each is, and where it searches."""
    from embeddings.models import MODELS

    rows = [
        {
            "name": name,
            "summary": (model.__doc__ or "").strip().splitlines()[0].rstrip(".").replace("``", ""),
            "searched": model.searched,
            "tables": len({*vars(model.roles).values()}),
        }
        for name, model in MODELS.items()
    ]
    wide = max(len(str(row["name"])) for row in rows)
    for row in rows:
        print(f"{row['name']:{wide}}  {row['summary']} (search: {row['searched']})")
    if json:
        print(json_format.dumps({"models": rows}))
