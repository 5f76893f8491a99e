"""Versions of torch, fbgemm-gpu and torchrec that do not fit each other are named, with those that do."""

import re
from pathlib import Path

import pytest

from pipeline import versions


def installed(monkeypatch: pytest.MonkeyPatch, **found: str) -> None:
    monkeypatch.setattr(versions, "installed", lambda package: found.get(package.replace("-", "_")))


def test_what_is_installed_fits() -> None:
    versions.check_versions()


def test_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, torch="2.12.1", fbgemm_gpu_cpu="1.8.0", torchrec="1.8.0")
    with pytest.raises(
        ValueError, match=r"torch 2\.12\.1, fbgemm-gpu 1\.8\.0 .* torch 2\.13 with fbgemm-gpu 1\.8, torchrec 1\.8"
    ):
        versions.check_versions()
    installed(monkeypatch, torch="2.13.0", torchrec="1.8.0")
    with pytest.raises(ValueError, match="fbgemm-gpu None"):
        versions.check_versions()
    installed(monkeypatch, torch="2.13.0", fbgemm_gpu="1.8.0", fbgemm_gpu_cpu="1.8.0", torchrec="1.8.0")
    with pytest.raises(ValueError, match="both installed"):
        versions.check_versions()


def test_requirements_pin_what_fits() -> None:
    folder = Path(__file__).parents[2] / "requirements"
    pins = dict(
        match.groups()
        for file in folder.glob("*.txt")
        for line in file.read_text().splitlines()
        if (match := re.fullmatch(r"([\w-]+)==(\d+\.\d+)[\d.]*", line))
    )
    for build in ("fbgemm-gpu", "fbgemm-gpu-cpu"):
        assert versions.FITTING[pins["torch"]] == (pins[build], pins["torchrec"])
