"""Large tensors get the memory of those before them."""

import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
from jobs.ranks import keep_large_blocks
if sys.argv[1] == "keep":
    keep_large_blocks()
def step():
    ones = torch.ones(10_000_000)
    return (ones * 2).sum()
for _ in range(10):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def new_pages(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.slow
def test_steps_take_no_new_pages() -> None:
    assert new_pages("keep") < new_pages("as it is") / 2
