# make serve   talk to a real model over a compressed KV cache     make demo   see what it did
.PHONY: setup serve demo test lint bench eval clean
export MODEL PORT BUDGET SETTINGS ARGS

BIN := .venv/bin

setup:
	scripts/setup-cpu.sh

serve: setup
	scripts/serve.sh

demo: setup
	$(BIN)/mdkv demo --port $(or $(PORT),8000)

# Everything that needs no GPU.
test:
	scripts/setup-cpu.sh --dev
	$(MAKE) lint
	$(BIN)/python -m pytest

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h')

bench: MODEL := models/SmolLM2-135M-Instruct
bench:
	scripts/setup-cpu.sh --dev
	mkdir -p results
	$(BIN)/mdkv prepare-model --out $(MODEL)
	$(BIN)/python benchmarks/decode_kernel.py --json results/decode_kernel.json
	$(BIN)/python benchmarks/prefill.py --model $(MODEL) --out results/prefill.json
	$(BIN)/python benchmarks/serving.py --model $(MODEL) --out results/serving.json

# Quality of every method at every budget, hours on two cores; QUICK=1 takes minutes.
eval: MODEL := models/SmolLM2-135M-Instruct
eval:
	scripts/setup-cpu.sh --dev
	$(BIN)/mdkv prepare-model --out $(MODEL)
	$(BIN)/mdkv eval $(MODEL) --offline --out results/eval $(if $(QUICK),--quick)

clean:
	rm -rf .venv build models/SmolLM2-135M-Instruct *.egg-info mdkv_vllm/_cpu*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
