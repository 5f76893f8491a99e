# The image that jobs without GPUs start from: docker build --file jobs/docker/cpu.Dockerfile --tag dare:cpu .
FROM python:3.11-slim-bookworm

# PyPI's torch brings CUDA along, which nothing here uses. With --build-arg PIP_INDEX_URL=..., an index that has
# PyTorch's CPU build under the same version, the image is 4 GB smaller.
ARG PIP_INDEX_URL
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

WORKDIR /src
COPY requirements/common.txt requirements/torch.txt requirements/cpu.txt requirements/
RUN pip install --quiet -c requirements/common.txt -r requirements/torch.txt
RUN pip install --quiet --no-deps -r requirements/common.txt -r requirements/cpu.txt
COPY pyproject.toml README.md LICENSE ./
COPY schemas schemas
COPY embeddings embeddings
COPY pipeline pipeline
COPY jobs jobs
COPY benchmarks benchmarks
RUN pip install --quiet --no-deps --no-build-isolation .

# What is compiled at run time is kept where every user can write. Data and runs are mounted.
ENV NUMBA_CACHE_DIR=/tmp/numba
# Whatever the host has: nothing in here could use its GPUs.
ENV DEVICE=cpu
RUN useradd --uid 1000 --create-home dare && mkdir /data /runs && chown 1000:1000 /data /runs
USER 1000
WORKDIR /runs
# No ENTRYPOINT: schedulers put the component's `bash -c "exec python -m ..."` behind it.
CMD ["dare", "--help"]
