"""The highest rate that a cluster can carry, and the price of each size's capacity: two linear programmes."""

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_array, vstack

from benchmarks.cluster.hardware import Size
from policies.types import Vector

CLASSES = 8  # of requests, by the work on the first size


def work(sizes: tuple[Size, ...], prompts: Vector, answers: Vector) -> Vector:
    """[N, K] seconds of a replica that request n takes on size k.

    Args:
        sizes: K sizes.
        prompts: [N] tokens.
        answers: [N, K] tokens.
    """
    columns = []
    for k, size in enumerate(sizes):
        tokens = float((prompts + answers[:, k]).mean())
        shared = size.engine.work_s(0.0, 1.0, tokens)
        columns.append(prompts / size.engine.prefill_tokens_s + answers[:, k] * shared)
    return np.stack(columns, axis=1)


def highest_rate(sizes: tuple[Size, ...], work_s: Vector) -> float:
    """Requests a second at which some assignment keeps the utilisation of every size at or below 1.

    Requests with similar work form a class; the variables are the requests a second of each class on each size.

    Args:
        sizes: K sizes.
        work_s: [N, K], see `work`.
    """
    order = np.argsort(work_s[:, 0])
    groups = np.array_split(order, min(CLASSES, len(order)))
    share = np.array([len(group) / len(order) for group in groups])
    mean = np.stack([work_s[group].mean(0) for group in groups])  # [C, K]
    classes, arms = mean.shape
    # The last variable is the rate.
    target = np.zeros(classes * arms + 1)
    target[-1] = -1.0
    within = np.zeros((arms, classes * arms + 1))
    for k in range(arms):
        within[k, k : classes * arms : arms] = mean[:, k]
    served = np.zeros((classes, classes * arms + 1))
    for c in range(classes):
        served[c, c * arms : (c + 1) * arms] = 1.0
        served[c, -1] = -share[c]
    replicas = [float(size.replicas) for size in sizes]
    solved = linprog(
        target, A_ub=within, b_ub=replicas, A_eq=served, b_eq=np.zeros(classes)
    )
    return float(solved.x[-1])


def scarcity(worth: Vector, work_s: Vector, capacity_s: Vector) -> Vector:
    """[K] the price of a second of each size in score points, if every request's worth is known.

    It is the dual of the capacity in the programme that assigns the requests to the sizes for the largest sum of worth.

    Args:
        worth: [N, K] of request n on size k.
        work_s: [N, K] seconds that it takes.
        capacity_s: [K] seconds that the size has.
    """
    count, arms = worth.shape
    rows = np.repeat(np.arange(count), arms)
    every = np.arange(count * arms)
    # A request may be left out, so there is always a solution.
    served = coo_array((np.ones(count * arms), (rows, every)), (count, count * arms))
    within = coo_array(
        (work_s.ravel(), (np.tile(np.arange(arms), count), every)), (arms, count * arms)
    )
    solved = linprog(
        -worth.ravel(),
        A_ub=vstack([served, within]).tocsr(),
        b_ub=np.concatenate([np.ones(count), capacity_s]),
        bounds=(0, None),
        method="highs",
    )
    return np.maximum(0.0, -np.asarray(solved.ineqlin.marginals[count:], float))
