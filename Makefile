# Two commands: `make serve` and `make test`. Everything they need is installed into .venv the first time.

PYTHON ?= python3.11
# Where the CPU build of torch comes from; empty: from pip's own index, or from PyTorch's where that has none.
TORCH_INDEX ?=
PYTORCH_INDEX = https://download.pytorch.org/whl/cpu
TORCH = .venv/bin/pip install --disable-pip-version-check --progress-bar off --no-deps torch==2.13.0+cpu
SEED ?= 1
# The file of API keys that `make serve` and `make reload` ask for; empty: what serve_config.yaml says.
KEYS ?=

export RAY_AUTH_MODE = disabled
export RAY_USAGE_STATS_ENABLED = 0
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER = 0
export VLLM_NO_USAGE_STATS = 1
export MLFLOW_DISABLE_TELEMETRY = true
export MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT = true
PY = .venv/bin/python

.PHONY: serve reload stop status demo models report bench-quality bench-offpolicy bench-speed bench-surge bench-scale test \
	test-faults lint train clean

serve: .venv/installed  ## start MLflow, Ray, the models and the gateway; ends when they are ready. KEYS=FILE asks for API keys
	@$(PY) -m deployments.launch up $(if $(KEYS),--keys '$(KEYS)')

reload: .venv/installed  ## apply a changed serve_config.yaml to the running system; what did not change goes on. KEYS as for serve
	@$(PY) -m deployments.launch reload $(if $(KEYS),--keys '$(KEYS)')

stop: .venv/installed  ## end exactly what `make serve` started
	@$(PY) -m deployments.launch down

status: .venv/installed  ## memory and CPU of the running system
	@$(PY) -m deployments.launch status

demo: .venv/installed  ## watch it learn; the server must be running. SEED=2 for another stream
	@$(PY) -m benchmarks.demo --seed $(SEED)

models: .venv/installed  ## accuracy and latency of each size by kind of task; the server must be running
	@$(PY) -m benchmarks.models

report: .venv/installed  ## the notebook as HTML, into MLflow, which must be running; JOURNAL=sqlite:///var/journal.db for yours
	@$(PY) -m notebooks.report

bench-quality: .venv/installed  ## decisions beside other routers' and bandits', on recorded public streams
	@.venv/bin/python -c 'import pareto_bandit, mabwiser, vowpalwabbit' 2>/dev/null \
		|| .venv/bin/pip install --disable-pip-version-check -q --no-deps \
			paretobandit==0.1.1 mabwiser==2.7.4 vowpalwabbit==9.11.9
	@$(PY) -m benchmarks.quality

bench-offpolicy: .venv/installed  ## whether the statistics of promotion keep what they promise
	@OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(PY) -m benchmarks.offpolicy

bench-speed: .venv/installed  ## what routing costs, beside other gateways; starts and ends a system of its own
	@$(PY) -m benchmarks.speed --json var/speed.json

bench-surge: .venv/installed  ## one size saturated: does auto move in time, do replicas come and go; a system of its own
	@$(PY) -m benchmarks.surge --json var/surge.json

bench-scale: .venv/installed  ## what one router carries, and how several would share
	@OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(PY) -m benchmarks.scale --json var/scale.json

test: .venv/installed  ## all tests; starts a system of its own, on other ports
	@$(PY) -m pytest

# URL=http://127.0.0.1:8000 STATE=var for those of the running system, MINUTES=20 for the soaks, ONLY="T2 T5" for some,
# TABLE=deploy/FAULTS.md to keep the figures there
test-faults: .venv/installed  ## the catalogue of faults as a table
	@OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(PY) -m tests.faults $(if $(URL),--url $(URL)) \
		$(if $(STATE),--state $(STATE)) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(ONLY),--only $(ONLY)) \
		$(if $(TABLE),--table $(TABLE))

lint: .venv/installed  ## style and types
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy

train: .venv/installed  ## make the three small models again, from scratch (two CPU cores: within two hours)
	@$(PY) -m assets.train

clean: stop  ## forget what was learned, and the logs
	@rm -rf var

.venv/installed: requirements.txt
	@echo "installing into .venv, once; a few minutes"
	@test -d .venv || $(PYTHON) -m venv .venv || python3 -m venv .venv
	@.venv/bin/python -c 'import sys; assert sys.version_info[:2] == (3, 11), "Python 3.11 is needed: make PYTHON=..."'
	@.venv/bin/python -c 'import torch' 2>/dev/null \
		|| $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),2>/dev/null || $(TORCH) --index-url $(PYTORCH_INDEX)) \
		|| { echo "no CPU build of torch found: make TORCH_INDEX=<an index that has its CPU wheels> $(MAKECMDGOALS)"; exit 1; }
	@.venv/bin/pip install --disable-pip-version-check --progress-bar off --no-deps -q -r requirements.txt
	@.venv/bin/python -c 'import policies.kernels, policies.forecast'  # compiles them, so that the first start need not
	@touch $@
