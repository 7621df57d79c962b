"""The neural tangent kernel of a network: its Gram matrices, their eigenspaces, and what labels hold in them."""

from sdfast.ntk.eigenspace import Eigenspace as Eigenspace
from sdfast.ntk.eigenspace import eigenspace as eigenspace
