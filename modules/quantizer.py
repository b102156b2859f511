"""Targets of self-supervised training: frames to discrete codes by a random projection that is never trained.

Paper: Chiu et al., "Self-Supervised Learning with Random-Projection Quantizer for Speech Recognition" (BEST-RQ), ICML
2022, arXiv:2202.01855. Names and numbers as in NeMo's RandomProjectionVectorQuantizer.

Projected frames and codes are unit vectors, so the nearest code in Euclidean distance and the one of the largest
cosine are the same: the one of the largest dot product. A matrix product finds it, in float64 as NeMo compares.
"""

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.autocast import without_autocast
from modules.checks import choices, switches, whole_numbers

DISTANCES = ("l2", "cosine")
MAX_SCORE_BYTES = 2**25  # of the scores that exist at one time: a long batch times 8192 codes would be gigabytes


def nearest_codes(vectors: Tensor, codebooks: Tensor) -> Tensor:
    """The nearest code of each book by Euclidean distance, for vectors of length one, or zero, and codes of length one.

    Silence behind an item's end gives vectors of zeros. All codes are equally far from these but for the last bit of
    their lengths, which decides in NeMo and therefore here: half a squared length close to one is, but for a constant,
    the length itself.

    Shape: (R, N, code_dim) and (N, C, code_dim) -> (R, N) int64.
    """
    codebooks = codebooks.double()
    lengths = codebooks.norm(dim=2)  # (N, C)
    num_rows = max(1, MAX_SCORE_BYTES // lengths[0].nbytes)
    books = [
        torch.cat([torch.addmm(-length, rows, codes.T).argmax(1) for rows in book.split(num_rows)])  # (num_rows, C)
        for book, codes, length in zip(vectors.double().unbind(1), codebooks, lengths, strict=True)
    ]
    return torch.stack(books, 1)


class RandomProjectionVectorQuantizer(nn.Module):
    """Joins neighbouring frames, projects them with a random matrix and gives the nearest random code of each book.

    Arguments
        feat_in: features of a frame.
        code_dim: dimension of the codes.
        num_classes: codes of a book.
        num_books: independent codes of each frame.
        dist_fn: l2 or cosine, which give the same codes.
        time_ahead: features come as (B, T, feat_in).
        freeze: without effect: no gradient passes through a code, and nothing here is ever trained.
        squeeze_single: no axis for the books where there is one only.
        combine_time_steps: frames that share a code, concatenated; K below.

    Shape: (B, feat_in, T) -> (B, T / K, num_books) int64, or (B, T / K) with squeeze_single and one book.

    Raises ValueError for values out of range and for frames that K does not divide.
    """

    def __init__(
        self,
        *,
        feat_in: int,
        code_dim: int = 16,
        num_classes: int = 8192,
        num_books: int = 1,
        dist_fn: str = "l2",
        time_ahead: bool = False,
        freeze: bool = True,
        squeeze_single: bool = False,
        combine_time_steps: int = 8,
    ) -> None:
        super().__init__()
        whole_numbers(
            feat_in=feat_in,
            code_dim=code_dim,
            num_classes=num_classes,
            num_books=num_books,
            combine_time_steps=combine_time_steps,
        )
        switches(time_ahead=time_ahead, freeze=freeze, squeeze_single=squeeze_single)
        choices(dist_fn=(dist_fn, DISTANCES))
        if not freeze:
            warnings.warn("freeze=false has no effect: no gradient passes through a code", stacklevel=2)
        self.num_books = num_books
        self.time_ahead = time_ahead
        self.squeeze_single = squeeze_single
        self.combine_time_steps = combine_time_steps
        self.proj = nn.Linear(feat_in * combine_time_steps, num_books * code_dim, bias=False).requires_grad_(False)
        nn.init.xavier_normal_(self.proj.weight)
        codebooks = F.normalize(torch.randn(num_books, num_classes, code_dim, dtype=torch.float64), dim=-1)
        self.codebooks = nn.Parameter(codebooks, requires_grad=False)

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        frames = features if self.time_ahead else features.transpose(1, 2)  # (B, T, F)
        batch_size, num_frames, _ = frames.shape
        if num_frames % self.combine_time_steps:
            raise ValueError(
                f"combine_time_steps={self.combine_time_steps} does not divide the {num_frames} frames of a batch: "
                "make the preprocessor's pad_to a multiple of it"
            )
        rows = frames.reshape(batch_size * num_frames // self.combine_time_steps, -1)  # (R, K * F)
        with without_autocast(features.device.type):
            weight = self.proj.weight
            wide = torch.promote_types(weight.dtype, torch.float32)
            vectors = F.linear(rows.to(wide), weight.to(wide)).unflatten(1, (self.num_books, -1))
            codes = nearest_codes(F.normalize(vectors, dim=-1), self.codebooks)  # (R, N)
        codes = codes.unflatten(0, (batch_size, -1))  # (B, T / K, N)
        return codes.squeeze(2) if self.squeeze_single and self.num_books == 1 else codes
