"""float32 copies of low-precision parameters: what an optimizer steps and a checkpoint holds.

A bfloat16 weight has 8 bits of significand, so an update below 1/256 of it would be lost; the copy keeps it
(Micikevicius et al., arXiv 1710.03740, section 3.1).
"""

import torch
from torch import Tensor, nn


class MasterWeights:
    """The float32 side of a model whose matrix products run in another dtype.

    Parameters that stay in float32 are their own master. The others get a copy; when a backward pass has finished the
    gradient of one, it is added to the copy's, in float32, and dropped: micro-batches add up without rounding to
    bfloat16 in between, and no two gradients of a parameter are held.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype, keep_float32: frozenset[str], on_host: bool = False
    ) -> None:
        """Change the parameters of `model` (float32) to `dtype`, but for the names in `keep_float32`.

        Args:
            on_host: keep all masters, and with them their gradients and optimizer state, in the host's memory; the
                model's parameters stay on their device.
        """
        self.named: dict[str, nn.Parameter] = {}
        """Masters by the model's own parameter names."""
        self._lowered: list[Tensor] = []
        self._copies: list[Tensor] = []
        for name, parameter in model.named_parameters():
            assert parameter.dtype == torch.float32, (name, parameter.dtype)
            self.named[name] = parameter
            is_lowered = dtype != torch.float32 and name not in keep_float32
            if is_lowered or on_host:
                self.named[name] = self._lower(parameter, dtype if is_lowered else torch.float32, on_host)

    def _lower(self, parameter: nn.Parameter, dtype: torch.dtype, on_host: bool) -> nn.Parameter:
        device = torch.device("cpu") if on_host else parameter.device
        # A copy even where the host is where the parameter is, so that the two are never one tensor.
        master = nn.Parameter(parameter.detach().to(device, copy=on_host))
        parameter.data = parameter.detach().to(dtype)

        def collect(lowered: Tensor) -> None:
            assert lowered.grad is not None
            if master.grad is None:
                master.grad = lowered.grad.to(device, torch.float32)
            else:
                master.grad += lowered.grad.to(device)
            lowered.grad = None

        parameter.register_post_accumulate_grad_hook(collect)
        self._lowered.append(parameter)
        self._copies.append(master)
        return master

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model's parameters; due after every change of them."""
        if self._lowered:
            torch._foreach_copy_(self._lowered, self._copies)

    def state_dict(self) -> dict[str, Tensor]:
        """The masters by name, as the model's own state dict would hold them in float32."""
        return {name: parameter.detach() for name, parameter in self.named.items()}

    @torch.no_grad()
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state_dict` gave; names and shapes were checked by whoever read them."""
        assert tensors.keys() == self.named.keys(), tensors.keys() ^ self.named.keys()
        for name, parameter in self.named.items():
            parameter.copy_(tensors[name])
        self.publish()
