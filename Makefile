BIN := .venv/bin
PYTHON ?= python3

.PHONY: venv check test test-html test-deepspeed test-vllm demo clean

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

# the report's page in a real browser
test-html: venv
	scripts/install-chromium
	scripts/test -m browser

# the tests against DeepSpeed itself, in an environment of its own: memopt has to work without it
test-deepspeed: .venv-deepspeed/.installed
	.venv-deepspeed/bin/python -m pytest -q -rs -m deepspeed

.venv-deepspeed/.installed: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv-deepspeed
	.venv-deepspeed/bin/python -m pip install --quiet -c constraints.txt -e ".[hf,dev,deepspeed]"
	touch $@

# the tests inside vLLM's CPU build, in an environment of its own: vLLM pins most of what it needs
test-vllm: .venv-vllm/.installed
	.venv-vllm/bin/python -m pytest -q -rs -m vllm tests/test_vllm_*.py

.venv-vllm/.installed: pyproject.toml setup.py constraints-vllm.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --no-deps -r constraints-vllm.txt
	.venv-vllm/bin/python -m pip install --quiet --no-deps -e .
	touch $@

demo: venv
	$(BIN)/memopt demo

clean:
	rm -rf memopt/optim/*.so .venv .venv-deepspeed .venv-vllm .demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
