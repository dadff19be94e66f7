# make demo | make test | make check | make acceptance | make gpu: each sets up .venv by itself on a fresh machine.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
COMFYUI := $(or $(LUNASHM_COMFYUI),$(wildcard $(HOME)/ComfyUI))
# posix_ipc and others may have no wheel for this Python: then pip needs a C compiler and Python's headers.

.PHONY: demo test check acceptance gpu clean

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

# The user's eight tests on real ComfyUI servers, one line each: ARGS="--short --only T3,T5 --out DIR".
acceptance: $(VENV)/.comfyui
	$(BIN)/python -m bench.acceptance $(if $(COMFYUI),--comfyui "$(COMFYUI)") $(ARGS)

# Everything that only a GPU can tell, see bench/gpu/README.md: PARTS=1,2 OUT=DIR DRY=1 ARGS="--fresh".
# GPU_PYTHON names a Python that has what is needed: then nothing is installed.
ifdef GPU_PYTHON
gpu:
else
GPU_PYTHON := $(BIN)/python
gpu: $(VENV)/.comfyui
endif
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(GPU_PYTHON) -m bench.gpu $(if $(DRY),--dry) \
		$(if $(PARTS),--parts "$(PARTS)") $(if $(OUT),--out "$(OUT)") \
		$(if $(COMFYUI),--comfyui "$(COMFYUI)") $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
