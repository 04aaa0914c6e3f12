# The verbs of the project; CI calls the same ones.
PYTHON ?= python
TEST = $(PYTHON) -m pytest

.PHONY: test quick style types interpret pinned compile native sanitize bench peers verdicts

## what CI runs: style, types, every test (one compiles every kernel ahead of time), the kernels under the interpreter.
## A file's tests stay together, in WORKERS processes of one thread each: the models are too small for more threads.
WORKERS ?= 2
test: style types interpret
	OMP_NUM_THREADS=1 $(TEST) tests --ignore=tests/kernels/interpret -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
	  --durations 25

## the tests that take seconds
quick:
	$(TEST) tests --ignore=tests/kernels/interpret -m "not slow" -x

style:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m basedpyright --level error --pythonpath "$$($(PYTHON) -c "import sys; print(sys.executable)")"

## every Triton kernel under the interpreter, in a process of its own: TRITON_INTERPRET is read when a kernel is defined
interpret:
	TRITON_INTERPRET=1 $(TEST) tests/kernels/interpret

## what CI runs at the versions of .ci/constraints.txt too: what reaches into Triton, and into PEFT, TRL and bitsandbytes
REACHING = accelerate adapter answer_head grpo layers micro_batches model quantised scoring siblings training
pinned: interpret
	$(PYTHON) -m lorapar_kernels.compile --arch 90
	OMP_NUM_THREADS=1 $(TEST) -m "not slow" $(REACHING:%=tests/lorapar/test_%.py)

## every Triton kernel for every architecture, without a GPU
compile:
	$(PYTHON) -m lorapar_kernels.compile --arch 80 90 100

## csrc's libraries, where a compiler is
native:
	$(PYTHON) setup.py build_ext --inplace

## the C interface under random and hostile arguments, with the address and undefined-behaviour sanitizers
CXX ?= g++
SANITIZED ?= build/native_fuzz
SANITIZE_SEED ?= 1
SANITIZE_ROUNDS ?= 1000
sanitize:
	mkdir -p $(dir $(SANITIZED))
	$(CXX) -std=c++17 -O1 -g -ffp-contract=off -fno-math-errno -fno-trapping-math -fsanitize=address,undefined \
	  -fno-sanitize-recover=all -fopenmp -DQUEUES=true tests/kernels/native_fuzz.cpp csrc/cpu/*.cpp -o $(SANITIZED)
	$(SANITIZED) $(SANITIZE_SEED) $(SANITIZE_ROUNDS)

## PEFT's own tests of LoRA, with its layers and with ours, and what differs (tests/peers/run.py; about ten minutes);
## needs pip install -e '.[peers]'
peers:
	$(PYTHON) -m tests.peers.run

## is_correct beside reasoning-gym's own scorers, over all tasks, and beside the solutions with verdicts that variables
## name (tests/peers/verdicts.py); fails if a wrong answer is called right
verdicts:
	$(PYTHON) -m tests.peers.verdicts

## microbenchmarks and the comparison with the released script's way; writes bench/results/
bench:
	$(TEST) bench --benchmark-only
