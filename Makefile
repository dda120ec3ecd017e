# make install      install mipha and all that the other targets need, into .venv
# make quickstart   train, measure and try a small assistant: about an hour on 2 CPU cores
# make test         run all tests that need no GPU
# make lint         check style and format with ruff, and types of the public names with mypy
# make fuzz         read random requests from a fixed seed: five minutes
# make mutants      break the code in 60 places and see whether a test fails: an hour
# make bench        measure training, data and states: about half an hour on an idle machine
PYTHON := .venv/bin/python
INSTALLED := .venv/installed

.PHONY: install quickstart test lint fuzz mutants bench
install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt requirements-quickstart.txt
	python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mipha needs Python 3.11 or newer; this is " + sys.version)'
	python3 -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[quickstart,data,evaluation,gguf,serve,align,slurm,tensorboard,bench,test,lint]'
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-quickstart.txt
	touch $@

quickstart: install
	.venv/bin/mipha quickstart -o runs/quickstart

# One thread a process: two that wait for each other on a busy machine take 15 times as long.
test: install
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --dist loadfile

lint: install
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

fuzz: install
	$(PYTHON) -m tests.deploy.serve.fuzz --seconds 300 --seed 1

bench: install
	$(PYTHON) benchmarks/training.py --threads 2
	$(PYTHON) benchmarks/lengths.py
	$(PYTHON) benchmarks/loading.py
	$(PYTHON) benchmarks/checkpointing.py
	$(PYTHON) benchmarks/growth.py

mutants: install
	OMP_NUM_THREADS=1 $(PYTHON) -m tests.mutation --count 60 --seed 1
