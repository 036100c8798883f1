# make demo   install and align the embedded text-to-image model: pairs, training, evaluation, report
# make test   install and run everything that .ci/run runs: ruff, pyright, pytest
# Needs Python (3.10 or later, with venv) and git; everything else goes into .venv.
#   make demo PYTHON=python3.12     another interpreter
#   make demo DEVICE=cuda           do not ask nvidia-smi
#   make install EXTRAS=image,video more of the optional packages (see `polyalign doctor`)

PYTHON ?= python3
VENV   ?= .venv
EXTRAS ?=
TEST_EXTRAS ?= dev,image,audio,emoji
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
CONSTRAINTS ?= $(if $(filter cpu,$(DEVICE)),constraints/cpu.txt)

PIP_INSTALL = $(VENV)/bin/python -m pip install --quiet $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
PARTS = core datasets evaluation modalities configs
comma = ,
STAMP = $(VENV)/.installed-$(DEVICE)-$(subst $(comma),-,$(or $(EXTRAS),base))
TEST_STAMP = $(VENV)/.installed-$(DEVICE)-$(subst $(comma),-,$(TEST_EXTRAS))
INPUTS = pyproject.toml $(wildcard constraints/*.txt) | $(VENV)/bin/python

.PHONY: install demo test lint typing clean

install: $(STAMP)

demo: $(STAMP)
	$(VENV)/bin/polyalign align configs/image/quickstart.yaml

test: lint
	$(VENV)/bin/python -m pytest

lint: $(TEST_STAMP) typing
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

# Type checkers do not follow the __path__ that src/polyalign/__init__.py extends: show them the package as links.
typing:
	mkdir -p .typing/polyalign
	for part in $(PARTS); do ln -sfn ../../$$part .typing/polyalign/$$part; done
	ln -sfn ../../src/polyalign/__init__.py .typing/polyalign/__init__.py

clean:
	rm -rf $(VENV) .typing .pytest_cache .ruff_cache .hypothesis build dist
	find $(PARTS) src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(INPUTS)
	@echo "installing into $(VENV) for $(DEVICE): a few minutes the first time"
	$(PIP_INSTALL) -e '.$(if $(EXTRAS),[$(EXTRAS)])'
	touch $@

$(TEST_STAMP): $(INPUTS)
	@echo "installing into $(VENV) for $(DEVICE): a few minutes the first time"
	$(PIP_INSTALL) -e '.[$(TEST_EXTRAS)]'
	touch $@
