"""tests.vllm_engine with memopt's GPU backend, its kernels in Triton's interpreter: no GPU is needed.

vLLM turns Triton off where there is no GPU; it is put back before anything else of vLLM is imported, in this process,
where the engine runs too. vLLM then takes the model runner that it takes on a GPU.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TRITON_INTERPRET": "1"}

import triton
import triton.language
import vllm.triton_utils
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from memopt.patches import vllm_plugin
from tests.vllm_engine import main

if __name__ == "__main__":
    vllm.triton_utils.triton, vllm.triton_utils.tl, vllm.triton_utils.HAS_TRITON = triton, triton.language, True
    vllm_plugin.backend_of_platform = lambda: (  # a CPU platform asks for no other
        AttentionBackendEnum.CPU_ATTN,
        "memopt.patches.vllm_gpu.ThinTritonBackend",
    )
    main(Path(sys.argv[1]), Path(sys.argv[2]))
