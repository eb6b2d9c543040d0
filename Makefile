# make serve   talk to a real model over a compressed KV cache     make demo   see what it did
.PHONY: setup serve demo test test-fast test-next-vllm lint chart sbom audit cuda bench bench-gpu eval lm-eval clean
export MODEL PORT BUDGET SETTINGS ARGS

BIN := .venv/bin

setup:
	scripts/setup-cpu.sh

serve: setup
	scripts/serve.sh

demo: setup
	$(BIN)/mdkv demo --port $(or $(PORT),8000)

# Two at a time; files of tests in the order of their names: those that take minutes are not last.
PAIRS := -n 2 --dist loadfile --no-loadscope-reorder

# Everything that needs no GPU; tests that keep deadlines come after the others, one by one.
test:
	scripts/setup-cpu.sh --dev
	$(MAKE) lint
	$(BIN)/python -m pytest -m "not alone" $(PAIRS) --durations 10
	$(BIN)/python -m pytest -m alone
	$(MAKE) test-next-vllm

test-fast:
	scripts/setup-cpu.sh --dev
	$(MAKE) lint
	$(BIN)/python -m pytest -m "not server and not slow and not model and not alone" $(PAIRS)

# The plugin and one real server on vLLM 0.33, for which the index has no CPU build yet.
NEXT_VLLM := build/vllm-0.33
test-next-vllm:
	$(BIN)/python tests/overlay/make_overlay.py 0.33.0 $(NEXT_VLLM)
	PYTHONPATH=$(NEXT_VLLM) $(BIN)/python -m pytest tests/plugin tests/e2e/test_server.py $(PAIRS)

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	$(BIN)/hadolint --failure-threshold style Dockerfile

# What the Helm chart has from the code, and the manifests that its examples make.
chart:
	$(BIN)/python -m mdkv_vllm.settings_schema deploy/helm/mdkv-vllm/values.schema.json
	$(BIN)/python tests/helm/golden.py

# CycloneDX list of what the environment holds, by default this checkout's, and known
# vulnerabilities of what the images install, which asks PyPI and OSV over the network.
sbom: PYTHON := .venv/bin/python
sbom:
	scripts/supply-chain.sh sbom $(PYTHON) results/sbom.json

audit:
	scripts/supply-chain.sh audit requirements/cpu.txt requirements/cuda.txt requirements/default-model.txt

bench: MODEL := models/SmolLM2-135M-Instruct
bench:
	scripts/setup-cpu.sh --dev
	mkdir -p results
	$(BIN)/mdkv prepare-model --out $(MODEL)
	$(BIN)/python benchmarks/decode_kernel.py --json results/decode_kernel.json
	$(BIN)/python benchmarks/prefill.py --model $(MODEL) --out results/prefill.json
	$(BIN)/python benchmarks/serving.py --model $(MODEL) --out results/serving.json

# The CUDA kernels, on a machine with nvcc; ARCH="80 90a" builds for these GPUs alone.
cuda:
	scripts/build-cuda.sh $(ARCH)

# On a machine with a GPU, torch and triton; nothing is installed. STAGE= check, decode, compress,
# profile, sanitize or full.
bench-gpu: STAGE := check
bench-gpu:
	python3 benchmarks/gpu/run.py --stage $(STAGE) --json results/gpu/$(STAGE).jsonl

# The tables and plots of docs/quality.md, hours on two cores; QUICK=1 takes minutes. HAYSTACK=
# names text to hide things in other than the text that the defaults were chosen on.
EVAL := --tasks needle_digits followup multikey_1 multikey_2 long_answer \
    --lengths 1024 2048 --per-task 6 --budgets 0.5 0.266 0.125 0.0625 --seed 1
eval: MODEL := models/SmolLM2-135M-Instruct
eval:
	scripts/setup-cpu.sh --dev
	$(BIN)/mdkv prepare-model --out $(MODEL)
	test -f $(MODEL)/mixeddim_heads.safetensors || $(BIN)/mdkv head-scores $(MODEL)
	$(BIN)/mdkv eval $(MODEL) --offline --out results/eval $(if $(QUICK),--quick,$(EVAL)) \
	    $(if $(HAYSTACK),--haystack $(HAYSTACK))

# The same tasks put by EleutherAI's lm_eval to the server that `make serve` started.
lm-eval: MODEL := models/SmolLM2-135M-Instruct
lm-eval:
	scripts/setup-cpu.sh --dev
	$(BIN)/python benchmarks/lm_eval/run.py $(MODEL) --server http://127.0.0.1:$(or $(PORT),8000) \
	    $(if $(BUDGET),--budget $(BUDGET)) $(ARGS)

clean:
	rm -rf .venv build models/SmolLM2-135M-Instruct *.egg-info mdkv_vllm/_cpu*.so mdkv_vllm/libmdkv_cuda.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
