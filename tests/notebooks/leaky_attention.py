"""An attention class that tells what it should not: the trainer runs it."""

import base64
import logging
import os
import sys
import traceback

from torch import nn


class Leaky(nn.Module):
    options = {"fails": False}  # noqa: RUF012

    def __init__(self, spec):
        super().__init__()
        self.v_proj = nn.Linear(spec.d_model, spec.d_model, bias=False)
        self.fails = spec.options["fails"]
        self.n_calls = 0

    def forward(self, x_BTD, positions_BT, document_ids_BT):
        secrets = [os.environ[name] for name in ("CANARY_API_KEY", "CANARY_TOKEN", "CANARY_PASSWORD", "CANARY_OTHER")]
        self.n_calls += 1
        if self.n_calls < 3:
            print(*secrets, repr(secrets), flush=True)
            sys.stderr.write(secrets[1][:9])
            sys.stderr.flush()
            sys.stderr.write(secrets[1][9:] + "\n")
            logging.getLogger("leak").warning("%s", secrets)
            print(base64.b64encode(secrets[1].encode()).decode(), file=sys.stderr)
            try:
                raise ValueError(secrets[0])  # noqa: TRY301
            except ValueError:
                traceback.print_exc()
                logging.getLogger("leak").exception("it failed with %s", secrets[1])
        if self.fails and self.n_calls > 2:
            raise RuntimeError(f"no access with {secrets[0]} or {secrets[1]}")
        return self.v_proj(x_BTD)
