"""What our platforms add to vLLM's own; unchanged where the backend is not asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from mdkv_vllm.config import ConfigError, MixedDimConfig
from mdkv_vllm.plugin.compat import asks_no_backend_for_its_block_size
from mdkv_vllm.plugin.registration import (
    BACKEND_CLASS,
    DEFAULT_BLOCK_SIZE,
    is_mixeddim,
    mixeddim_selected,
    register_mixeddim,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.platforms.interface import Platform
else:
    Platform = object

# The engine's configuration crosses process borders pickled, before general plugins are
# loaded; unpickling needs the enum member to exist already.
register_mixeddim()


class MixedDimPlatform(Platform):
    """Any platform of vLLM's plus ``--attention-backend mixeddim``."""

    worker_class: ClassVar[str]
    windowed_backend: ClassVar[str]
    """vLLM's own, for layers with sliding windows, whose blocks may have been leases before."""
    _request_config: ClassVar[MixedDimConfig | None] = None
    _served: ClassVar[VllmConfig | None] = None

    @classmethod
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None) -> str:  # type: ignore[no-untyped-def] # noqa: ANN001
        """Our backend's class where it is selected, else vLLM's choice."""
        if not is_mixeddim(selected_backend):
            return super().get_attn_backend_cls(selected_backend, attn_selector_config, num_heads)
        from vllm.utils.import_utils import resolve_obj_by_qualname

        windowed = attn_selector_config.has_sliding_window
        chosen = cls.windowed_backend if windowed else BACKEND_CLASS
        backend = resolve_obj_by_qualname(chosen)
        reasons = backend.validate_configuration(
            **attn_selector_config._asdict(), device_capability=cls.get_device_capability()
        )
        if attn_selector_config.use_mm_prefix:
            reasons = [*reasons, "--language-model-only serves a model's text without its pictures"]
        if reasons:
            where = f", layers with sliding windows by {backend.get_name()}" if windowed else ""
            raise ConfigError(
                f"--attention-backend mixeddim cannot run here{where}: {'; '.join(reasons)}"
            )
        return chosen

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Check the settings and choose block size and worker."""
        if not mixeddim_selected(vllm_config):
            from mdkv_vllm.plugin.validation import refuse_settings_without_backend

            refuse_settings_without_backend(vllm_config.additional_config)
            super().check_and_update_config(vllm_config)
            return
        from mdkv_vllm.plugin.metrics.directory import expose_metrics
        from mdkv_vllm.plugin.validation import refuse_unsupported

        cls._served = vllm_config
        config = MixedDimConfig.from_additional_config(vllm_config.additional_config)
        cls._request_config = config
        refuse_unsupported(vllm_config, cls.device_type, config)
        expose_metrics()
        super().check_and_update_config(vllm_config)
        cache, asks_none = vllm_config.cache_config, asks_no_backend_for_its_block_size
        if not cache.user_specified_block_size and asks_none(cls.device_type):
            cache.block_size = DEFAULT_BLOCK_SIZE
        vllm_config.parallel_config.worker_cls = cls.worker_class

    @classmethod
    def register_custom_kv_cache_specs(cls, vllm_config: VllmConfig) -> None:
        """Make the lease manager known to the engine core."""
        super().register_custom_kv_cache_specs(vllm_config)
        from mdkv_vllm.plugin.metrics.directory import start_recording
        from mdkv_vllm.plugin.spec import register_specs

        register_specs()
        if mixeddim_selected(vllm_config):
            start_recording(vllm_config)

    @classmethod
    def validate_request(cls, processed_inputs, params) -> None:  # type: ignore[no-untyped-def] # noqa: ANN001
        """Check a request's ``mixeddim_*`` fields."""
        super().validate_request(processed_inputs, params)
        if cls._request_config is not None:
            from mdkv_vllm.plugin.validation import Room, admit

            assert cls._served is not None
            config = cls._request_config
            room = Room.of(cls._served, config, on_gpu=cls.device_type == "cuda")
            tokens = len(processed_inputs.get("prompt_token_ids") or ())
            admit(params, config, room, tokens)
