"""A report with something in every field, for the tests that need one."""

from __future__ import annotations

from memopt.machine import Machine
from memopt.report_types import (
    ChildUse,
    DeviceUse,
    DiskUse,
    DramUse,
    GpuUse,
    IoUse,
    Overhead,
    Phase,
    Report,
    SsdUse,
    Tiers,
    Timeline,
    Verdict,
)
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


def full_report() -> Report:
    """A profiled job with three tiers, two GPUs, a container, disks, a child that failed, and categories over time."""
    seconds = [step * 0.5 for step in range(41)]
    in_step = [step % 10 for step in range(41)]
    weights = [4 * GiB if t >= 1 else int(4 * GiB * t) for t in seconds]
    acts = [int(3.5 * GiB * (5 - abs(5 - k)) / 5) if t >= 2 else 0 for t, k in zip(seconds, in_step, strict=True)]
    moments = [2 * GiB if t >= 5 else 0 for t in seconds]
    gpu = [w + a + m + 700 * MiB for w, a, m in zip(weights, acts, moments, strict=True)]
    pinned = [min(6 * GiB, int(1.5 * GiB * t)) for t in seconds]
    dram = [n + 1300 * MiB + 40 * MiB * (k % 3) for n, k in zip(pinned, in_step, strict=True)]
    ssd = [int(16 * GiB * min(1.0, t / 4)) for t in seconds]
    steps = [
        phase
        for k in range(4)
        for phase in (
            _phase("step", 2 + 4.5 * k, 6.4 + 4.5 * k, 9 * GiB, 7 * GiB),
            _phase("forward", 2 + 4.5 * k, 3.5 + 4.5 * k, 8 * GiB, 7 * GiB),
            _phase("backward", 3.5 + 4.5 * k, 5.5 + 4.5 * k, 10 * GiB, 7 * GiB),
            _phase("optimizer", 5.5 + 4.5 * k, 6.4 + 4.5 * k, 7 * GiB, 7 * GiB),
        )
    ]
    return Report(
        memopt="0.1.0",
        command=["memopt", "profile", "--gpu", "10GiB", "--", "python", "train.py", "--name", "</script><b>x</b>"],
        started="2026-01-02T03:04:05.678901+00:00",
        wall_s=20.0,
        machine=Machine(
            name="box-with-gpus", cpu_count=16, gpu_name="RTX 4090", gpu_bytes=24 * GiB, dram_bytes=64 * GiB
        ),
        verdict="over",
        tiers=Tiers(gpu=_full_gpu(max(gpu)), dram=_full_dram(max(dram), max(pinned)), ssd=_full_ssd()),
        io=IoUse(waited_s=1.5, busy_s=4.0, read_per_s=0.75 * GiB, write_per_s=0.5 * GiB, achieved_per_s=1.25 * GiB),
        phases=[_phase("load", 0.0, 2.0, 5 * GiB, 6 * GiB), *steps, _phase("save", 19.9, 20.0, 7 * GiB, 7 * GiB)],
        timeline=Timeline(
            t_s=seconds,
            gpu_bytes=list(gpu),
            dram_bytes=list(dram),
            ssd_bytes=[None, *ssd[1:]],
            categories={
                "gpu": {"weights": list(weights), "activations": list(acts), "optimizer": list(moments)},
                "dram": {"buffers": list(pinned)},
            },
        ),
        results={"final_loss": 2.5, "steps": 4},
        config={"lr": 1e-4},
        reasons=["moments pinned in DRAM: 2.00 GiB would not fit beside the activations"],
        notes=["seed 0 & 1 < 2"],
        child=ChildUse(exit_code=137, signal="SIGKILL"),
        overhead=Overhead(samples=1000, cpu_s=0.12, dram_bytes=3 * MiB),
    )


def _phase(name: str, start_s: float, end_s: float, gpu: int, dram: int) -> Phase:
    return Phase(
        name=name,
        start_s=start_s,
        end_s=end_s,
        dram_peak_bytes=dram,
        gpu_peak_bytes=gpu,
        read_bytes=512 * MiB,
        write_bytes=256 * MiB,
        at_peak={"gpu": {"weights": 4 * GiB, "other": gpu - 4 * GiB}},
    )


def _full_gpu(peak: int) -> GpuUse:
    return GpuUse(
        budget_bytes=10 * GiB,
        peak_bytes=peak,
        predicted_bytes=int(9.5 * GiB),
        within=False,
        at_peak={
            "weights": 4 * GiB,
            "activations": int(3.5 * GiB),
            "optimizer": 2 * GiB,
            "other": peak - int(9.5 * GiB),
        },
        predicted_at_peak={"weights": 4 * GiB, "activations": 3 * GiB, "optimizer": 2 * GiB, "runtime": GiB // 2},
        attributed_by="torch",
        kinds_at_peak={"allocated": int(9.5 * GiB), "cached": 300 * MiB, "non_torch": 400 * MiB},
        devices=[
            DeviceUse(
                index=0,
                name="NVIDIA GeForce RTX 4090",
                used_bytes=11 * GiB,
                allocated_bytes=9 * GiB,
                reserved_bytes=10 * GiB,
                process_bytes=10 * GiB,
                others_bytes=GiB,
            ),
            DeviceUse(index=1, name="NVIDIA GeForce RTX 4090", used_bytes=GiB),
        ],
        pinned_bytes=6 * GiB,
        alloc_retries=2,
    )


def _full_dram(peak: int, pinned: int) -> DramUse:
    return DramUse(
        budget_bytes=16 * GiB,
        peak_bytes=peak,
        upper_bound_bytes=peak + GiB,
        file_bytes=GiB,
        predicted_bytes=7 * GiB,
        charged_peak_bytes=pinned,
        within=True,
        at_peak={"buffers": pinned, "other": peak - pinned},
        predicted_at_peak={"buffers": 6 * GiB, "runtime": GiB},
        attributed_by="ledger",
        kinds_at_peak={"anonymous": peak - pinned, "shared": pinned},
        proportional_bytes=peak - 100 * MiB,
        locked_bytes=pinned,
        page_cache_bytes=3 * GiB,
        limit_bytes=32 * GiB,
        limit_file="/sys/fs/cgroup/job/memory.max",
        working_set_bytes=8 * GiB,
        container_peak_bytes=12 * GiB,
        oom_kills=0,
    )


def _full_ssd() -> SsdUse:
    return SsdUse(
        budget_bytes=100 * GiB,
        peak_bytes=16 * GiB,
        within=True,
        read_bytes=3 * GiB,
        write_bytes=2 * GiB,
        process_read_bytes=4 * GiB,
        process_write_bytes=3 * GiB,
        predicted_write_bytes=2 * GiB,
        endurance_bytes=1024 * GiB,
        write_budget_bytes=4 * GiB,
        disks=[
            DiskUse(
                name="nvme0n1", read_bytes=5 * GiB, write_bytes=6 * GiB, read_wait_s=2e-4, write_wait_s=1e-3, queue=3.5
            ),
            DiskUse(name="sda", read_bytes=0, write_bytes=MiB),
        ],
    )
