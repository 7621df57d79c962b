"""A run that is killed: a network whose every pass over the samples says so. Arguments: checkpoint, result."""

import sys

import torch
from torch import nn

from sdfast.ntk import gram


class Talking(nn.Sequential):
    def forward(self, x):
        print("forward", flush=True)
        return super().forward(x)


def model_and_samples():
    torch.manual_seed(0)
    return Talking(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 3)), torch.randn(50, 6)


OPTIONS = {"outputs": "trace", "batch_size": 10, "memory": 30_000}


def main():
    torch.set_num_threads(1)
    model, x = model_and_samples()
    torch.save(gram(model, x, checkpoint=sys.argv[1], **OPTIONS), sys.argv[2])


if __name__ == "__main__":
    main()
