"""What watching the kernel costs training: ten steps of SGD, batch 128, with and without one look of the probe.

The look is a Gram matrix of 128 samples (trace over ten outputs of the MLP, the sum of the outputs of ResNet-20) and
its eigenspace, started from the last one's. Its ratio is checked against a dense decomposition before it is timed. The
target of the MLP is a time, 5 ms a look: see the row of the probe alone. One look in ten finds out anew how the model
uses its parameters: the last row.
"""

import functools

import torch
import torch.nn.functional as F

import sdfast
from benchmarks.harness import Case, interleaved, measure
from sdfast.train import InformationProbe

PEERS = {"training alone": "ten steps"}
NETWORKS = {
    "MLP 784-256-256-10, n=128": (lambda: sdfast.models.mlp((784, 256, 256, 10)), (784,), "trace"),
    "ResNet-20, n=128": (lambda: sdfast.models.make_model("resnet20", (3, 32, 32), 10), (3, 32, 32), "sum"),
}
NAMES = ("ten steps", "with a probe", "the probe alone", "the probe alone, all found anew")
TARGETS = {"ResNet-20, n=128": {"with a probe": (1.12,)}}
SAMPLES = 128


class Training:
    """A network, its data and its probe."""

    def __init__(self, group: str) -> None:
        make, shape, outputs = NETWORKS[group]
        torch.manual_seed(0)
        self.model, self.inputs = make(), torch.randn(SAMPLES, *shape)
        self.labels = torch.randint(10, (SAMPLES,))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.probe = InformationProbe(self.inputs, self.labels, outputs=outputs)

    def step(self) -> None:
        """One of SGD."""
        loss = F.cross_entropy(self.model(self.inputs), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def steps(self) -> None:
        """Ten."""
        for _ in range(10):
            self.step()

    def watched_steps(self) -> None:
        """Ten, and a look."""
        self.steps()
        self.look()

    def look(self) -> None:
        """The probe alone."""
        self.probe(self.model)

    def first_look(self) -> None:
        """The same as if it were the first."""
        self.probe._kernel.reused = self.probe._kernel.afresh
        self.look()


@functools.lru_cache(maxsize=1)
def training(group: str) -> Training:
    """Of a group, for all of its rows; the probe has looked once, and rightly."""
    made = Training(group)
    made.step()
    made.look()
    made.model.eval()
    kernel = sdfast.ntk.gram(made.model, made.inputs, outputs=made.probe.outputs, precision="float64")
    made.model.train()
    vectors = torch.linalg.eigh(kernel)[1][:, -made.probe.k :]
    targets = F.one_hot(made.labels, 10).double()
    exact = (vectors.T @ targets).norm() / targets.norm()
    if abs(made.probe.records[0].given - exact) > 1e-4:
        raise SystemExit(f"bench_information_probe: the ratio is {made.probe.records[0].given}, wanted {exact}")
    return made


def prepare(group: str, name: str) -> Case:
    """A row's step."""
    made = training(group)
    steps = (made.steps, made.watched_steps, made.look, made.first_look)
    return Case(dict(zip(NAMES, steps, strict=True))[name], rounds=1 if "ResNet" in group else None)


@interleaved(NETWORKS, NAMES, turns=5)
def test_information_probe(benchmark, group, turn, name):
    measure(benchmark, group, turn, name, prepare)
