"""Any model, meta-trained: the module that people use, its loss, and what it checks.

It uses `_meta_gradient`, `_solver`, `_problem`, `_evaluation`, `_outcome` and `_vectors`.
"""

from implicit_optim._meta_learner.learner import MetaLearner
