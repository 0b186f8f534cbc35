# make setup | demo | test | e2e-full | check | bench | bench-whisper | bench-tensorrt | bench-serve | bench-loadgen | bench-scenes | device
PYTHON ?= python3
BIN := .venv/bin
export NNCF_CI := 1

.PHONY: setup demo test e2e-full check bench bench-whisper bench-tensorrt bench-serve bench-loadgen bench-scenes device

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[compress,dev,tensorrt-rtx]'
	touch $@

demo: setup
	$(BIN)/edgemm compress reasoner --target x86-openvino -o out

# Two workers, a file each; small models gain nothing from more threads.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

e2e-full: setup
	$(BIN)/pytest -m full tests/e2e/test_full_size.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy edgemm
	$(BIN)/pytest tests/contract

bench: setup
	$(BIN)/python tests/bench/compress.py
	$(BIN)/python tests/bench/whole_time.py
	$(BIN)/python tests/bench/quantizers.py reasoner
	$(BIN)/python tests/bench/quantizers.py reasoner --target x86-onnxruntime
	$(BIN)/python tests/bench/quantizers.py whisper

device: setup
	$(BIN)/pytest tests/device

bench-serve: setup
	$(BIN)/python tests/bench/serving.py
	$(BIN)/python tests/bench/serving_memory.py

bench-scenes: setup
	$(BIN)/python tests/bench/scenes.py

bench-tensorrt: setup
	$(BIN)/python tests/bench/tensorrt.py

bench-loadgen: setup
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt mlcommons-loadgen==6.0.17
	test -f out/x86-openvino/reasoner-x86-openvino.edgemm || $(MAKE) demo
	$(BIN)/python tests/bench/loadgen.py

bench-whisper: setup .venv/peers/.installed
	$(BIN)/python tests/bench/whisper.py

.venv/peers/.installed: constraints.txt
	$(PYTHON) -m venv .venv/peers
	.venv/peers/bin/pip install --quiet --disable-pip-version-check -c constraints.txt faster-whisper==1.2.1 optimum-intel==2.2.0 openvino==2026.4.1 openvino-genai==2026.4.1.0 openvino-tokenizers==2026.4.1.0
	.venv/peers/bin/pip uninstall --quiet -y torchvision
	touch $@
