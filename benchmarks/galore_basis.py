"""GaLore's look for the subspace: the Gram basis is as good as the SVD's, and costs a fraction of it.

Cost. The same gradient, the shorter side projected (proj_type std), every method in turn, `--rounds` times; the median
of processor time on `--threads` threads: with one, the default, other programs on the machine hardly change it.
Beside it a step of torch's fused AdamW on a matrix of that shape; a step of GaLore between two looks: project, AdamW on
what is left, project back; and that step with its share of a look (one every `--gap` steps), over AdamW's. The least
possible: AdamW moves 28 bytes an element, GaLore does 4 * rank operations on each. A core that does 120 GFLOP/s and
moves 17 GB/s cannot do a GaLore step of rank 128 in less than 2.6 AdamW steps; a look should vanish beside it.

Accuracy. What a basis Q of rank r leaves out of G, ||G - Q Q^T G|| / ||G||, over the least that any basis of that rank
leaves out (the tail of the singular values, known because the gradients are made from them): s_i = i^-0.7, which falls
slowly, as gradients do, and s_i = exp(-40 i / d), which at rank d / 4 is below
what a float32 Gram matrix resolves (5e-4 of the largest).

Tracking. "power" starts from the basis before. Gradients drift: the singular vectors turn by a random rotation between
two looks, so that neighbouring best subspaces share a given part of their energy; after `--looks` looks, the same ratio
for 1, 2 and 4 iterations.

The claims that decide the exit code: gram leaves out at most 0.1 % more than svd on the slow spectrum, and is at least
three times as fast; spread over `--gap` steps, gram and power add at most a quarter to GaLore's step.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.harness import Table, machine_facts, median, number, say
from memopt.optim import basis
from memopt.optim.basis import Bases, Side, bases_of
from memopt.optim.projection import GaLore, back_add_, project, refresh_, shape_of

COLUMNS = (
    "m x n, rank",
    "method",
    "CPU ms",
    "of svd",
    "AdamW step ms",
    "GaLore step ms",
    "with looks / AdamW",
    "left out / least, slow",
    "left out / least, steep",
    "orthonormal to",
)
TRACKING = ("m x n, rank", "shared by neighbours", "power, 1", "power, 2", "power, 4", "random", "gram")
METHODS = ("gram", "power", "random", "svd")
_SHARED = (0.95, 0.7, 0.4)
_LONG_ENOUGH_S = 0.3


def main() -> int:
    """Measure; 0 when the claims hold."""
    args = _arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    facts = machine_facts(Path.cwd(), args.seed, None)
    facts["setting"] = f"{args.threads} threads, float32, {args.rounds} rounds, gap {args.gap}"
    table = Table("galore_basis", COLUMNS, facts, record=args.record)
    failed = []
    for shape in args.shapes:
        rows = _cost(args, *shape)
        for row in rows.values():
            table.add(row, _cells(row))
        failed += _broken(rows)
    tracking = Table("galore_basis", TRACKING, {}, record=args.record)
    for shared in _SHARED:
        row = _tracking(args, *args.shapes[0], shared)
        tracking.add(row, [_title(row), f"{row['shared']:.0%}", *(number(r, 4) for r in row["ratios"].values())])
    table.note("Claims: " + ("all hold." if not failed else "; ".join(failed)))
    return 1 if failed else 0


def _cost(args: argparse.Namespace, m: int, n: int, rank: int) -> dict[str, dict[str, Any]]:
    methods = [each for each in METHODS if each != "svd" or min(m, n) <= args.svd_up_to]
    say(f"{m} x {n}, rank {rank}")
    d = min(m, n)
    index = torch.arange(1, d + 1, dtype=torch.float64)
    slowly, steeply = index**-0.7, torch.exp(-40 * index / d)
    slow, steep = _gradient(m, n, slowly), _gradient(m, n, steeply)
    start = _near(slow, rank)
    works: dict[str, Callable[[], object]] = {"adamw": _adamw(m, n), "galore": _galore(slow, rank)}
    works |= {name: lambda name=name: _find(slow, rank, name, start) for name in methods}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(args.rounds):
        for name, work in works.items():
            seconds[name].append(_seconds(work))
    adamw, galore = median(seconds["adamw"]), median(seconds["galore"])
    rows = {}
    for name in methods:
        found = [_find(grad, rank, name, _near(grad, rank)) for grad in (slow, steep)]
        unit = found[0].T @ found[0] - torch.eye(rank)
        rows[name] = {
            "benchmark": "galore_basis",
            "shape": [m, n],
            "rank": rank,
            "method": name,
            "seconds": seconds[name],
            "adamw_s": seconds["adamw"],
            "of_svd": median(seconds[name]) / median(seconds["svd"]) if "svd" in seconds else float("nan"),
            "galore_s": seconds["galore"],
            "look_over_galore": median(seconds[name]) / args.gap / galore,
            "amortised_over_adamw": (galore + median(seconds[name]) / args.gap) / adamw,
            "slow": _left_out(slow, found[0], _side(slow)) / _least(slowly, rank),
            "steep": _left_out(steep, found[1], _side(steep)) / _least(steeply, rank),
            "orthonormal": float(unit.abs().max()),
        }
    return rows


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        _title(row),
        row["method"],
        number(1e3 * median(row["seconds"]), 1),
        number(row["of_svd"], 3),
        number(1e3 * median(row["adamw_s"]), 2),
        number(1e3 * median(row["galore_s"]), 2),
        number(row["amortised_over_adamw"]),
        number(row["slow"], 4),
        number(row["steep"], 3),
        f"{row['orthonormal']:.0e}",
    ]


def _title(row: dict[str, Any]) -> str:
    return f"{row['shape'][0]} x {row['shape'][1]}, {row['rank']}"


def _broken(rows: dict[str, dict[str, Any]]) -> list[str]:
    broken = [
        f"{_title(row)}: {name} adds {row['look_over_galore']:.0%} to a step"
        for name, row in rows.items()
        if name in ("gram", "power") and row["look_over_galore"] > 0.25
    ]
    if "svd" in rows:
        if rows["gram"]["slow"] > 1.001 * rows["svd"]["slow"]:
            broken.append(f"{_title(rows['gram'])}: gram leaves out more than svd")
        if rows["gram"]["of_svd"] > 1 / 3:
            broken.append(f"{_title(rows['gram'])}: gram takes {rows['gram']['of_svd']:.2f} of svd's time")
    return broken


def _tracking(args: argparse.Namespace, m: int, n: int, rank: int, shared: float) -> dict[str, Any]:
    """Ratios after looks at gradients whose left singular vectors drift; the smaller side is m."""
    m, n = min(m, n), max(m, n)
    values = torch.arange(1, m + 1, dtype=torch.float64) ** -0.7
    turn = _turn(m, rank, shared)
    say(f"tracking, neighbours share {shared:.0%}")
    u, v = _orthogonal(m, m), _orthogonal(n, m)
    ways = {**{f"power{k}": ("power", k) for k in (1, 2, 4)}, "random": ("random", 0), "gram": ("gram", 0)}
    found: dict[str, torch.Tensor] = {}
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    for look in range(args.looks):
        grad = (u * values @ v.T).float()
        for name, (method, iterations) in ways.items():
            before = Bases(found[name], None) if name in found else None
            with mock.patch.object(basis, "POWER_ITERATIONS", iterations):
                left, _ = bases_of(grad, side=Side.LEFT, rank=rank, method=method, previous=before, seed=look)  # type: ignore[arg-type]
            assert left is not None
            found[name] = left
            ratios[name].append(_left_out(grad, left, Side.LEFT) / _least(values, rank))
        u = turn @ u
    return {
        "benchmark": "galore_basis_tracking",
        "shape": [m, n],
        "rank": rank,
        "shared": shared,
        "ratios": {name: median(each[args.looks // 2 :]) for name, each in ratios.items()},
    }


def _turn(size: int, rank: int, shared: float) -> torch.Tensor:
    """A random rotation after which a random subspace of `rank` keeps about `shared` of its energy."""
    skew = torch.randn(size, size, dtype=torch.float64)
    skew = (skew - skew.T) / size**0.5
    probe = _orthogonal(size, rank)
    low, high = 0.0, 4.0
    for _ in range(20):
        middle = (low + high) / 2
        turned = torch.linalg.matrix_exp(middle * skew) @ probe
        kept = float((probe.T @ turned).square().sum() / rank)
        low, high = (middle, high) if kept > shared else (low, middle)
    return torch.linalg.matrix_exp(low * skew)


def _orthogonal(rows: int, columns: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64)).Q


def _gradient(m: int, n: int, values: torch.Tensor) -> torch.Tensor:
    return (_orthogonal(m, len(values)) * values @ _orthogonal(n, len(values)).T).float()


def _side(grad: torch.Tensor) -> Side:
    return Side.RIGHT if grad.shape[0] >= grad.shape[1] else Side.LEFT


def _near(grad: torch.Tensor, rank: int) -> Bases:
    """Where power starts: the basis of this gradient, disturbed by as much again."""
    exact = _find(grad, rank, "gram", None)
    start = torch.linalg.qr(exact + torch.randn_like(exact) / exact.shape[0] ** 0.5).Q
    return Bases(start, None) if _side(grad) is Side.LEFT else Bases(None, start)


def _find(grad: torch.Tensor, rank: int, method: Any, previous: Bases | None) -> torch.Tensor:
    found = bases_of(grad, side=_side(grad), rank=rank, method=method, previous=previous)
    columns = found.left if found.left is not None else found.right
    assert columns is not None
    return columns


def _left_out(grad: torch.Tensor, columns: torch.Tensor, side: Side) -> float:
    g, q = grad.double(), columns.double()
    kept = q @ (q.T @ g) if side is Side.LEFT else (g @ q) @ q.T
    return float((g - kept).norm() / g.norm())


def _least(values: torch.Tensor, rank: int) -> float:
    return float(values[rank:].norm() / values.norm())


def _adamw(m: int, n: int) -> Callable[[], object]:
    weights = torch.nn.Parameter(torch.randn(m, n))
    weights.grad = torch.randn(m, n)
    return torch.optim.AdamW([weights], fused=True).step


def _galore(grad: torch.Tensor, rank: int) -> Callable[[], object]:
    """A step without a look. The element-wise part is the fused one, on zeros with lr 1, as in memopt's optimizer."""
    config, state, weights = GaLore(rank=rank), {}, torch.randn_like(grad)
    refresh_(config, state, grad, 1)
    direction = torch.nn.Parameter(torch.zeros(shape_of(config, *grad.shape)))
    adamw = torch.optim.AdamW([direction], lr=1.0, weight_decay=0.0, fused=True)

    def step() -> None:
        direction.grad = project(config, state, grad)
        adamw.step()
        back_add_(config, weights, direction.detach(), state, beta=1.0, alpha=1e-3)
        direction.detach().zero_()

    return step


