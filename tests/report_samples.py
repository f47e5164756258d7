"""A report with something in every field, for the tests that need one."""

from __future__ import annotations

from memopt.machine import Machine
from memopt.report_types import DramUse, IoUse, Phase, Report, SsdUse, Tiers, Timeline, Verdict
from memopt.units import GiB, MiB


def sample_report(verdict: Verdict = "within", dram_peak_bytes: int = 960 * MiB) -> Report:
    """A finished fine-tuning run on a machine without a GPU."""
    return Report(
        memopt="0.1.0",
        command=["memopt", "finetune"],
        started="2026-01-02T03:04:05+00:00",
        wall_s=12.5,
        machine=Machine(name="box", cpu_count=2, dram_bytes=16 * GiB, notes=("limited by nothing",)),
        verdict=verdict,
        tiers=Tiers(
            dram=DramUse(
                budget_bytes=GiB,
                peak_bytes=dram_peak_bytes,
                upper_bound_bytes=1200 * MiB,
                file_bytes=240 * MiB,
                predicted_bytes=900 * MiB,
                charged_peak_bytes=800 * MiB,
                within=dram_peak_bytes <= GiB,
                at_peak={"weights": 500 * MiB, "buffers": 300 * MiB, "other": dram_peak_bytes - 800 * MiB},
                predicted_at_peak={"weights": 900 * MiB},
            ),
            ssd=SsdUse(
                peak_bytes=5 * GiB,
                charged_peak_bytes=5 * GiB,
                read_bytes=3 * GiB,
                write_bytes=2 * GiB,
                process_read_bytes=3 * GiB,
                process_write_bytes=3 * GiB,
                endurance_bytes=1024 * GiB,
            ),
        ),
        io=IoUse(waited_s=1.5, busy_s=4.0, read_per_s=0.75 * GiB, write_per_s=0.5 * GiB, achieved_per_s=1.25 * GiB),
        phases=[Phase(name="forward", start_s=0.0, end_s=1.0, dram_peak_bytes=7)],
        timeline=Timeline(t_s=[0.0, 0.5], gpu_bytes=[None, None], dram_bytes=[1, 2], ssd_bytes=[None, 4]),
        results={"final_loss": 2.5, "steps": 8, "losses": [5.0, 4.0, 3.5, 3.0, 2.9, 2.8, 2.6, 2.5], "note": None},
        config={"lr": 1e-4, "model": "demo", "dram": "1GiB"},
        reasons=["state on SSD: 1.2 GiB do not fit into 1.0 GiB"],
        notes=["seed 0"],
    )
