# make demo | make test | make check: each sets up .venv by itself on a fresh machine.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COMFYUI := $(or $(LUNASHM_COMFYUI),$(wildcard $(HOME)/ComfyUI))
# posix_ipc and others may have no wheel for this Python: then pip needs a C compiler and Python's headers.

.PHONY: demo test check bench clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lunashm needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,test]'
	touch $@

# ComfyUI's own requirements, only where there is a checkout to test with; the constraints keep its torch in place.
$(VENV)/.comfyui: $(VENV)/.installed $(if $(COMFYUI),$(wildcard $(COMFYUI)/requirements.txt))
	$(if $(wildcard $(COMFYUI)/requirements.txt),$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement $(COMFYUI)/requirements.txt)
	touch $@

demo: $(VENV)/.comfyui
	$(BIN)/python -m bench.demo

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check $(VENV)/.comfyui
	$(BIN)/python -m pytest

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
