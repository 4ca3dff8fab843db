"""What to do about errors of torch whose messages do not say."""


def explained(error: RuntimeError) -> RuntimeError | None:
    """The error with advice in front of it, or ``None`` if there is none."""
    for symptom, hint in _HINTS.items():
        if symptom in str(error):
            return RuntimeError(f"{hint}\n(torch: {error})")
    return None


_DEVICES = (
    "an operation of the objective met two devices: move the data, support and query, to the device "
    "of the parameters"
)
_DTYPES = (
    "an operation of the objective met two dtypes: bring the data to the dtype of the parameters, or "
    "evaluate under torch.autocast"
)
_HINTS = {
    "randomness error mode": (
        "the objective draws random numbers (dropout?), so that every evaluation would be of another "
        "function: give minimize and attach the same seed=..., or MetaLearner stochastic=True, to "
        "draw the same numbers each time; or call .eval() on those modules"
    ),
    "saved tensor hooks": (
        "torch.func transforms do not support activation checkpointing (torch.utils.checkpoint): turn "
        "it off in the inner model; the memory of an implicit gradient does not grow with the steps"
    ),
    "must override the setup_context": (
        "torch.func transforms do not support this autograd.Function (torch.utils.checkpoint with "
        "use_reentrant=True is one): give it a setup_context; activation checkpointing: turn it off "
        "in the inner model"
    ),
    "expected scalar type": _DTYPES,
    "must have the same dtype": _DTYPES,
    "not on the expected device": _DEVICES,
    "tensors to be on the same device": _DEVICES,
    "Batching rule not implemented": (
        "an operation of the objective cannot be batched over tasks by vmap (nn.LSTM, nn.GRU and "
        "nn.RNN, for instance): use batching=iopt.Batching(chunk_size=1)"
    ),
}
