"""memopt's vLLM plugin: KV pages whose keys are really thinner, in a vLLM that is otherwise as it was installed.

The entry point `register` (group `vllm.general_plugins`) runs in every process that vLLM starts. Without the variables
of `vllm_config` it does nothing, and to calibrate it only watches (vllm_live). For thin keys it registers an attention
backend, which is vLLM's own extension point, and wraps two functions: `Attention.__init__`, to check each layer and to
give it the pages of the recent window, and `get_kv_cache_configs`, to check what the engine is about to count.
`unregister` takes all of it back.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from memopt.errors import BadInput
from memopt.patches.vllm_config import Calibration, ThinKeys, from_environment

TESTED = "0.32"
"""The vLLM this was written for: `customize_spec` and the page layout are not promised to stay from one to the next."""
SEAMS = (
    ("vllm.v1.attention.backend", "AttentionBackend.customize_spec"),
    ("vllm.v1.attention.backends.registry", "register_backend"),
    ("vllm.v1.attention.backends.registry", "AttentionBackendEnum.clear_override"),
    ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackendImpl.do_kv_cache_update"),
    ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionMetadataBuilder.build"),
    ("vllm.v1.attention.backends.triton_attn_diffkv", "TritonAttentionDiffKVImpl.do_kv_cache_update"),
    ("vllm.v1.core.kv_cache_utils", "get_kv_cache_configs"),
    ("vllm.v1.core.single_type_kv_cache_manager", "SlidingWindowManager.remove_skipped_blocks"),
    ("vllm.v1.worker.worker_base", "WorkerBase.compile_or_warm_up_model"),
    ("vllm.v1.kv_cache_interface", "SlidingWindowSpec.max_admission_blocks_per_request"),
    ("vllm.v1.kv_cache_spec_registry", "KVCacheSpecRegistry._ensure_registered"),
    ("vllm.model_executor.layers.attention", "Attention.get_kv_cache_spec"),
    ("vllm.model_executor.models.utils", "extract_layer_index"),
)
"""(module, name in it): everything of vLLM that the plugin stands on. A test looks for each."""

_undo: list[Callable[[], None]] = []


def register() -> None:
    """Install the plugin in this process, once, if the environment asks for it.

    Raises:
        BadInput: the variables cannot be used, or this vLLM is not the tested one.
    """
    keys = from_environment()
    if keys is None or _undo:
        return
    check_version()
    if isinstance(keys, Calibration):
        from memopt.patches import vllm_live

        _undo.append(vllm_live.install(keys))
        return
    from vllm.logger import init_logger
    from vllm.v1.attention.backends.registry import register_backend

    if keys.thins:
        from memopt.patches.vllm_channels import sets_of

        sets_of(keys)  # a file that cannot be used is told before anything is loaded
    member, home = backend_of_platform()
    register_backend(member, home)
    _undo.append(member.clear_override)
    _watch_layers(keys, home)
    _watch_specs(keys)
    if keys.exact_prefill:
        import memopt.patches.vllm_spec  # noqa: F401 - registers the group's kind, here as in the engine
    init_logger("vllm.memopt").info("memopt: %s", keys)


def unregister() -> None:
    """Put everything in this process back."""
    while _undo:
        _undo.pop()()


def backend_of_platform() -> tuple[Any, str]:
    """Which of vLLM's attention backends is replaced, and by what."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if current_platform.is_cpu():
        # a CPU platform takes its own backend whatever is asked for, so that one is overridden
        return AttentionBackendEnum.CPU_ATTN, "memopt.patches.vllm_attention.ThinCPUBackend"
    return AttentionBackendEnum.CUSTOM, "memopt.patches.vllm_gpu.ThinTritonBackend"


def check_version() -> None:
    """Refuse a vLLM this was not tested with."""
    import vllm

    if not vllm.__version__.startswith(TESTED + "."):
        raise BadInput(
            f"vLLM {vllm.__version__} is not the {TESTED} that memopt's thin keys were tested with; install "
            f"vllm=={TESTED}.*, or serve without --key-keep"
        )


def _watch_layers(keys: ThinKeys, home: str) -> None:
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.attention import Attention
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from memopt.patches import vllm_guard, vllm_recent

    original = Attention.__init__

    @functools.wraps(original)
    def checked(self: Any, *args: Any, **options: Any) -> None:
        if keys.thins:
            vllm_guard.check_config(get_current_vllm_config(), keys)
        original(self, *args, **options)
        if keys.thins:
            vllm_guard.check_layer(self, resolve_obj_by_qualname(home))
            vllm_guard.check_channels(self, keys)
            if keys.recent:
                vllm_recent.beside(self, keys)

    Attention.__init__ = checked
    _undo.append(lambda: setattr(Attention, "__init__", original))


def _watch_specs(keys: ThinKeys) -> None:
    from vllm.v1.core import kv_cache_utils

    from memopt.patches import vllm_guard

    original = kv_cache_utils.get_kv_cache_configs

    @functools.wraps(original)
    def checked(vllm_config: Any, kv_cache_specs: Any, available_memory: Any) -> Any:
        vllm_guard.check_specs(kv_cache_specs, keys)
        return original(vllm_config, kv_cache_specs, available_memory)

    places: tuple[Any, ...] = (kv_cache_utils, sys.modules.get("vllm.v1.engine.core"))
    for module in places:
        # the engine core, if it is imported already, has the function under its own name
        if module is not None and getattr(module, "get_kv_cache_configs", None) is original:
            module.get_kv_cache_configs = checked
            _undo.append(functools.partial(setattr, module, "get_kv_cache_configs", original))
