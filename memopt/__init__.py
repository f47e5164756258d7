"""memopt: LLM training and inference that fit a memory budget, and show where every byte went.

The public names are loaded when first used, so that `import memopt` costs nothing and pulls in no framework.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memopt.budget import Budget
    from memopt.forecast_types import Forecast
    from memopt.jobs.config import FinetuneConfig
    from memopt.jobs.finetune import finetune
    from memopt.jobs.optimizer import attach_optimizer, build_optimizer
    from memopt.jobs.plan import plan
    from memopt.jobs.plan_config import PlanConfig
    from memopt.ledger import Ledger
    from memopt.machine import Machine
    from memopt.patches.hf_cache import ThinKCache
    from memopt.patches.hf_profiler import ProfilerCallback
    from memopt.profiler.program import Profiler
    from memopt.report_types import Report

try:
    __version__ = version("memopt")
except PackageNotFoundError:  # used from a checkout that was never installed
    __version__ = "0.1.0"

_HOME = {
    "Budget": "memopt.budget",
    "FinetuneConfig": "memopt.jobs.config",
    "Forecast": "memopt.forecast_types",
    "Ledger": "memopt.ledger",
    "Machine": "memopt.machine",
    "PlanConfig": "memopt.jobs.plan_config",
    "Profiler": "memopt.profiler.program",
    "ProfilerCallback": "memopt.patches.hf_profiler",
    "Report": "memopt.report_types",
    "ThinKCache": "memopt.patches.hf_cache",
    "attach_optimizer": "memopt.jobs.optimizer",
    "build_optimizer": "memopt.jobs.optimizer",
    "finetune": "memopt.jobs.finetune",
    "plan": "memopt.jobs.plan",
}

__all__ = [
    "Budget",
    "FinetuneConfig",
    "Forecast",
    "Ledger",
    "Machine",
    "PlanConfig",
    "Profiler",
    "ProfilerCallback",
    "Report",
    "ThinKCache",
    "__version__",
    "attach_optimizer",
    "build_optimizer",
    "finetune",
    "plan",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'memopt' has no attribute {name!r}; its public names are {', '.join(_HOME)}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
