# loopfast: `make help` lists the targets. PYTHON selects the interpreter of the environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EVERYTHING := --editable '.[train,bench,dev]'
NATIVE := CMakeLists.txt $(wildcard kernels/native/*/*)
PACKAGING := pyproject.toml constraints.txt $(NATIVE)
TRL := .venv-trl
OLDER := .venv-torch2.11
RACE := .venv-race
WHEEL := build/wheel

# Two busy processes with two threads each lose more time to each other than the second thread saves. Python keeps compiled
# files whatever the environment says; compiling them takes a third of every start.
PYTEST := env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# A file's tests stay in one process, which makes their shared objects once.
SPREAD := -n 2 --dist loadfile --no-loadscope-reorder
# Prints a line for each tenth of a run. pytest alone prints a letter for each test, and the reason of each skip.
BRIEF := -p tests.progress -q -r NfE
# The tests that compute with floating-point numbers; Triton's interpreter does so in numpy on every processor.
COMPUTING := tests/kernels tests/rollout tests/policies tests/rewards tests/evaluation tests/integrations \
  tests/exporting tests/training tests/engines/test_ema.py tests/test_schedules.py tests/test_published_logprobs.py -k 'not triton'
# The tests among them in which processors have differed, and that train little; `test-wheel` runs those of the ops.
DIFFERING := tests/rewards tests/training/test_loss.py tests/training/test_update.py tests/training/test_rounding.py \
  tests/test_schedules.py tests/test_published_logprobs.py --ignore tests/rewards/test_http.py \
  --ignore tests/rewards/test_thread.py -k 'not triton'
# The tests of the ops, the algorithm and the configuration that start no process and train no model.
each = $(addprefix tests/$(1)/test_,$(addsuffix .py,$(2)))
FAST := $(call each,kernels,backends denoise_step group_norm_silu leave_one_out loop_loss philox reduction transition_logprob \
  validation) $(call each,rollout,capture recording trajectories) $(call each,policies,guided_unet layers loading) \
  $(call each,config,config) $(call each,engines,deepspeed_config local) $(call each,prompts,files sources) \
  $(call each,rewards,base) $(call each,run,console folder tracking) $(call each,training,batch checks collect loss \
  metrics microbatch pairs rounding scorer state update) \
  $(call each,system,allocator doctor interrupts memory plugins processor) \
  $(addprefix tests/test_,$(addsuffix .py,algorithms documentation layers published_logprobs)) -k 'not triton'
# The instructions that these libraries may use: torch's own kernels, oneDNN, MKL, and loopfast's.
# If the limit is above what the processor has, torch ends with an illegal instruction.
HAS = grep -qw $(1) /proc/cpuinfo || { echo "Skipped: this processor has no $(1)"; exit 0; };
AS = ATEN_CPU_CAPABILITY=$(1) ONEDNN_MAX_CPU_ISA=$(2) MKL_ENABLE_INSTRUCTIONS=$(3) LOOPFAST_ISA=$(4)
WITHOUT_AVX := $(call AS,default,SSE41,SSE4_2,portable)

# $(call install,environment,arguments of pip,folders to compile): the log has pip's output, such as warnings about its
# settings. pip compiles on one processor, the next line on all. Rarely imported files are compiled when they are imported.
SELDOM := '/(tests?|testing|pip|models|pipelines)/'
define install
@echo "Installing into $(1) (some minutes) ..."
@start=$$(date +%s); $(1)/bin/python -m pip install --disable-pip-version-check --progress-bar off --no-compile $(2) \
  > $(1)/install.log 2>&1 || { tail -n 40 $(1)/install.log; exit 1; }; \
  $(if $(3),$(1)/bin/python -m compileall -q -j 0 -x $(SELDOM) $(3) >> $(1)/install.log 2>&1;) \
  echo "Installed in $$(( $$(date +%s) - start )) s, the log is $(1)/install.log"
endef

.DEFAULT_GOAL := help
.PHONY: demo test suite test-fast coverage test-processors as-sse4 as-sse4-short as-avx2 as-avx512 as-two-threads as-busy test-wheel test-trl test-older sanitize lint bench chaos race race-sweep race-reward gpu-check ptx-report study clean help

demo: $(VENV)/.train ## train the embedded model with LOOP and write a report (ARGS="--set run.seed=1" adds options)
	@$(BIN)/loopfast train --config tiny --resume auto $(ARGS)

test: $(VENV)/.dev ## lint and every test (ARGS="-k philox" selects)
	@$(MAKE) --no-print-directory --jobs 2 lint suite

suite: $(VENV)/.dev ## every test
	@$(PYTEST) $(SPREAD) $(BRIEF) $(ARGS)

test-fast: $(VENV)/.dev ## tests to run while you write code, in a minute: no training, no processes, no interpreter
	@$(PYTEST) $(SPREAD) $(BRIEF) $(FAST) $(ARGS)

coverage: $(VENV)/.dev ## every test, with line coverage, which must be at least 93 %
	@$(PYTEST) $(SPREAD) $(BRIEF) --cov --cov-report=term $(ARGS)

test-processors: ## the five targets below, one after the other
	@for each in as-sse4 as-avx2 as-avx512 as-two-threads as-busy; do echo "$$each:" && $(MAKE) -s $$each || exit 1; done

as-sse4: $(VENV)/.dev ## the tests that compute, as on a processor without AVX
	@$(WITHOUT_AVX) $(PYTEST) $(SPREAD) $(BRIEF) $(COMPUTING) $(ARGS)

as-sse4-short: $(VENV)/.dev ## those of as-sse4 in which processors have differed, as in CI
	@$(WITHOUT_AVX) $(PYTEST) $(BRIEF) $(DIFFERING) $(ARGS)

as-avx2: $(VENV)/.dev ## the tests of as-sse4 with AVX2, if this processor has it
	@$(call HAS,avx2) $(call AS,avx2,AVX2,AVX2,avx2) $(PYTEST) $(SPREAD) $(BRIEF) $(COMPUTING) $(ARGS)

as-avx512: $(VENV)/.dev ## the tests of as-sse4 with AVX-512, if this processor has it
	@$(call HAS,avx512vl) $(call AS,avx512,AVX512_CORE,AVX512,avx512) $(PYTEST) $(SPREAD) $(BRIEF) $(COMPUTING) $(ARGS)

as-two-threads: $(VENV)/.dev ## the tests of as-sse4 on two threads
	@OMP_NUM_THREADS=2 $(BIN)/python -m pytest $(BRIEF) $(COMPUTING) $(ARGS)

as-busy: $(VENV)/.dev ## every test, while two busy loops run
	@(while :; do :; done) & one=$$!; (while :; do :; done) & two=$$!; trap "kill $$one $$two" EXIT; \
	  $(PYTEST) $(SPREAD) $(BRIEF) $(ARGS)

lint: $(VENV)/.dev ## style and types
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet . && echo "Style: no faults"
	@$(BIN)/mypy

test-wheel: $(TRL)/.wheel ## the built wheel in another environment: its content, and the tests of the ops without AVX
	cd $(WHEEL) && $(WITHOUT_AVX) env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 \
	  $(CURDIR)/$(TRL)/bin/python -m pytest -c $(CURDIR)/pyproject.toml -o pythonpath=$(CURDIR)/$(WHEEL)/tree \
	  -p no:cacheprovider -q -k 'not triton' tree/tests/kernels $(ARGS)
	LOOPFAST_WHEEL=$$(echo $(CURDIR)/$(WHEEL)/*.whl) $(PYTEST) -q tests/test_packaging.py -k the_wheel

test-trl: $(TRL)/.wheel $(VENV)/.dev ## TRL's trainer with the built wheel's ops, exports in earlier libraries, and datasets
	LOOPFAST_TRL_PYTHON=$(CURDIR)/$(TRL)/bin/python $(PYTEST) tests/integrations/test_trl.py \
	  tests/integrations/test_exports_elsewhere.py $(ARGS)
	$(TRL)/bin/python -m pytest -p no:cacheprovider -q tests/prompts/test_datasets.py

sanitize: $(VENV)/.dev ## the C interface under the address and undefined-behavior sanitizers
	$(BIN)/cmake -S . -B build/sanitize -DLOOPFAST_SANITIZE=ON -DLOOPFAST_TESTS=ON -DCMAKE_CXX_FLAGS=-Werror \
	  -DCMAKE_CXX_FLAGS_RELEASE=-O1
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize --output-on-failure

chaos: $(VENV)/.dev ## break small runs, resume them, compare them bit by bit (10 minutes; ARGS="--minutes 60 --out FILE")
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.chaos $(ARGS)

bench: $(VENV)/.dev ## time the ops; results go to benchmarks/results (ARGS="-k loop_loss" selects)
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=build/benchmarks.json $(ARGS)
	$(BIN)/python -m benchmarks.keep build/benchmarks.json

test-older: $(OLDER)/.dev ## every test with torch 2.11 and triton 3.6 (3 GB to download; ARGS="-k philox" selects)
	OMP_NUM_THREADS=1 $(OLDER)/bin/python -m pytest -n 2 $(ARGS)

race: $(TRL)/.wheel $(RACE)/.train ## TRL's trainer against ours, with the same work (about 20 minutes; ARGS="--works embedded" selects)
	$(BIN)/python -m benchmarks.race equal $(ARGS)

race-sweep: $(TRL)/.wheel $(RACE)/.train ## try the settings of both trainers, before race-reward (an hour)
	$(BIN)/python -m benchmarks.race sweep $(ARGS)

race-reward: $(TRL)/.wheel $(RACE)/.train ## the time after which each reaches the same held-out reward (an hour)
	$(BIN)/python -m benchmarks.race reward $(ARGS)

gpu-check: $(VENV)/.dev ## every check and measurement on one GPU, in 8 minutes; results go to profiles/results (ARGS="--list")
	$(BIN)/python -m benchmarks.gpu_check $(ARGS)

ptx-report: $(VENV)/.dev ## compile the GPU kernels, without a GPU, and write profiles/ptx.md
	$(BIN)/python profiles/ptx_report.py

study: $(VENV)/.train ## compare the algorithms on the embedded benchmark (hours; ARGS goes to the study)
	$(BIN)/python -m benchmarks.study $(ARGS)

clean: ## remove the environment, builds and caches (runs/ stays)
	rm -rf $(VENV) $(TRL) $(OLDER) $(RACE) build dist .coverage .coverage.* .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help: ## print this list
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 17

$(BIN)/python:
	@$(PYTHON) -m venv $(VENV)

# Each stamp is an installed set of extras; it is older than its sources when they have changed.
$(VENV)/.train: $(PACKAGING) | $(BIN)/python
	$(call install,$(VENV),-c constraints.txt --editable '.[train]',$(VENV)/lib loopfast)
	@touch $@

$(VENV)/.dev: $(PACKAGING) | $(BIN)/python
	$(call install,$(VENV),-c constraints.txt $(EVERYTHING),$(VENV)/lib loopfast kernels benchmarks)
	@touch $@ $(VENV)/.train

# An earlier torch and its triton, as on GPU machines; everything else as pinned, except numpy: loops over arguments fail in
# triton 3.6's interpreter with numpy 2.4.
$(OLDER)/.dev: $(PACKAGING)
	@$(PYTHON) -m venv $(OLDER)
	@sed 's/^torch==.*/torch==2.11.0/; s/^triton==.*/triton==3.6.0/; s/^numpy==.*/numpy==2.3.5/' constraints.txt \
	  > $(OLDER)/constraints.txt
	$(call install,$(OLDER),-c $(OLDER)/constraints.txt $(EVERYTHING),$(OLDER)/lib)
	@touch $@

# TRL's last release with a trainer for diffusion, with the libraries of its time, and loopfast as a wheel. torch, which is
# half of both environments, comes from the other one: packages that are not installed here are imported from it.
$(TRL)/.libraries: tests/integrations/trl-constraints.txt | $(VENV)/.dev
	@$(PYTHON) -m venv $(TRL)
	@echo $(CURDIR)/$(VENV)/lib/python*/site-packages > $$(echo $(TRL)/lib/python*/site-packages)/of-$(VENV).pth
	$(call install,$(TRL),-c $< trl diffusers transformers peft tensorboard pydantic pytest hypothesis)
	@touch $@

$(TRL)/.wheel: $(TRL)/.libraries $(VENV)/.dev $(shell git ls-files loopfast kernels tests/kernels 2>/dev/null)
	@rm -rf $(WHEEL) && mkdir -p $(WHEEL)/tree/tests
	$(BIN)/python -m pip wheel -qq --no-deps --no-build-isolation --wheel-dir $(WHEEL) .
	@cp -r tests/kernels tests/conftest.py tests/forks.py $(WHEEL)/tree/tests
	@mkdir -p $(WHEEL)/tree/kernels && cp -r kernels/native kernels/README.md $(WHEEL)/tree/kernels
	$(TRL)/bin/python -m pip install -qq --no-deps --force-reinstall $(WHEEL)/*.whl
	@touch $@

# loopfast as a user installs it, without development tools.
$(RACE)/.train: $(PACKAGING)
	@$(PYTHON) -m venv $(RACE)
	$(call install,$(RACE),-c constraints.txt --editable '.[train]',$(RACE)/lib)
	@touch $@
