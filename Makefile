# make setup | demo | test | check | bench
PYTHON ?= python3
BIN := .venv/bin
export NNCF_CI := 1

.PHONY: setup demo test check bench

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[compress,dev]'
	touch $@

demo: setup
	$(BIN)/edgemm compress reasoner --target x86-openvino -o out

test: setup
	$(BIN)/pytest

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy edgemm
	$(BIN)/pytest tests/contract

bench: setup
	$(BIN)/python tests/bench/compress.py
