"""What a user would write instead: the peers that stand in the benchmark tables."""

import torch
import torch.nn.functional as F


def plain_cross_entropy(logits, labels, alpha):
    """F.cross_entropy: does less (no target, no argmax), and is what self-distillation replaces."""
    return F.cross_entropy(logits, labels)


def eager_two_losses(logits, labels, alpha):
    """Two cross entropies, mixed."""
    hard = logits.detach().argmax(-1)
    return alpha * F.cross_entropy(logits, labels) + (1 - alpha) * F.cross_entropy(logits, hard)


def eager_gather(logits, labels, alpha):
    """One log-softmax, two gathers."""
    log_p = F.log_softmax(logits, -1)
    hard = logits.detach().argmax(-1, keepdim=True)
    given = log_p.gather(-1, labels[:, None])
    return -(alpha * given + (1 - alpha) * log_p.gather(-1, hard)).mean()


def eager_nll(logits, labels, alpha):
    """One log-softmax, two negative log-likelihoods."""
    log_p = F.log_softmax(logits, -1)
    hard = logits.detach().argmax(-1)
    return alpha * F.nll_loss(log_p, labels) + (1 - alpha) * F.nll_loss(log_p, hard)


def eager_target(logits, labels, alpha):
    """A dense target and F.cross_entropy with probabilities."""
    target = torch.zeros_like(logits)
    target.scatter_(-1, labels[:, None], alpha)
    target.scatter_add_(
        -1, logits.detach().argmax(-1, keepdim=True), torch.full_like(labels[:, None], 1 - alpha, dtype=logits.dtype)
    )
    return F.cross_entropy(logits, target)


# The best of these at each shape is "the best eager composition"; the same, compiled, is the torch.compile row.
EAGER_COMPOSITIONS = (eager_two_losses, eager_gather, eager_nll, eager_target)
