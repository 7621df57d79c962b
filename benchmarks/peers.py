"""What a user would write instead: the peers that stand in the benchmark tables."""

import torch
import torch.nn.functional as F


def plain_cross_entropy(logits, labels, alpha):
    """F.cross_entropy: does less (no target, no argmax), and is what self-distillation replaces."""
    return F.cross_entropy(logits, labels)


def liger_cross_entropy(logits, labels, alpha):
    """Liger-Kernel's cross entropy: no target of its own, and the gradient in the logits' place."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return LigerCrossEntropyLoss()(logits, labels)


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


def _observe(predictions, seen, indices, observed, momentum):
    """The bias-corrected update of the rows, and what they were before."""
    count = seen[indices]
    weight = (1 - momentum) / (1 - momentum ** (count + 1))
    old = predictions[indices]
    predictions[indices] = torch.lerp(old, observed, weight[:, None])
    seen[indices] = count + 1
    return old


def bank_probabilities(logits, labels, indices, predictions, seen, momentum, alpha):
    """A dense target and F.cross_entropy with probabilities; a softmax of its own for the bank."""
    with torch.no_grad():
        target = _observe(predictions, seen, indices, logits.softmax(-1), momentum).mul_(1 - alpha)
        target.scatter_add_(-1, labels[:, None], torch.full_like(labels[:, None], alpha, dtype=logits.dtype))
    return F.cross_entropy(logits, target)


def bank_one_softmax(logits, labels, indices, predictions, seen, momentum, alpha):
    """One log-softmax for the loss and, by its exponential, for the bank."""
    log_p = F.log_softmax(logits, -1)
    with torch.no_grad():
        old = _observe(predictions, seen, indices, log_p.exp(), momentum)
    return alpha * F.nll_loss(log_p, labels) - (1 - alpha) * (old * log_p).sum(-1).mean()


def elr_as_published(logits, labels, indices, predictions, seen, momentum, strength):
    """The forward of the authors' code, on a bank that is read before it is written."""
    p = logits.softmax(-1).clamp(1e-4, 1 - 1e-4)
    with torch.no_grad():
        old = _observe(predictions, seen, indices, p / p.sum(-1, keepdim=True), momentum)
    return F.cross_entropy(logits, labels) + strength * (1 - (old * p).sum(-1)).log().mean()


def elr_one_softmax(logits, labels, indices, predictions, seen, momentum, strength):
    """The same from one log-softmax."""
    log_p = F.log_softmax(logits, -1)
    p = log_p.exp().clamp(1e-4, 1 - 1e-4)
    with torch.no_grad():
        old = _observe(predictions, seen, indices, p / p.sum(-1, keepdim=True), momentum)
    return F.nll_loss(log_p, labels) + strength * (1 - (old * p).sum(-1)).log().mean()


# The same two names in both, so that a table's rows are the same for every group.
BANK_COMPOSITIONS = {
    "bank": {"two softmaxes": bank_probabilities, "one softmax": bank_one_softmax},
    "elr": {"two softmaxes": elr_as_published, "one softmax": elr_one_softmax},
}
