# make demo: install and run the main job.  make test: install and run the default tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint types wheel clean

$(BIN)/ird-search: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo]'
	touch $@

$(VENV)/.test: $(BIN)/ird-search
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(BIN)/ird-search
	rm -rf runs/demo
	$(BIN)/ird-search demo --output runs/demo

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

wheel: $(VENV)/.test
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist > build.log 2>&1 || (cat build.log; false)
	rm -rf build build.log dist/there
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target dist/there dist/*.whl
	cd dist/there && ../../$(BIN)/python -c "import ird_search.cli as c; print('wheel:', c.__file__)"

clean:
	rm -rf $(VENV) runs build dist *.egg-info
