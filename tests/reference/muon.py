"""Muon one matrix and one plain formula at a time, in numpy and float64."""

from __future__ import annotations

import math

import numpy as np

QUINTICS = {
    "jordan": [(3.4445, -4.7750, 2.0315)],
    "polar_express": [
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ],
}


def polar_factor(matrix: np.ndarray) -> np.ndarray:
    """U V^T over the directions whose singular value is not zero."""
    u, s, vt = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    keep = s > 1e-6 * s.max(initial=0.0)
    return u[:, keep] @ vt[keep]


def through_quintics(matrix: np.ndarray, coefficients: str, steps: int) -> np.ndarray:
    """U f(S / norm) V^T: the polynomials on each singular value of an exact decomposition, no matrix products."""
    norm = math.sqrt(float((matrix.astype(np.float64) ** 2).sum()))
    if norm == 0:
        return np.zeros_like(matrix, dtype=np.float64)
    if coefficients == "polar_express":
        norm *= 1.02
    u, s, vt = np.linalg.svd(matrix.astype(np.float64) / norm, full_matrices=False)
    known = QUINTICS[coefficients]
    for step in range(steps):
        a, b, c = known[min(step, len(known) - 1)]
        s = a * s + b * s**3 + c * s**5
    return (u * s) @ vt


def run_muon(
    weight: np.ndarray,
    grads: list[np.ndarray],
    *,
    lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    scale: str,
    coefficients: str,
    steps: int = 5,
) -> tuple[np.ndarray, np.ndarray]:
    """Weight and momentum buffer after one step for each gradient."""
    w = weight.astype(np.float64)
    buffer = np.zeros_like(w)
    m, n = w.shape
    factor = {
        "match_rms_adamw": 0.2 * math.sqrt(max(m, n)),
        "original": math.sqrt(max(1, m / n)),
        "spectral": math.sqrt(m / n),
        "none": 1.0,
    }[scale]
    for grad in grads:
        g = grad.astype(np.float64)
        buffer = momentum * buffer + (1 - momentum) * g
        update = (1 - momentum) * g + momentum * buffer if nesterov else buffer
        w = (1 - lr * weight_decay) * w - lr * factor * through_quintics(update, coefficients, steps)
    return w, buffer
