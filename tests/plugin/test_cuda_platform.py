"""What can be seen of the CUDA side without a GPU: classes, choices and refusals.

The extension that vLLM's CUDA platform loads is not in its CPU build: tests that need it run in a
process of their own, in which an empty module stands for it.
"""

import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("vllm")

PREAMBLE = """
import sys, types
sys.modules["vllm._C_stable_libtorch"] = types.ModuleType("vllm._C_stable_libtorch")
import torch
from vllm.platforms.interface import DeviceCapability
import vllm.platforms as platforms
from mdkv_vllm.plugin.cuda_platform import MixedDimCudaPlatform as Platform
from mdkv_vllm.config import ConfigError

def with_capability(major, minor):
    Platform.get_device_capability = classmethod(
        lambda cls, device_id=0: DeviceCapability(major, minor)
    )
    platforms.current_platform = Platform()

def refusal(call):
    try:
        call()
    except ConfigError as error:
        return str(error)
    raise AssertionError("not refused")
"""


def run(script):
    """Run a script after the preamble; what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(script)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_our_platform_where_vllm_would_choose_cuda(monkeypatch):
    from vllm import platforms

    import mdkv_vllm.plugin as plugin

    monkeypatch.setattr(platforms, "cuda_platform_plugin", lambda: "vllm.platforms.cuda.Any")
    assert plugin.platform_class() == "mdkv_vllm.plugin.cuda_platform.MixedDimCudaPlatform"
    monkeypatch.setattr(platforms, "cuda_platform_plugin", lambda: None)
    assert plugin.platform_class() == "mdkv_vllm.plugin.cpu_platform.MixedDimCpuPlatform"
    monkeypatch.setattr(platforms, "cpu_platform_plugin", lambda: None)
    assert plugin.platform_class() is None


def test_platform_and_worker():
    """The classes stand on vLLM's own, and old GPUs are refused by name."""
    run(
        """
        from vllm.platforms.cuda import CudaPlatform
        from vllm.utils.import_utils import resolve_obj_by_qualname
        from vllm.v1.attention.selector import AttentionSelectorConfig
        from vllm.v1.worker.gpu_worker import Worker
        from mdkv_vllm.plugin.worker import MixedDimWorker

        assert issubclass(Platform, CudaPlatform)
        worker = resolve_obj_by_qualname(Platform.worker_class)
        assert issubclass(worker, Worker)
        order = [c.__name__ for c in worker.__mro__]
        assert order.index("MixedDimWorker") < order.index("Worker")

        from vllm.v1.attention.backends.registry import AttentionBackendEnum
        ours = AttentionBackendEnum["MIXEDDIM"]
        layer = AttentionSelectorConfig(
            head_size=128, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=16,
        )
        with_capability(9, 0)
        name = "mdkv_vllm.plugin.backend.MixedDimBackend"
        assert Platform.get_attn_backend_cls(ours, layer) == name
        windowed = Platform.get_attn_backend_cls(ours, layer._replace(has_sliding_window=True))
        assert windowed.endswith("TritonAttentionBackend")
        # Of the cache's layouts it takes the one that leases need.
        assert resolve_obj_by_qualname(windowed).supported_kv_cache_layouts() is None
        sinks = refusal(lambda: Platform.get_attn_backend_cls(ours, layer._replace(has_sink=True)))
        assert "attention sinks not supported" in sinks
        large = refusal(lambda: Platform.get_attn_backend_cls(ours, layer._replace(head_size=512)))
        assert "head_size not supported" in large
        with_capability(7, 0)
        assert "compute capability" in refusal(lambda: Platform.get_attn_backend_cls(ours, layer))
        """
    )


@pytest.mark.parametrize(
    ("dtype", "cache", "head_size", "block_size", "message"),
    [
        ("float32", "auto", 128, 16, "--dtype torch.float32 on GPUs (allowed: float16, bfloat16)"),
        ("bfloat16", "float16", 128, 16, "--kv-cache-dtype float16 beside --dtype torch.bfloat16"),
        ("bfloat16", "auto", 112, 16, "heads of 112 dimensions on GPUs (allowed: 64, 80,"),
        ("bfloat16", "auto", 128, 64, "--block-size 64 on GPUs"),
        ("bfloat16", "bfloat16", 128, 32, ""),
    ],
)
def test_refusals_name_the_flag(dtype, cache, head_size, block_size, message):
    from types import SimpleNamespace

    import torch

    from mdkv_vllm.plugin.validation import _not_on_gpus

    model = SimpleNamespace(
        dtype=getattr(torch, dtype), use_mla=False, get_head_size=lambda: head_size
    )
    cache_config = SimpleNamespace(
        cache_dtype=cache, block_size=block_size, user_specified_block_size=True
    )
    config = SimpleNamespace(model_config=model, cache_config=cache_config)
    problems = "; ".join(_not_on_gpus(config))
    assert message in problems
    assert bool(problems) == bool(message)


