"""Theorem 1's descent against torch's own, its kernel against the paper's integral, its constants by hand."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdfast.experiments import theorem1
from sdfast.experiments.theorem1 import CONSTANT, OURS, PLAIN, Settings, constants, draw_set, neural_kernel
from sdfast.models import TwoLayerNet

SETTINGS = replace(Settings(), width=60, steps=40, contrasts=1, records=40)


@pytest.mark.parametrize("method", [PLAIN, OURS, CONSTANT])
def test_the_descent_is_that_of_autograd(method):
    inputs, given, true, _ = draw_set(SETTINGS, SETTINGS.radius, 0)
    torch.manual_seed(0)
    network = TwoLayerNet(SETTINGS.dimension, SETTINGS.width, symmetric=True)
    got = theorem1._descend(SETTINGS, method, network, inputs, given, true)
    network = network.double()
    jacobian = torch.stack(
        [torch.autograd.grad(value, network.weight, retain_graph=True)[0].flatten() for value in network(inputs)[:, 0]]
    )
    largest = float(torch.linalg.eigvalsh(jacobian @ jacobian.T)[-1])
    optimizer = torch.optim.SGD(network.parameters(), lr=SETTINGS.rate / largest)
    errors = {}
    for step in range(1, SETTINGS.steps + 1):
        f = network(inputs)[:, 0]
        alpha = {PLAIN: 1.0, CONSTANT: SETTINGS.constant}.get(method, max(0.0, 1 - (step - 1) / got["window_steps"]))
        own = (4 * f.detach() / (1 - 2 * SETTINGS.flips)).clamp(-1, 1)
        errors[step] = float((f - true).detach().norm())
        optimizer.zero_grad()
        (0.5 * ((f - alpha * given - (1 - alpha) * own) ** 2).sum()).backward()
        optimizer.step()
    assert errors[1] == pytest.approx(math.sqrt(SETTINGS.points))  # f = 0 at the start
    wanted = [errors[step] for step in got["steps"]]
    assert got["errors"] == pytest.approx(wanted, rel=1e-4)


def test_the_kernel_is_the_papers_integral():
    """E[φ'(a·g) φ'(b·g)] over Gaussian g, by Monte Carlo of 400,000 draws; 5 sigma."""
    points = torch.nn.functional.normalize(torch.randn(3, 4, dtype=torch.float64), dim=1)
    slopes = 2 / math.sqrt(math.pi) * torch.exp(-((torch.randn(400_000, 4, dtype=torch.float64) @ points.T) ** 2))
    products = slopes[:, :, None] * slopes[:, None, :]
    wanted = (points @ points.T) * products.mean(0)
    error = 5 * products.std(0) / math.sqrt(400_000)
    assert bool(((neural_kernel(points) - wanted).abs() <= error).all())


def test_flips_are_the_share_of_every_cluster():
    inputs, given, true, centres = draw_set(SETTINGS, 0.05, 3)
    assert torch.allclose(inputs.norm(dim=1), torch.ones(60, dtype=torch.float64))
    cluster = torch.arange(60) % 4
    assert [int((given != true)[cluster == c].sum()) for c in range(4)] == [4, 4, 4, 4]  # of 15, ρ = 4/15
    assert float((inputs - centres[cluster]).norm(dim=1).max()) < 0.2
    assert set(true.tolist()) == {1.0, -1.0}


def test_the_constants_by_hand():
    inputs, _, _, centres = draw_set(SETTINGS, 0.05, 0)
    got = constants(SETTINGS, inputs, centres, window=700)
    rho, gamma2 = 4 / 15, 4 / math.pi
    smallest = float(torch.linalg.eigvalsh(neural_kernel(centres))[0])
    q = smallest * (1 - 2 * rho) / (gamma2 * 4)
    assert got["q"] == pytest.approx(q)
    assert got["alpha_falls_at_most"] == pytest.approx(q / (1024 * math.sqrt(60)))
    assert got["alpha_at_T1_at_least"] == pytest.approx(max(1 - q / 128, (1.75 - 1.5 * rho) / (2 - 2 * rho)))
    argument = math.sqrt(gamma2) * math.sqrt(32 * 60 * math.log(8 / 0.05)) / (1 - 2 * rho)
    assert got["T1"] == math.ceil(80 * gamma2 * 4 / smallest * math.log(argument))
    assert (got["slow_enough"], got["late_enough"]) == (False, False)
    slow = constants(SETTINGS, inputs, centres, window=10**9)
    assert (slow["slow_enough"], slow["late_enough"]) == (True, True)


def test_only_some_seeds_run_the_contrasts():
    values = theorem1.run_seed(replace(SETTINGS, steps=3), 1, Path("unused"))
    assert CONSTANT not in values
    assert CONSTANT in theorem1.run_seed(replace(SETTINGS, steps=3), 0, Path("unused"))
