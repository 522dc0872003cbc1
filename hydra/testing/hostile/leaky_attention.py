"""An attention class that tells what it should not, in every way that a trainer gives it; jobs name it by its path."""

import base64
import logging
import os
import sys
import traceback
from typing import Any

import torch
from torch import nn


class Leaky(nn.Module):
    """Tells the canaries in its first two calls; with the option `fails` the third ends the run with them."""

    options = {"fails": False}  # noqa: RUF012

    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.v_proj = nn.Linear(spec.d_model, spec.d_model, bias=False)
        self.fails = spec.options["fails"]
        self.n_calls = 0

    def forward(
        self, x_BTD: torch.Tensor, positions_BT: torch.Tensor | None, document_ids_BT: torch.Tensor | None
    ) -> torch.Tensor:
        """The value projection alone."""
        secrets = [os.environ[name] for name in ("CANARY_API_KEY", "CANARY_TOKEN", "CANARY_PASSWORD", "CANARY_OTHER")]
        self.n_calls += 1
        if self.n_calls < 3:
            print(*secrets, repr(secrets), flush=True)  # noqa: T201
            sys.stderr.write(secrets[1][:9])
            sys.stderr.flush()
            sys.stderr.write(secrets[1][9:] + "\n")
            logging.getLogger("leak").warning("%s", secrets)
            print(base64.b64encode(secrets[1].encode()).decode(), file=sys.stderr)  # noqa: T201
            try:
                raise ValueError(secrets[0])  # noqa: TRY301
            except ValueError:
                traceback.print_exc()
                logging.getLogger("leak").exception("it failed with %s", secrets[1])
        if self.fails and self.n_calls > 2:
            raise RuntimeError(f"no access with {secrets[0]} or {secrets[1]}")
        values_BTD: torch.Tensor = self.v_proj(x_BTD)
        return values_BTD