def test_prefill_choices_on_gpus():
    """FlashAttention from Ampere on, xformers before it where installed, else torch."""
    printed = run(
        """
        import mdkv_vllm.plugin.prefill.choose as choose
        from vllm.v1.attention.backends import fa_utils
        fa_utils.get_flash_attn_version = lambda **_: 3
        made = {name: object() for name in ("flash", "xformers", "sdpa")}
        for name, value in made.items():
            setattr(choose, f"_{name}", lambda head_size, value=value: (value, None))
        choose.lease_reader = lambda config: None
        choose.LeasedPrefill = lambda plain, *_: plain
        cache = types.SimpleNamespace(device=torch.device("cuda"))

        def chosen(asked, dtype=torch.float16, head_size=128, xformers=True):
            choose.find_spec = lambda name: xformers or None
            geometry = types.SimpleNamespace(head_size=head_size)
            layout = types.SimpleNamespace(geometry=geometry)
            config = types.SimpleNamespace(kv_cache=cache, layout=layout)
            name, attention = choose.choose_prefill(asked, config, dtype)
            assert attention is made[name]
            return name

        with_capability(9, 0)
        assert chosen("auto") == "flash"
        assert chosen("sdpa") == "sdpa"
        assert chosen("xformers") == "xformers"
        assert chosen("auto", head_size=512) == "xformers"
        with_capability(7, 5)
        assert chosen("auto") == "xformers"
        assert chosen("auto", xformers=False) == "sdpa"
        print(refusal(lambda: chosen("flash")))
        print(refusal(lambda: chosen("xformers", xformers=False)))
        """
    ).splitlines()
    assert "mixeddim.prefill is 'flash'" in printed[0]
    assert "compute capability 8.0" in printed[0]
    assert "allowed here: auto, xformers, sdpa" in printed[0]
    assert "pip install 'mdkv-vllm[xformers]'" in printed[1]


def test_memory_for_reading_leases_back_is_left_out_of_the_cache():
    """Keys and values of one request's head or 256 MiB, whichever is more, and a step's rows."""
    run(
        """
        from types import SimpleNamespace as Some
        from vllm.utils.import_utils import resolve_obj_by_qualname
        from mdkv_vllm.config import MixedDimConfig
        from mdkv_vllm.core.formats import PageGeometry
        from mdkv_vllm.policy import Policy

        policy = Policy(MixedDimConfig(), PageGeometry(16, 128, torch.bfloat16), 32, 8)
        worker = Some(
            parallel_config=None,
            scheduler_config=Some(max_num_batched_tokens=8192),
            model_config=Some(
                dtype=torch.bfloat16, max_model_len=131072,
                get_num_attention_heads=lambda parallel: 32,
            ),
        )
        scratch = resolve_obj_by_qualname(Platform.worker_class)._scratch_bytes(worker, policy)
        rows = 2 * 32 * 8192 * 128 * 2
        assert scratch == (256 << 20) + rows, scratch
        worker.model_config.max_model_len = 1 << 20
        scratch = resolve_obj_by_qualname(Platform.worker_class)._scratch_bytes(worker, policy)
        assert scratch == 2 * ((1 << 20) + 128) * 128 * 2 + rows, scratch
        """
    )


@pytest.mark.parametrize("drafts", [0, 4])
def test_steps_of_one_token_and_of_drafts_are_whole_graphs(drafts):
    from vllm.config import CompilationConfig, CUDAGraphMode

    from mdkv_vllm.plugin.backend import MixedDimMetadataBuilder

    config = CompilationConfig(
        cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE, cudagraph_capture_sizes=[1, 2, 4, 16],
        max_cudagraph_capture_size=16,
    )  # fmt: skip
    config.set_splitting_ops_for_v1("", 1)
    support = MixedDimMetadataBuilder.get_cudagraph_support(None, None)
    mode = config.resolve_cudagraph_mode_and_sizes(support, "mixeddim", drafts + 1)
    assert mode is CUDAGraphMode.FULL_AND_PIECEWISE
    assert all(size % (drafts + 1) == 0 for size in config.cudagraph_capture_sizes)
