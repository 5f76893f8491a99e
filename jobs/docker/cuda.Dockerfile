# The image that jobs on GPUs start from: docker build --file jobs/docker/cuda.Dockerfile --tag dare:cuda .
FROM python:3.11-slim-bookworm

# torch brings CUDA and NCCL itself; the driver comes from the host, through the NVIDIA container toolkit. Triton compiles
# with gcc. NCCL loads libibverbs and the provider of the adapter (Mellanox' mlx5 and others) when it finds them, and
# sends over TCP without a word where it does not: NCCL_DEBUG=INFO tells which. On AWS, EFA needs the plugin
# aws-ofi-nccl besides, which Debian does not have: AWS' installer of EFA brings it.
RUN apt-get update && apt-get install --yes --no-install-recommends \
      gcc libc6-dev libibverbs1 ibverbs-providers ibverbs-utils librdmacm1 \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

WORKDIR /src
COPY requirements/common.txt requirements/torch.txt requirements/cuda.txt requirements/
RUN pip install --quiet -c requirements/common.txt -r requirements/torch.txt
RUN pip install --quiet --no-deps -r requirements/common.txt -r requirements/cuda.txt
COPY pyproject.toml README.md LICENSE ./
COPY schemas schemas
COPY embeddings embeddings
COPY pipeline pipeline
COPY jobs jobs
COPY benchmarks benchmarks
RUN pip install --quiet --no-deps --no-build-isolation .

# What is compiled at run time is kept where every user can write. Data and runs are mounted.
ENV NUMBA_CACHE_DIR=/tmp/numba TRITON_CACHE_DIR=/tmp/triton
RUN useradd --uid 1000 --create-home dare && mkdir /data /runs && chown 1000:1000 /data /runs
USER 1000
WORKDIR /runs
# No ENTRYPOINT: schedulers put the component's `bash -c "exec python -m ..."` behind it.
CMD ["dare", "--help"]
