# Everything runs in .venv, which is built on the first call. DEVICE=cpu or DEVICE=cuda overrides what is found,
# for the program too.

ifeq ($(DEVICE),)
DEVICE := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
endif
ifeq ($(filter cpu cuda,$(DEVICE)),)
$(error DEVICE=$(DEVICE): must be cpu or cuda)
endif
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# A Python that was named, else that of .venv if it is built, else what there is.
CHECK_PYTHON = $(if $(filter environment command,$(origin PYTHON)),$(PYTHON),$(or $(wildcard $(BIN)/python),$(PYTHON)))
READY := .venv/ready-$(DEVICE)
JOURNEY := data/completejourney
# One process a GPU, and two on a CPU.
PROCESSES ?= $(if $(filter cuda,$(DEVICE)),$(shell nvidia-smi -L | head -2 | wc -l),2)

# Processes that run tests: two a core, because many wait for processes of their own most of the time.
WORKERS ?= $(shell cores=$$(nproc); echo $$((cores > 4 ? 8 : 2 * cores)))

.PHONY: demo test test-slow test-spark test-ceph test-redis test-slurm setup lint types docs examples format bench check-gpu clean

demo: $(JOURNEY)/manifest.json  ## prepare real histories, train TWIN, DARE and DARE with all features, compare
	$(BIN)/dare inspect $(JOURNEY)
	@for run in twin dare dare-features; do \
	  $(BIN)/torchx run dare.train -j 1x$(PROCESSES) -- --data $(JOURNEY) --run runs/completejourney-$$run \
	    --config jobs/recipes/completejourney$$(test $$run != dare-features || echo -features).yaml \
	    model.name=$${run%-features} stream.batch_size=$$((2048 / $(PROCESSES))) || exit 1; \
	done
	$(BIN)/dare compare runs/completejourney-twin runs/completejourney-dare runs/completejourney-dare-features

# One thread each, because there are more processes than cores. Bytecode is kept whatever the environment says: otherwise
# each process compiles all modules again.
test: $(READY)  ## all quick tests, a file at a time on each of some processes
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Properties are tried with examples that are others each time; dear ones with more than in `test` (tests/examples.py).
test-slow: $(READY)  ## the tests that take minutes, and more examples of properties
	HYPOTHESIS_PROFILE=explore $(BIN)/python -m pytest -m "(slow or hypothesis) and not ceph and not spark and not slurm"

test-spark: $(READY)  ## the distributed engine; needs Java 17
	$(BIN)/pip install --quiet --no-deps -r requirements/spark.txt
	SPARK_LOCAL_IP=127.0.0.1 PYSPARK_PYTHON=$(CURDIR)/$(BIN)/python $(BIN)/python -m pytest -m spark

test-ceph: $(READY)  ## remote paths on Ceph's S3 gateway; needs Debian's radosgw ceph-mon ceph-osd
	$(BIN)/python -m pytest -m "ceph and not spark" -rs

test-redis: $(READY)  ## stores of histories in Redis; needs Debian's redis-server
	$(BIN)/python -m pytest -m redis -rs

test-slurm: $(READY)  ## jobs on a real Slurm of one host; needs root and Debian's slurm-wlm munge slurmdbd mariadb-server
	$(BIN)/python -m pytest -m slurm -rs

setup: $(READY)  ## build .venv

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

docs: $(READY)  ## the site of docs/ and of the docstrings, in site/; warnings are errors
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements/docs.txt
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

examples: $(READY)  ## run what the tutorial, add_a_model.md and examples/ show
	$(BIN)/python -m pytest -m examples

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## timings, side by side
	$(BIN)/dare bench reader
	$(BIN)/dare bench search
	$(BIN)/dare bench shard-search

check-gpu:  ## what one GPU shows in ten minutes; it builds nothing, so it runs where there is no package index
	$(CHECK_PYTHON) -m benchmarks.gpu.check $(CHECK)

$(JOURNEY)/manifest.json: schemas/presets/completejourney.yaml | $(READY)
	$(BIN)/dare prepare --preset completejourney --out $(JOURNEY) --overwrite

$(READY): $(addprefix requirements/,$(addsuffix .txt,common torch $(DEVICE) tests))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	  || { echo "Python 3.11 is needed, $(PYTHON) is another; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c requirements/common.txt -r requirements/torch.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps -r requirements/common.txt \
	  -r requirements/$(DEVICE).txt -r requirements/tests.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

clean:
	rm -rf .venv data runs site
