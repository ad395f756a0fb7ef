# Each target first makes .venv from requirements.lock; a second run installs nothing. ARGS passes options on: make demo ARGS=--quick

# Found by running it: a name on PATH may be a shim for a version that is not there, or lack venv.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3; do \
	$$name -c 'import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null \
	&& echo $$name && break; done)
# On Linux the package index serves torch with gigabytes of GPU libraries; without a GPU a CPU build is tried first.
TORCH ?= $(shell sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.lock)$(shell \
	[ "$$(uname)" != Linux ] || nvidia-smi >/dev/null 2>&1 || echo +cpu)
# Beside another Python: make step PYTHON=python3.12 VENV=build/python3.12 (a plain torch for it takes gigabytes).
VENV ?= .venv
BIN := $(VENV)/bin
PACKAGES := -c "import sysconfig; print(sysconfig.get_path('purelib'))"

# The oldest and the newest transformers that are tested besides the locked one.
TRANSFORMERS ?= $(shell sed -n 's/.*"transformers>=\(.*\)".*/\1/p' pyproject.toml) 5.24.0
# Tests that say most of another version: the laws and the parity with Hugging Face PEFT, on one case of each method.
OTHER_VERSIONS := --one-case tests/test_laws.py tests/test_input_laws.py tests/test_output_laws.py tests/test_parity.py \
	tests/test_input_parity.py tests/model/prompts tests/methods/test_prefix_tuning.py

.PHONY: demo methods instructions test step versions coverage bench guard gpu-check generated docs lint format types check lock clean

demo: $(VENV)/installed
	$(BIN)/python -m peanut.lab.demo $(ARGS)

methods: $(VENV)/installed
	OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.every_method $(ARGS)

instructions: $(VENV)/installed
	OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.instructions $(ARGS)

test: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=auto $(ARGS)

step: $(VENV)/installed
	$(BIN)/python -m benchmarks.one_step

versions: $(TRANSFORMERS:%=build/transformers-%/installed)
	for version in $(TRANSFORMERS); do echo "transformers $$version"; OMP_NUM_THREADS=1 \
		build/transformers-$$version/bin/python -m pytest --numprocesses=auto $(OTHER_VERSIONS) $(ARGS) || exit 1; done

# Which lines the tests run, in twice the time.
coverage: override ARGS += --cov --cov-report=term:skip-covered
coverage: test

bench: $(VENV)/installed
	OMP_WAIT_POLICY=passive $(BIN)/peanut bench $(ARGS)

guard: $(VENV)/installed
	OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.guard $(ARGS)

gpu-check: $(VENV)/installed
	OMP_WAIT_POLICY=passive $(BIN)/python -m benchmarks.gpu_check $(ARGS)

generated: $(VENV)/installed
	$(BIN)/python -m peanut.lab.generated

docs: $(VENV)/installed
	$(BIN)/python -m pdoc --docformat google --output-directory site \
		peanut $(addprefix peanut.,export lab methods operators protocols training weights)

lint: $(VENV)/installed
	$(BIN)/ruff check

format: $(VENV)/installed
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(VENV)/installed
	$(BIN)/mypy

check: lint types
	$(BIN)/ruff format --check
	! grep -iE '^(nvidia|triton|cuda)' requirements.lock

$(VENV)/installed: requirements.lock pyproject.toml
	@[ -n "$(PYTHON)" ] || { echo "error: no usable Python on PATH; expected Python 3.10 to 3.13 with its venv module" \
	"(on Debian: python3 and python3-venv); install one, or name it: make PYTHON=/path/to/python ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH), then what requirements.lock lists (a minute or two)"
	@take() { $(BIN)/pip install -qq --constraint requirements.lock "$$1"; }; case "$(TORCH)" in \
	*+cpu) take "$(TORCH)" 2>/dev/null || { echo "pip finds no $(TORCH) for this Python; taking $(TORCH:+cpu=), which brings" \
		"GPU libraries: about 3 GB to download, 6 GB on disk. For less, stop here and set PIP_EXTRA_INDEX_URL to" \
		"PyTorch's index of CPU builds (its installation page names it)"; take "$(TORCH:+cpu=)"; };; \
	*) take "$(TORCH)";; esac
	@$(BIN)/pip install -qq --no-deps --requirement requirements.lock
	@$(BIN)/pip install -qq --no-deps --no-build-isolation --editable .
	@! $(BIN)/pip check | grep -vE '^(No broken requirements|timm .* requires torchvision)'
	@touch $@

# Another transformers, which comes before what .venv has.
build/transformers-%/installed: $(VENV)/installed
	$(BIN)/python -m venv $(@D)
	@echo "import site; site.addsitedir('$$($(BIN)/python $(PACKAGES))')" > $$($(@D)/bin/python $(PACKAGES))/locked.pth
	@$(@D)/bin/pip install -qq "transformers==$*"
	@touch $@

# Keeps the pins that still fit; ARGS=--upgrade takes the newest of everything.
lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet uv==0.13.9
	UV_PYTHON_DOWNLOADS=never build/lock/bin/uv pip compile --quiet --universal --python-version 3.10 --all-extras \
		--custom-compile-command "make lock" --output-file requirements.lock pyproject.toml $(ARGS)

clean:
	rm -rf $(VENV) site build dist htmlcov .coverage .mypy_cache .pytest_cache .ruff_cache .hypothesis src/*.egg-info
