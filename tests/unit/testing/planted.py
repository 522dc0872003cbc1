"""Attention classes with one mistake each, for test_check_attention. Each overrides a method of one that is right.

B batch, T tokens (S as keys), D model width, N heads, H head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Right(nn.Module):
    """Softmax attention with a penalty on distance."""

    def __init__(self, spec) -> None:
        super().__init__()
        self.spec = spec
        self.qkv_proj = nn.Linear(spec.d_model, 3 * spec.d_model, bias=False)
        self.o_proj = nn.Linear(spec.d_model, spec.d_model, bias=False)

    def visible(self, ids_BT: Tensor) -> Tensor:
        n_tokens = ids_BT.shape[1]
        is_past_TS = torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril()
        return is_past_TS & (ids_BT[:, :, None] == ids_BT[:, None, :])

    def scale(self) -> float:
        return self.spec.head_width**-0.5

    def weigh(self, scores_BNTS: Tensor) -> Tensor:
        return scores_BNTS.softmax(dim=-1)

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv_3BNTH = self.qkv_proj(x_BTD).unflatten(-1, (3, self.spec.n_heads, -1)).permute(2, 0, 3, 1, 4)
        return qkv_3BNTH.unbind()

    def forward(self, x_BTD: Tensor, positions_BT: Tensor, document_ids_BT: Tensor) -> Tensor:
        q_BNTH, k_BNSH, v_BNSH = self.project(x_BTD)
        distance_BTS = positions_BT[:, :, None] - positions_BT[:, None, :]
        scores_BNTS = self.scale() * q_BNTH @ k_BNSH.mT - 0.1 * distance_BTS[:, None].to(x_BTD.dtype)
        scores_BNTS = scores_BNTS.masked_fill(~self.visible(document_ids_BT)[:, None], -torch.inf)
        return self.o_proj((self.weigh(scores_BNTS) @ v_BNSH).transpose(1, 2).flatten(2))


class SeesTheNextToken(Right):
    def visible(self, ids_BT: Tensor) -> Tensor:
        n_tokens = ids_BT.shape[1]
        is_past_TS = torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril(1)
        return is_past_TS & (ids_BT[:, :, None] == ids_BT[:, None, :])


class SeesItsWholeChunk(Right):
    """From the second chunk of 16 on."""

    def visible(self, ids_BT: Tensor) -> Tensor:
        chunk_T = torch.arange(ids_BT.shape[1]) // 16
        own_TS = (chunk_T[:, None] == chunk_T) & (chunk_T > 0)
        return super().visible(ids_BT) | (own_TS & (ids_BT[:, :, None] == ids_BT[:, None, :]))


class ConvolvesBothWays(Right):
    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().project(F.avg_pool1d(x_BTD.mT, 3, stride=1, padding=1).mT)


class SeesAQuarterOfTheRow(Right):
    """However early it is itself."""

    def visible(self, ids_BT: Tensor) -> Tensor:
        n_tokens = ids_BT.shape[1]
        is_past_TS = torch.ones(n_tokens, n_tokens, dtype=torch.bool).tril()
        is_past_TS[:, : n_tokens // 4] = True
        return is_past_TS & (ids_BT[:, :, None] == ids_BT[:, None, :])


class IgnoresDocuments(Right):
    def visible(self, ids_BT: Tensor) -> Tensor:
        return super().visible(torch.zeros_like(ids_BT))


class SeesDocumentsWithSmallerIds(Right):
    def visible(self, ids_BT: Tensor) -> Tensor:
        return super().visible(torch.zeros_like(ids_BT)) & (ids_BT[:, :, None] >= ids_BT[:, None, :])


class ShiftsValuesAcrossDocuments(Right):
    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BNTH, k_BNSH, v_BNSH = super().project(x_BTD)
        return q_BNTH, k_BNSH, v_BNSH + F.pad(v_BNSH, (0, 0, 1, 0))[:, :, :-1]


class TakesTheFirstRowsDocuments(Right):
    def visible(self, ids_BT: Tensor) -> Tensor:
        return super().visible(ids_BT[:1].expand_as(ids_BT))


class CountsPlacesAndNotPositions(Right):
    """Absolute ones."""

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().project(x_BTD + torch.arange(x_BTD.shape[1])[:, None].sin().to(x_BTD.dtype))


class CarriesStateFromRowToRow(Right):
    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().project(x_BTD + 0.1 * x_BTD.cumsum(dim=0))


class NormalisesOverTheBatch(Right):
    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().project(x_BTD / x_BTD.square().mean(dim=0, keepdim=True).sqrt())


class NormalisesOverTime(Right):
    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().project(x_BTD / x_BTD.square().mean(dim=1, keepdim=True).sqrt())


class DividesByTheLength(Right):
    def weigh(self, scores_BNTS: Tensor) -> Tensor:
        return super().weigh(scores_BNTS) * scores_BNTS.shape[-1] ** -0.5


class ScalesByTheWidth(Right):
    def scale(self) -> float:
        return 1 / self.spec.head_width


class ScalesByNothing(Right):
    def scale(self) -> float:
        return 1.0


class ScalesByTheModelsWidth(Right):
    def scale(self) -> float:
        return self.spec.d_model**-0.5


class OverflowsInExp(Right):
    def weigh(self, scores_BNTS: Tensor) -> Tensor:
        weights_BNTS = scores_BNTS.exp()
        return weights_BNTS / weights_BNTS.sum(dim=-1, keepdim=True)


class AddsUpInLowPrecision(Right):
    """Weights of 2,048 and more, each of which hides what is small beside it."""

    def weigh(self, scores_BNTS: Tensor) -> Tensor:
        return (super().weigh(scores_BNTS) + 64.0) - 64.0


class KeepsItsLastKeys(Right):
    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BNTH, k_BNSH, v_BNSH = super().project(x_BTD)
        if getattr(self, "last_k", None) is not None and self.last_k.shape == k_BNSH.shape:
            k_BNSH = 0.5 * (k_BNSH + self.last_k)
        self.last_k = k_BNSH.detach()
        return q_BNTH, k_BNSH, v_BNSH


class DropsOutInEvaluation(Right):
    def weigh(self, scores_BNTS: Tensor) -> Tensor:
        return F.dropout(super().weigh(scores_BNTS), 0.1)


class HasAnIdleParameter(Right):
    def __init__(self, spec) -> None:
        super().__init__(spec)
        self.gain_D = nn.Parameter(torch.ones(spec.d_model))


class CutsAGradient(Right):
    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BNTH, k_BNSH, v_BNSH = super().project(x_BTD)
        return q_BNTH, k_BNSH.detach(), v_BNSH


class RegistersAMask(Right):
    def __init__(self, spec) -> None:
        super().__init__(spec)
        self.register_buffer("mask", torch.ones(256, 256).tril(), persistent=False)


class AsksForANumber(Right):
    def weigh(self, scores_BNTS: Tensor) -> Tensor:
        if scores_BNTS.max().item() > 1e6:
            scores_BNTS = scores_BNTS / 2
        return super().weigh(scores_BNTS)


class SqueezesOneToken(Right):
    def forward(self, x_BTD: Tensor, positions_BT: Tensor, document_ids_BT: Tensor) -> Tensor:
        return super().forward(x_BTD, positions_BT, document_ids_BT).squeeze(1)


class PairsTokens(Right):
    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return super().project(x_BTD.unflatten(1, (x_BTD.shape[1] // 2, 2)).flatten(1, 2))


class DoesNotSeeItself(Right):
    def visible(self, ids_BT: Tensor) -> Tensor:
        return super().visible(ids_BT) & ~torch.eye(ids_BT.shape[1], dtype=torch.bool)


class ComputesInSinglePrecision(Right):
    def weigh(self, scores_BNTS: Tensor) -> Tensor:
        return scores_BNTS.float().softmax(dim=-1).to(scores_BNTS.dtype)
