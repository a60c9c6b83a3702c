# make run    .venv, install, the main job; ends with the figure's path
# make test   the test suite, in up to four processes
# make demo   the bundled trained model beside random inits
# make regress  growth curves of OLMo-2's shapes and of the demo against the recorded ones
# make gpu    tests and benchmarks on a CUDA GPU, with the machine's own Python and torch
# make check  ruff, ruff-format, mypy
# make docs   the site of README.md and docs/, in outputs/site; a warning fails
# run, demo, test and gpu pass ARGS on: make run ARGS="depth=64 norm=swin_renorm"

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: run demo test regress mutations gpu check docs checkpoint format clean

# A stamp per extra: reinstalled when the dependencies change, not on every call.
# Not compiled: Python compiles what is imported, and half of an installation's time is for what isn't.
$(VENV)/%.stamp: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt \
		-e ".$(if $(filter run,$*),,[$*])"
	@touch $@

run: $(VENV)/run.stamp
	@$(BIN)/python -m simlab.run $(ARGS)

demo: $(VENV)/run.stamp
	@$(BIN)/python -m simlab.run source=demo $(ARGS)

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist worksteal $(ARGS)

regress: $(VENV)/run.stamp
	@$(BIN)/python -m simlab.regress $(ARGS)

# Which of the mistakes in scripts/mutations which gate catches, as a markdown table.
mutations: $(VENV)/test.stamp
	@mkdir -p outputs
	@$(BIN)/python scripts/mutation_table.py $(ARGS) > outputs/mutations.md
	@echo outputs/mutations.md

gpu:
	@$(PYTHON) scripts/gpu_check.py $(ARGS)

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The variable silences a note on MkDocs' future, which mkdocs-material prints at every build.
docs: $(VENV)/docs.stamp
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict
	@echo outputs/site/index.html

# A small OLMo-2 trained for a minute with transformers, to look at beside random inits.
checkpoint: $(VENV)/test.stamp
	@$(BIN)/python scripts/make_checkpoint.py outputs/checkpoint --steps 150

format: $(VENV)/dev.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) dist build
