"""Activations: the nonlinearity between two matrices. Without one, two matrices in a row equal a single matrix.

Each maps a tensor of any shape to one of the same shape, element by element; `MLP` and `GLU` take them as an argument.
Blog: Activations.
"""

from torch import Tensor
from torch.nn import functional as F


def relu(x: Tensor) -> Tensor:
    """max(x, 0). Attention Is All You Need, arXiv 1706.03762, section 3.3."""
    return F.relu(x)


def gelu(x: Tensor) -> Tensor:
    """x Phi(x), with Phi(x) = (1 + erf(x / sqrt 2)) / 2, the share of a standard normal below x.
    Gaussian Error Linear Units, arXiv 1606.08415."""
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2: the approximation of GELU in GPT-2 and Gemma.
    Gaussian Error Linear Units, arXiv 1606.08415, section 2."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x): a cheaper approximation of GELU. Gaussian Error Linear Units, arXiv 1606.08415, section 2."""
    return x * (1.702 * x).sigmoid()


def silu(x: Tensor) -> Tensor:
    """x sigmoid(x), named in arXiv 1606.08415; Swish with beta = 1."""
    return F.silu(x)


def swish(x: Tensor, beta: float | Tensor = 1.0) -> Tensor:
    """x sigmoid(beta x): x / 2 at beta = 0, ReLU as beta grows.
    Searching for Activation Functions, arXiv 1710.05941."""
    return x * (beta * x).sigmoid()


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2. Primer: Searching for Efficient Transformers for Language Modeling, arXiv 2109.08668."""
    return F.relu(x).square()
