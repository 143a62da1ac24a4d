"""Farthest-point selection in descriptor space."""

from __future__ import annotations

import numpy as np


def standardise(descriptors: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Columns scaled by the spread of `reference` ([m, d]); columns that never vary are left out of distances."""
    spread = reference.std(axis=0)
    scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 1e-12)
    return np.asarray((descriptors - reference.mean(axis=0)) * scale)


def farthest_points(candidates: np.ndarray, count: int, known: np.ndarray | None = None) -> list[int]:
    """Indices of `count` rows of `candidates` ([m, d]), each the farthest from all chosen and known ones.

    `known` ([k, d]) are the descriptors already paid for. Without any, the first choice is the candidate
    farthest from the mean. Ties go to the lower index, so the result depends on the input alone. Fewer than
    `count` come back when there are not enough distinct candidates. Raises ValueError on non-finite rows.
    """
    for kind, rows in (("candidate", candidates), ("known row", known)):
        if rows is not None and not np.isfinite(rows).all():
            bad = int(np.argmax(~np.isfinite(rows).all(axis=1)))
            raise ValueError(f"{kind} {bad} has a non-finite descriptor")
    chosen: list[int] = []
    if len(candidates) == 0 or count < 1:
        return chosen
    if known is not None and len(known):
        distance = np.min([np.linalg.norm(candidates - row, axis=1) for row in known], axis=0)
    else:
        distance = np.linalg.norm(candidates - candidates.mean(axis=0), axis=1)
        first = int(np.argmax(distance))
        chosen.append(first)
        distance = np.linalg.norm(candidates - candidates[first], axis=1)
    while len(chosen) < min(count, len(candidates)):
        following = int(np.argmax(distance))
        if distance[following] <= 0.0:
            break
        chosen.append(following)
        distance = np.minimum(distance, np.linalg.norm(candidates - candidates[following], axis=1))
    return chosen
