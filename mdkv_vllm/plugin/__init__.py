"""The vLLM plugin: the only package that imports vLLM.

vLLM loads the two functions here through entry points in every one of its processes.
"""

from __future__ import annotations


def register() -> None:
    """Entry point of ``vllm.general_plugins``: make ``--attention-backend mixeddim`` known.

    Raises:
        RuntimeError: this vLLM version is not one the plugin was tested with.
    """
    from mdkv_vllm.plugin.registration import register_mixeddim

    register_mixeddim()


def platform() -> str | None:
    """Entry point of ``vllm.platform_plugins``.

    Returns:
        The class of our platform where vLLM would choose the built-in CPU platform, else
        None.
    """
    from mdkv_vllm.plugin.registration import is_supported_vllm

    if not is_supported_vllm():
        return None
    from vllm.platforms import cpu_platform_plugin

    if cpu_platform_plugin() is None:
        return None
    return "mdkv_vllm.plugin.platform.MixedDimCpuPlatform"
