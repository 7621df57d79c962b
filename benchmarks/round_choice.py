"""How near rules come to the best round, judged from noisy labels alone: ``python -m benchmarks.round_choice``.

Per data set, kernel and noise, over many seeds: the test accuracy (clean labels) of each path's best round less that of
the round a rule picks, in points. ``--record`` writes benchmarks/results/round_choice.json, from which docs/hilbert.md
has its figures. The rules other than GCV and leave-one-out live here alone: none was better throughout.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from sklearn.preprocessing import StandardScaler

from sdfast import _files, report
from sdfast.hilbert import kernels, self_distill

RESULT = Path(__file__).parent / "results" / "round_choice.json"
DATA = {"digits": load_digits, "wine": load_wine, "breast cancer": load_breast_cancer, "iris": load_iris}
TRAIN = {"digits": 300, "wine": 100, "breast cancer": 300, "iris": 90}  # points to train on
KERNELS = ("rbf", "laplacian", "polynomial")


def noisy(name, kernel, noise, seed):
    """Gram matrices, centred one-hot labels, their mean, and the clean test labels."""
    rng = np.random.default_rng(seed)
    x, labels = DATA[name](return_X_y=True)
    train = TRAIN[name]
    order = rng.permutation(len(x))[: 2 * train]
    x, labels = x[order], labels[order]
    options = {}
    if name == "digits":
        x = x / 16
        options = {"gamma": 0.1} if kernel == "rbf" else {}
    else:
        x = StandardScaler().fit(x[:train]).transform(x)
    given = labels[:train].copy()
    classes = labels.max() + 1
    redrawn = rng.random(train) < noise
    given[redrawn] = rng.integers(0, classes, redrawn.sum())
    y = np.eye(classes)[given]
    gram = kernels.gram(kernel, x[:train], **options)
    return gram, kernels.gram(kernel, x[train:], x[:train], **options), y - y.mean(0), y.mean(0), labels[train:]


def feasible_path(gram, y):
    """The path at the first share of the label energy that can be met."""
    for share in (0.05, 0.1, 0.2, 0.4, 0.8):
        path = self_distill(gram, y, relative_tolerance=share)
        if not path.infeasible:
            return path
    raise ValueError("no tolerance is feasible")


def accuracies(path, cross, mean, truth):
    """Test accuracy of every round."""
    return np.array([((path.predict(cross, t) + mean).argmax(1) == truth).mean() for t in range(1, len(path) + 1)])


def rules(path, mean):
    """Index of the round that each rule picks."""
    points, vectors = path.points, path.spectrum.vectors
    constant = (vectors.T @ np.full(points, points**-0.5)) ** 2  # the direction along which the labels were centred
    choice = path.best_round()
    gcv, loo = np.array(choice.scores), path.scores("loo")
    labels = (path.y + mean).argmax(1)
    scores = {name: [] for name in ("centring counted", "1.2 tr", "1.4 tr", "robust GCV", "AICc", "LOO accuracy")}
    for t, (_, kept, left) in enumerate(path.each_round()):
        trace, square = kept.sum(), (kept**2).sum()
        centred = trace + 1 - kept[:, 0] @ constant  # degrees of freedom with those of the mean
        residual = ((left * path.rotated) ** 2).sum() / points

        def inflated(freedom, residual=residual):
            return residual / (1 - freedom / points) ** 2 if freedom < points else np.inf

        scores["centring counted"].append(inflated(centred))
        scores["1.2 tr"].append(inflated(1.2 * trace))
        scores["1.4 tr"].append(inflated(1.4 * trace))  # Kim and Gu 2004
        scores["robust GCV"].append(gcv[t] * (0.3 + 0.7 * square / points))  # Lukas 2006
        penalty = 2 * (centred + 1) / (points - centred - 2) if centred < points - 2 else np.inf
        scores["AICc"].append(np.log(residual) + penalty)  # Hurvich, Simonoff and Tsai 1998
        held_out = path.y + mean - vectors @ (left * path.rotated) / (vectors**2 @ left)
        scores["LOO accuracy"].append(-(held_out.argmax(1) == labels).mean() + 1e-9 * gcv[t])  # GCV breaks ties
    picks = {name: int(np.argmin(values)) for name, values in scores.items()}
    near = gcv <= gcv[choice - 1] + np.array(choice.difference_errors)
    picks["one standard error later"] = int(np.flatnonzero(near)[-1])
    return {"GCV": choice - 1, "LOO": int(np.argmin(loo)), **picks, "round 1": 0}


def gaps(name, kernel, noise, seeds):
    """Per rule: points below the best round, a seed each."""
    found = {}
    for seed in seeds:
        gram, cross, y, mean, truth = noisy(name, kernel, noise, seed)
        path = feasible_path(gram, y)
        right = accuracies(path, cross, mean, truth)
        for rule, pick in rules(path, mean).items():
            found.setdefault(rule, []).append(100 * (right.max() - right[pick]))
    return {
        rule: [round(float(np.mean(values)), 2), round(float(np.std(values, ddof=1)) / len(values) ** 0.5, 2)]
        for rule, values in found.items()
    }


def main():
    """Prints a table of every case, and the means and worst cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=64)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.2, 0.4, 0.6])
    parser.add_argument("--record", action="store_true", help=f"write {RESULT.name}")
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    rows = [
        {"data": name, "kernel": kernel, "noise": noise, "gaps": gaps(name, kernel, noise, seeds)}
        for noise in arguments.noise
        for name in DATA
        for kernel in KERNELS
    ]
    cells = [
        [f"{r['data']}, {r['kernel']}, {r['noise']}", *(f"{m} ± {s}" for m, s in r["gaps"].values())] for r in rows
    ]
    for noise in arguments.noise:
        here = [[mean for mean, _ in row["gaps"].values()] for row in rows if row["noise"] == noise]
        cells.append([f"mean at {noise}", *(f"{value:.2f}" for value in np.mean(here, axis=0))])
        cells.append([f"worst at {noise}", *(f"{value:.2f}" for value in np.max(here, axis=0))])
    print(report.plain_table(["points below the best round", *rows[0]["gaps"]], cells))
    if arguments.record:
        command = f"python -m benchmarks.round_choice --seeds {arguments.seeds} --first-seed {arguments.first_seed}"
        _files.write_text(RESULT, json.dumps({"command": command, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
