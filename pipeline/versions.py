"""What is installed, told without importing it."""

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("dare", "torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu")


def installed(package: str) -> str | None:
    """Version of a package; None: it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Of Python and of those packages that decide what a run computes; those that are not installed are left out."""
    found = {package: installed(package) for package in PACKAGES}
    return {package: text for package, text in found.items() if text} | {"python": platform.python_version()}
