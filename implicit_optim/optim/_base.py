"""What is common to all ``torch.optim`` classes here: checked options and real parameters."""

from typing import Any, ClassVar

from torch.optim.optimizer import Optimizer, ParamsT

from implicit_optim._checks import check


class Checked(Optimizer):
    """An optimizer of real parameters that checks its options: the defaults, and those of each group."""

    _must: ClassVar[dict[str, str]] = dict(lr="be finite and > 0")
    # Options that an old checkpoint may lack, with the value to assume.
    _later: ClassVar[dict[str, Any]] = dict(maximize=False)

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._check(defaults)
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.update(self._later | group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with options of its own where it names them.

        Args:
            param_group: ``{"params": ..., option: value, ...}``.

        Raises:
            TypeError: a parameter is complex.
            ValueError: an option is out of range.
        """
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
            if any(p.is_complex() for p in self.param_groups[-1]["params"]):
                raise TypeError(
                    f"{type(self).__name__} does not take complex parameters: make "
                    "torch.view_as_real(p) the parameter and use torch.view_as_complex in the model"
                )
        except Exception:
            del self.param_groups[-1]
            raise

    def _check(self, options: dict[str, Any]) -> None:
        """Raise ``ValueError`` if an option is out of range."""
        for name, rule in self._must.items():
            check(name, options[name], rule)
