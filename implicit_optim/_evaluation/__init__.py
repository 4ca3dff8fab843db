"""One task's function, evaluated and differentiated for all tasks of a batch.

It uses torch alone; `replaced/` holds what stands in for torch's functions while a model runs.
"""

from implicit_optim._evaluation import autograd
from implicit_optim._evaluation.autograd import Foreign
from implicit_optim._evaluation.batching import Batching, ByDefault, pick
from implicit_optim._evaluation.derivative import Expansion, gradient, second_order, vjp
from implicit_optim._evaluation.evaluator import Evaluator
from implicit_optim._evaluation.model import AsFunction, trainable, undisturbed
from implicit_optim._evaluation.outputs import as_returned, only_tensors
from implicit_optim._evaluation.precision import full_precision
from implicit_optim._evaluation.query_loss import of_tasks, query_losses
from implicit_optim._evaluation.random import draw_seed
from implicit_optim._evaluation.running_stats import (
    RunningStats, check_statistics, statistics_needed,
)  # fmt: skip
