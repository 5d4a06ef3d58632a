# One way in for everything: `make help`.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.built

.PHONY: help build demo test torture bench bench-lab bench-count lint format types clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: $(STAMP) ## the extension and all tools, in .venv

$(STAMP): pyproject.toml setup.py $(wildcard src/*)
	.ci/system-packages $(PYTHON)
	[ -x $(PY) ] || $(PYTHON) -m venv $(VENV)
	KTLS_WERROR=$(CI) $(PY) -m pip install --quiet --editable '.[test,lint]'
	$(PY) tests/borrowed.py fetch
	touch $@

demo: build ## a file over HTTPS by kernel TLS, to curl and openssl s_client
	@$(PY) -m ktls check || true
	@if $(PY) -m ktls check >/dev/null; then $(PY) examples/demo.py; \
	else echo "\nbooting a kernel that has it:\n"; lab/run -- $(PY) examples/demo.py; fi

test: build ## all tests, those that need a kernel in the lab; under 10 minutes
	$(PY) tests/run.py "not torture"

torture: build ## the long ones: thousands of connections, gigabytes
	$(PY) tests/run.py torture

$(VENV)/.bench: $(STAMP) benchmarks/reference.c
	.ci/system-packages $(PYTHON) nginx
	$(PY) -m pip install --quiet --editable '.[bench]'
	$(PY) -c 'from benchmarks.contenders import reference; reference()'
	touch $@

# What to measure: make bench BENCH='sendfile --runs 3 --largest 64M'
BENCH ?=

bench: $(VENV)/.bench ## how fast it is: tables, reports/bench.json, .png (in the lab: slow system calls)
	mkdir -p reports
	$(shell $(PY) -m ktls check >/dev/null 2>&1 || echo lab/run --) $(PY) -m benchmarks \
		--json reports/bench.json $(BENCH)
	$(PY) -m benchmarks.plot reports/bench.json reports/bench.png

# Only kernel TLS: system calls and page faults, which the others have more of, are too slow there.
bench-lab: $(VENV)/.bench ## kernel TLS at native speed, in a kernel that is compiled for it first
	.ci/system-packages $(PYTHON) bc bison flex make patch xz-utils:xz
	mkdir -p reports
	lab/run --kernel uml-perf --memory 4G -- $(PY) -m benchmarks \
		--batch 512M --most 4000 --only reference --only ktls --only stdlib-ktls --only nginx-ktls \
		--only aio-ktls --only aio-fastnet-ktls \
		--json reports/bench-lab.json $(or $(BENCH),sendfile small recv threads aio-files aio-data)
	$(PY) -m benchmarks.plot reports/bench-lab.json reports/bench-lab.png

bench-count: $(VENV)/.bench ## how many instructions it takes, in an emulator; takes long
	.ci/system-packages $(PYTHON) qemu-system-x86:qemu-system-x86_64
	mkdir -p reports
	lab/run --kernel qemu -- $(PY) -m benchmarks \
		--clock cpu --runs 3 --batch 2M --most 100 --largest 1M \
		--json reports/bench-count.json $(or $(BENCH),sendfile small recv handshake memory)
	$(PY) -m benchmarks.plot reports/bench-count.json reports/bench-count.png

lint: build ## format and style of everything
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/clang-format --dry-run --Werror src/*.[ch] src/*.cpp tests/*.c benchmarks/*.c lab/*.c

types: build ## mypy --strict, and the extension against its stub
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy lab/run lab/*.py
	$(PY) -m mypy.stubtest ktls._ktls

format: build ## make it so
	$(VENV)/bin/ruff format
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/clang-format -i src/*.[ch] src/*.cpp tests/*.c benchmarks/*.c lab/*.c

clean: ## everything that can be made again
	rm -rf $(VENV) build reports *.egg-info ktls/*.so
