# The two main commands: `make demo` searches on real images and prints the result, `make test` runs the tests.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all quick lint lock clean

# Always on the processor: the locked packages have no CUDA libraries.
demo: .venv/installed
	TRIALYARD_HOME=yard $(BIN)/trialyard run digits --devices cpu

# The files whose tests train nothing and start no server: for every change, within a minute.
QUICK := $(patsubst %,tests/test_%.py,artifacts attempt batches catalog definition devices docs figures notebook progress \
	results settings space statistics)

test: .venv/installed-dev
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not long" $(PYTEST)

quick: .venv/installed-dev
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(QUICK) $(PYTEST)

test-all: test
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m long $(PYTEST)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Each package is checked against the lock's hash. The project itself is built with the locked build tools.
.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.lock
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements-dev.lock
	touch $@

# Renews the locks from pyproject.toml; needs uv. They name no index, so any mirror works. The second and third lock use
# the versions of the first. The extra s3 is one small package, and in the image workers need no shared disk with it.
LOCKED := uv pip compile --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate --no-header \
	pyproject.toml --group build --extra s3
lock:
	$(LOCKED) -o requirements.lock
	$(LOCKED) --group dev -c requirements.lock -o requirements-dev.lock
	$(LOCKED) --extra gpu -c requirements.lock -o requirements-gpu.lock

clean:
	rm -rf .venv yard