def _seconds(work: Callable[[], object]) -> float:
    """Seconds of processor time of one call; the mean of many, after a first, when one is too short to be timed."""
    repeats, begin = 0, time.process_time()
    work()
    once = time.process_time() - begin
    if once > _LONG_ENOUGH_S:
        return once
    begin = time.process_time()
    while repeats == 0 or time.process_time() - begin < _LONG_ENOUGH_S:
        work()
        repeats += 1
    return (time.process_time() - begin) / repeats


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.galore_basis", description="See the module's text.")
    shapes = "512x1376x128,768x2048x192,1024x2736x256,2048x5461x512,2048x5461x128"
    parser.add_argument("--shapes", type=_shapes, default=shapes, help="m x n x rank, comma-separated")
    parser.add_argument("--small", action="store_true", help="one tiny matrix: tries the program")
    parser.add_argument("--svd-up-to", type=int, default=1024, help="no svd where the shorter side is larger")
    parser.add_argument("--gap", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--looks", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results")
    args = parser.parse_args()
    if args.small:
        args.shapes = [(48, 96, 8)]
    return args


def _shapes(text: str) -> list[tuple[int, int, int]]:
    shapes = [tuple(int(each) for each in one.split("x")) for one in text.split(",")]
    if any(len(shape) != 3 for shape in shapes):
        raise argparse.ArgumentTypeError("shapes are m x n x rank, like 512x1376x128")
    return shapes  # type: ignore[return-value]


if __name__ == "__main__":
    sys.exit(main())
