"""The inner solvers as ``torch.optim`` classes: thin shells over the rules of ``_solver``."""

from implicit_optim.optim._agd import NesterovAGD
from implicit_optim.optim._gd import GD
from implicit_optim.optim._newton import NewtonCG, TrustRegion
from implicit_optim.optim._nonlinear_cg import NonlinearCG
from implicit_optim.optim._proximal_gradient import ProximalGradient

__all__ = ["GD", "NesterovAGD", "NewtonCG", "NonlinearCG", "ProximalGradient", "TrustRegion"]
