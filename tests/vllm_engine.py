"""One vLLM engine in a process of its own: python -m tests.vllm_engine REQUEST.json RESULT.json.

The plugin is configured by the environment, as in a server. The request: model, engine options, prompts (token ids),
new tokens. The result: tokens and log-probabilities of two passes (the second may hit the prefix cache), KV blocks,
whether vLLM's second model runner was at work, and preemptions where statistics are on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def generate(engine: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    sampling = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True, logprobs=1)
    given = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
    done = engine.generate(given, sampling, use_tqdm=False)
    return {
        "tokens": [list(each.outputs[0].token_ids) for each in done],
        "logprobs": [
            [
                step[token].logprob
                for step, token in zip(each.outputs[0].logprobs, each.outputs[0].token_ids, strict=True)
            ]
            for each in done
        ],
        "cached": [each.num_cached_tokens for each in done],
    }


def main(request: Path, result: Path) -> None:
    from vllm import LLM

    asked = json.loads(request.read_text())
    engine = LLM(model=asked["model"], **asked["options"])
    passes = [generate(engine, asked["prompts"], asked["new_tokens"]) for _ in range(asked["passes"])]
    config = engine.llm_engine.vllm_config
    cache = config.cache_config
    found = {"passes": passes, "blocks": cache.num_gpu_blocks, "kv_tokens": cache.kv_cache_size_tokens}
    found["second_runner"] = config.use_v2_model_runner
    if not asked["options"].get("disable_log_stats", True):
        found["preemptions"] = sum(each.value for each in engine.get_metrics() if each.name == "vllm:num_preemptions")
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
