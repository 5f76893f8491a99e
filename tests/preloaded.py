"""All that processes of tests need, loaded once into the server that they are forked from (see tests/launcher.py).

Nothing is begun here that a fork would lose or share: no thread of our own, no process group, no open file.
"""

# ruff: noqa: F401, E402
import gc

gc.disable()

import hypothesis
import numba.core.registry
import pyarrow.dataset
import pytest
import sklearn.metrics
import torch._dynamo
import torch.distributed.optim
import torchrec

import embeddings.distributed.host_rows
import embeddings.layers.row_products_kernel
import embeddings.models
import embeddings.prefetch
import embeddings.search.topk.cpu
import jobs.app
import jobs.ranks
import pipeline.online.run
import pipeline.train.reporting
import pipeline.train.run
import tests.days
import tests.featured
import tests.toy_model
import tests.trainers

# What the compiler knows of types and functions is loaded when it is first asked, which takes a second.
numba.core.registry.cpu_target.typing_context.refresh()
numba.core.registry.cpu_target.target_context.refresh()

# What is loaded stays: collecting garbage need not look at it again, and forks keep sharing its pages.
gc.enable()
gc.collect()
gc.freeze()
