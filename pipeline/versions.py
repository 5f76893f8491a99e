"""What is installed, read without importing it, and whether it belongs together.

A mismatch of torch, fbgemm-gpu and torchrec otherwise shows as a crash far from its cause.
"""

import platform
from importlib.metadata import PackageNotFoundError, version

from schemas.errors import UserError

PACKAGES = ("dare", "torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu")
FITTING = {"2.13": ("1.8", "1.8"), "2.11": ("1.6", "1.6")}
"""torch -> fbgemm-gpu, torchrec (major.minor)."""


def installed(package: str) -> str | None:
    """The version of a package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide what a run computes, as far as they are installed."""
    by_package = {package: installed(package) for package in PACKAGES}
    return {package: text for package, text in by_package.items() if text} | {"python": platform.python_version()}


def check_versions() -> None:
    """Compare the versions that are installed with those that fit each other.

    Raises:
        UserError: a package is missing or does not fit torch; says which versions fit.
    """
    torch, torchrec = installed("torch"), installed("torchrec")
    builds = [build for name in ("fbgemm-gpu", "fbgemm-gpu-cpu") if (build := installed(name)) is not None]
    # Both install the package ``fbgemm_gpu``: the files are those of whichever came last.
    if len(builds) == 2:
        raise UserError("fbgemm-gpu and fbgemm-gpu-cpu are both installed and overwrite each other; run `make setup`")
    fbgemm = builds[0] if builds else None
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
