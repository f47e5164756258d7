BIN := .venv/bin
PYTHON ?= python3

.PHONY: venv check test demo clean

venv: .venv/.installed

# the stamp makes the installation happen once, and again when what to install has changed
.venv/.installed: pyproject.toml setup.py constraints.txt $(wildcard memopt/optim/csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[hf,dev]"
	touch $@

check: venv
	scripts/check

test: venv
	scripts/test

demo: venv
	$(BIN)/memopt demo

clean:
	rm -rf memopt/optim/*.so .venv .demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
