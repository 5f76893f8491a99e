"""Versions of torch, fbgemm-gpu and torchrec that belong together: a mismatch shows as a crash far from its cause."""

from pipeline.versions import installed
from schemas.errors import UserError

FITTING = {"2.13": ("1.8", "1.8"), "2.11": ("1.6", "1.6")}
"""torch -> fbgemm-gpu, torchrec (major.minor)."""


def check_versions() -> None:
    """Compare what is installed, without importing it.

    Raises:
        UserError: a package is missing or does not fit torch; says which versions fit.
    """
    torch, torchrec = installed("torch"), installed("torchrec")
    builds = {name: found for name in ("fbgemm-gpu", "fbgemm-gpu-cpu") if (found := installed(name)) is not None}
    if len(builds) == 2:
        raise UserError("fbgemm-gpu and fbgemm-gpu-cpu are both installed and overwrite each other; run `make setup`")
    fbgemm = next(iter(builds.values()), None)
    fitting = FITTING.get(_minor(torch))
    if fitting is None or (_minor(fbgemm), _minor(torchrec)) != fitting:
        wanted = "; or ".join(
            f"torch {key} with fbgemm-gpu {value[0]}, torchrec {value[1]}" for key, value in FITTING.items()
        )
        raise UserError(
            f"torch {torch}, fbgemm-gpu {fbgemm} and torchrec {torchrec} do not fit each other; these do: {wanted}; "
            "run `make setup`"
        )


def fbgemm_has_cuda() -> bool:
    """Whether the CUDA build of fbgemm-gpu is installed; with the other one, a GPU is of no use."""
    return installed("fbgemm-gpu") is not None


def _minor(version: str | None) -> str:
    return ".".join((version or "none").split(".")[:2])
