"""The vLLM plugin: the only package that imports vLLM.

vLLM loads the two functions here through entry points in every one of its processes.
"""

from __future__ import annotations


def register() -> None:
    """Entry point of ``vllm.general_plugins``: make ``--attention-backend mixeddim`` known.

    On a vLLM that the plugin was not tested with it only says so: vLLM calls this for every
    command, and those without mixeddim must go on.
    """
    from mdkv_vllm.plugin.registration import TESTED_VLLM, is_supported_vllm, vllm_version

    if not is_supported_vllm():
        from vllm.logger import init_logger

        # vLLM shows only what loggers below its own name say.
        init_logger(f"vllm.{__name__}").warning(
            "mdkv-vllm was tested with vLLM %s but %s is installed: 'mixeddim' is not registered. "
            "Install one of these or a matching mdkv-vllm.",
            " and ".join(f"{minor}.x" for minor in TESTED_VLLM),
            vllm_version(),
        )
        return
    from mdkv_vllm.plugin.registration import register_mixeddim
    from mdkv_vllm.plugin.source_folder import hide_source_folder

    hide_source_folder()
    register_mixeddim()


def platform_class() -> str | None:
    """Entry point of ``vllm.platform_plugins``.

    Returns:
        The class of our platform where vLLM would choose its built-in CUDA or CPU platform,
        else None.
    """
    from mdkv_vllm.plugin.registration import is_supported_vllm

    if not is_supported_vllm():
        return None
    from vllm.platforms import cpu_platform_plugin, cuda_platform_plugin

    from mdkv_vllm.plugin.source_folder import hide_source_folder

    hide_source_folder()
    if cuda_platform_plugin() is not None:
        return "mdkv_vllm.plugin.cuda_platform.MixedDimCudaPlatform"
    if cpu_platform_plugin() is not None:
        return "mdkv_vllm.plugin.cpu_platform.MixedDimCpuPlatform"
    return None
