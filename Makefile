# make install      install mipha and all that the other targets need, into .venv
# make quickstart   train, measure and try a small assistant: a quarter of an hour on 2 CPU cores
# make test         run all tests that need no GPU
# make lint         check style and format with ruff, and types of the public names with mypy
# make fuzz         read damaged requests, images, data, recipes, states and models: five minutes
# make mutants      break the code in 60 places and see whether a test fails: an hour
# make lowest       run all tests with the lowest versions that pyproject.toml allows, in .venv-lowest
# make gpu          check and measure the GPU path: below ten minutes; small without a GPU
# make gpu-wheels   fetch what a machine without a network needs for it, into wheels/
# make bench        measure training, data and states, on an idle machine
PYTHON := .venv/bin/python
INSTALLED := .venv/installed
INSTALLED_QUICKSTART := .venv/installed-quickstart
PIP := $(PYTHON) -m pip install --quiet --disable-pip-version-check

.PHONY: install quickstart test lint fuzz mutants lowest gpu gpu-wheels bench
install: $(INSTALLED)

# The quickstart waits for no package that only other targets need.
$(INSTALLED_QUICKSTART): pyproject.toml constraints.txt requirements-quickstart.txt
	python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mipha needs Python 3.11 or newer; this is " + sys.version)'
	python3 -m venv .venv
	$(PIP) --constraint constraints.txt --editable '.[quickstart,serve]'
	$(PIP) --no-deps --requirement requirements-quickstart.txt
	touch $@

$(INSTALLED): $(INSTALLED_QUICKSTART)
	$(PIP) --constraint constraints.txt --editable '.[quickstart,data,evaluation,gguf,serve,align,slurm,tensorboard,bench,test,lint]'
	touch $@

quickstart: $(INSTALLED_QUICKSTART)
	.venv/bin/mipha quickstart -o runs/quickstart

# One thread a process: two that wait for each other on a busy machine take 15 times as long.
test: install
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --dist loadfile --no-loadscope-reorder

lint: install
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

fuzz: install
	$(PYTHON) -m tests.fuzz --seconds 300 --seed 1

# The lowest version of each package that we name; the newest of what they need themselves. torch is
# the one of the tests: on x86-64 the index has older ones with CUDA only, which is gigabytes.
LOWEST := .venv-lowest
EXTRAS := quickstart data evaluation gguf serve align slurm tensorboard bench test
lowest:
	python3 -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	grep '^torch==' constraints.txt > $(LOWEST)/torch.txt
	$(LOWEST)/bin/uv pip compile --quiet --no-annotate --no-header --resolution lowest-direct \
		--override $(LOWEST)/torch.txt $(EXTRAS:%=--extra %) pyproject.toml \
		| grep -vE '^(nvidia|cuda|triton)' > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-quickstart.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# Works without `make install` where torch is there: PYTHON=python3, and the wheels in site/.
gpu:
	PYTHONPATH=site:src $(PYTHON) benchmarks/gpu.py

WHEELS := transformers peft pydantic pydantic_core annotated-types typing_extensions typing_inspection
gpu-wheels: install
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --constraint constraints.txt \
		--python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
		--platform any --dest wheels $(WHEELS)

bench: install
	$(PYTHON) benchmarks/training.py --threads 2
	$(PYTHON) benchmarks/lengths.py
	$(PYTHON) benchmarks/loading.py
	$(PYTHON) benchmarks/checkpointing.py
	$(PYTHON) benchmarks/growth.py

mutants: install
	OMP_NUM_THREADS=1 $(PYTHON) -m tests.mutation --count 60 --seed 1
