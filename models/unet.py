"""UNet segmentation of visible text watermarks (Ronneberger et al. 2015, arXiv:1505.04597): photo in, mask out.

Decisions that are not obvious
* The network gives logits, and everything that compares with a threshold takes their sigmoid first.
* The threshold is not 0.5 by decree: each validation counts its pixels by probability, the counts travel in the
  checkpoint (`calibration`), and what is asked for - the best F1, or a share of the marked pixels to be found - becomes
  a threshold there.
* A photo is looked at in its own size, in overlapping tiles if need be: thin strokes do not survive a smaller one.
"""

import inspect
import logging
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.overlap import SegmentationLoss
from metrics.calibration import UNKNOWN, calibrated_threshold, recall_at, threshold_for_recall
from metrics.segmentation import SegmentationMetrics
from models.base import System
from modules.adaptive_batch import AdaptiveBatch
from modules.autocast import inference_autocast
from modules.checks import choices, numbers, switches, whole_numbers
from modules.regions import dilate as widen
from modules.regions import regions, remove_doubtful
from modules.smp_encoder import SmpNetwork
from modules.tiling import predict_in_tiles
from modules.unet import UNet as Network

log = logging.getLogger(__name__)

_NORMALIZATIONS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
_OUTPUTS = ("mask", "probability", "overlay", "regions")
_OVERLAY_COLOUR = (255, 0, 0)
_LOSS = {name: parameter.default for name, parameter in inspect.signature(SegmentationLoss).parameters.items()}
_PIXEL_TERMS = {"bce", "focal"}  # means over pixels; all others are ratios of sums that depend on the weights
_COUNT_UNIT = 512  # pixels; eight crops of 256 x 256 are then the 1024 that models/global_loss.py is made for
_SHOWN_UP_TO = 1024  # pixels of the longest side of pictures in TensorBoard
_LEAST_TILE = 32  # pixels; with smaller ones a photo would take hours
_WHOLE_UP_TO = 1024  # pixels of the longest side of photos that are not tiled


class UNet(System):
    """Finds the pixels of watermarks. Network arguments: modules/unet.py.

    *network*: `unet`, or one of segmentation_models_pytorch as `smp:<architecture>/<encoder>`, such as
    `smp:Unet/resnet34`, for which the arguments from *base_channels* to *refine* have no effect.
    *normalization*: of the photo before the network: imagenet (its mean and standard deviation) or none.
    *channels_last*: memory format of network and photos; convolutions are faster in it, results the same.
    *loss*: arguments of `losses.overlap.SegmentationLoss`.
    """

    inputs: ClassVar[dict[str, str]] = {"image": "image"}
    outputs: ClassVar[dict[str, str]] = {
        "mask": "image",
        "probability": "image",
        "overlay": "image",
        "regions": "records",
    }
    dynamic_axes = (0, -2, -1)
    forward_outputs = ("logits",)
    of_training = ("dropout", "loss", "channels_last")
    checkpointed_parts = (
        *(f"network.enc{level}" for level in range(6)),
        *(f"network.dec{step}" for step in range(5)),
        "network.refine",
        *("network.network.encoder", "network.network.decoder"),  # of segmentation_models_pytorch
    )

    calibration: Tensor

    def __init__(
        self,
        *,
        network: str = "unet",
        base_channels: int = 32,
        depth: int = 4,
        up: str = "bilinear",
        norm: str = "batch",
        dropout: float = 0.0,
        patch: int = 1,
        refine: int = 0,
        normalization: str = "imagenet",
        channels_last: bool = True,
        loss: dict[str, Any] | None = None,
        compile: bool | str = False,
        gradient_checkpointing: bool = False,
        optim: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(optim=optim, compile=compile, gradient_checkpointing=gradient_checkpointing)
        choices(normalization=(normalization, _NORMALIZATIONS))
        switches(channels_last=channels_last)
        self.normalization = normalization
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        loss = _LOSS | (loss or {})
        self.hparams.update(loss=loss)  # whole, so that a later default changes nothing
        self.criterion, self.counts_pixels = _criterion(loss)
        if network == "unet":
            own = Network(
                base_channels=base_channels,
                depth=depth,
                up=up,
                norm=norm,
                dropout=dropout,
                patch=patch,
                refine=refine,
            )
        elif isinstance(network, str) and network.startswith("smp:"):
            own = SmpNetwork(name=network.removeprefix("smp:"))
        else:
            raise ValueError(f"network must be unet or smp:<architecture>/<encoder>, got {network!r}")
        self.network = own.to(memory_format=self.memory_format)
        mean, std = (torch.tensor(values)[:, None, None] for values in _NORMALIZATIONS[normalization])
        self.register_buffer("mean", mean, persistent=False)  # (3, 1, 1)
        self.register_buffer("std", std, persistent=False)
        self.register_buffer("calibration", torch.zeros(2, 100, dtype=torch.int64))
        self._batches: dict[tuple[Any, ...], AdaptiveBatch] = {}

    @property
    def threshold(self) -> float:
        """The probability from which on a pixel is taken for marked: best F1 in the last validation, 0.5 before any."""
        return calibrated_threshold(self.calibration.cpu())

    def forward(self, image: Tensor) -> Tensor:
        """RGB from 0 to 1 -> logits. Shape: (B, 3, H, W) -> (B, 1, H, W), sizes from 16 on."""
        normalised = (image - self.mean) / self.std
        return self.network(normalised.contiguous(memory_format=self.memory_format))

    def _logits(self, image: Tensor) -> Tensor:
        """Of photos as they are stored. Shape: uint8 (B, 3, H, W), or float from 0 to 1 -> (B, 1, H, W)."""
        image = image.to(self.device)
        scaled = image.to(self.dtype) / 255 if image.dtype == torch.uint8 else image.to(self.dtype)
        return self(scaled)

    def step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        image, mask = batch["image"], batch["mask"]
        logits = self._logits(image) if self.training else self._logits_of_sizes(image, batch["size"])
        terms = self.criterion(logits, mask)
        output = {"loss": terms.pop("loss"), "logits": logits}
        if len(terms) > 1:
            output |= {f"loss_{name}": value for name, value in terms.items()}
        if self.counts_pixels:
            output["loss_count"] = (mask != UNKNOWN).sum() / _COUNT_UNIT
        return output

    def _logits_of_sizes(self, image: Tensor, size: Tensor) -> Tensor:
        """Each photo without its padding, which the network would see, and as `predict` looks at it.

        Shape: (B, 3, H, W), (B, 2) -> (B, 1, H, W), zero in the padding.
        """
        height, width = image.shape[-2:]
        if bool((size == size.new_tensor([height, width])).all()) and max(height, width) <= _WHOLE_UP_TO:
            return self._logits(image)
        logits = torch.zeros(len(image), 1, height, width, device=self.device, dtype=self.dtype)
        for index, (rows, columns) in enumerate(size.tolist()):
            alone = self._logits_of_photo(image[index, :, :rows, :columns])
            logits[index, :, :rows, :columns] = alone.to(logits)
        return logits

    def make_metric(self, stage: str) -> SegmentationMetrics:
        return SegmentationMetrics()

    def update_metric(self, metric: Any, batch: dict[str, Tensor], output: dict[str, Tensor]) -> None:
        probability = output["logits"].detach().float().sigmoid()
        metric.update(probability=probability, target=batch["mask"])

    def on_test_epoch_start(self) -> None:
        # Made anew: the weights, and with them the threshold, were loaded after the first was made.
        self._metrics["test"] = SegmentationMetrics(threshold=self.threshold, boundary=True)
        super().on_test_epoch_start()

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if not self.trainer.sanity_checking:
            self.calibration.copy_(self._metrics["val"].histogram())  # type: ignore[operator]

    def example_scores(self, metric: Any) -> list[dict[str, Any]]:
        return metric.rows()

    def groups_to_train(self) -> Any:
        if self.optim.get("name") == "muon" or not self.optim.get("weight_decay"):  # muon decays matrices only
            return super().groups_to_train()
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return [
            {"params": [parameter for parameter in parameters if parameter.ndim > 1]},
            {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
        ]

    def on_fit_start(self) -> None:
        accumulated = self.trainer.accumulate_grad_batches
        exact = self.counts_pixels or (self.criterion.per_image and self.hparams["loss"]["empty"] != "skip")
        if accumulated > 1 and not exact:
            log.info(
                "trainer.accumulate_grad_batches=%d: ratios such as Dice are those of each of the %d batches of a step"
                " (model.loss.per_image=true: of each image, however they are batched)",
                accumulated,
                accumulated,
            )

    def figures(self, batch: dict[str, Tensor], output: dict[str, Tensor]) -> dict[str, Tensor]:
        height, width = batch["size"][0].tolist()
        image = batch["image"][0, :, :height, :width].cpu()
        found = output["logits"][0, 0, :height, :width].sigmoid().cpu() >= self.threshold
        known = batch["mask"][0, 0, :height, :width].cpu() == 1
        shown = {"image": image, "found": overlay(image, found), "marked": overlay(image, known)}
        return {name: _reduced(picture, _SHOWN_UP_TO) for name, picture in shown.items()}

    def example_input(self) -> dict[str, Tensor]:
        return {"image": torch.rand(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))}

    @torch.inference_mode()
    def predict(
        self,
        image: Tensor,
        *,
        sensitivity: float | None = None,
        threshold: float | None = None,
        tile: int = 512,
        overlap: float = 0.5,
        whole_up_to: int = _WHOLE_UP_TO,
        batch_size: int = 8,
        min_batch_size: int = 1,
        max_batch_size: int = 32,
        flips: bool = False,
        dilate: int = 0,
        min_area: int = 0,
        hysteresis: float = 0.8,
        region: Sequence[int] | None = None,
        precision: str = "auto",
        outputs: Sequence[str] = ("mask", "probability", "overlay", "regions"),
    ) -> dict[str, Any]:
        """Find the marks in a photo of any size, at its own size.

        *image*: (3, H, W), uint8, or float from 0 to 1. *sensitivity*: the share of the marked pixels that shall be
        found, as counted in the last validation; null: the threshold with the best F1 there. *threshold*: the
        probability from which on a pixel is marked, in place of either. Photos with a side longer than *whole_up_to*
        are looked at in tiles of *tile* pixels that overlap by the share *overlap*, *batch_size* at a time, which a
        GPU's memory raises up to *max_batch_size* or lowers down to *min_batch_size*. *flips*: the mean over the photo
        and its mirrored forms. *dilate*: pixels by which the mask is widened. *min_area*: pixels of the smallest region
        that stays. *hysteresis*: a region stays where it reaches a probability that this share of the marked pixels
        found in the last validation does not reach; 0: all stay. *region*: x, y, width and height to look in, in
        pixels. *precision*: auto (half on GPUs), 32, bf16 or 16.

        Returns what *outputs* names: `mask` (H, W) bool, `probability` (H, W), `overlay` (3, H, W) uint8, `regions`, a
        list of what modules/regions.py tells of each connected region (before it is widened), and `threshold`, the one
        that was used.
        """
        image = _checked_image(image)
        numbers(tile=tile, least=_LEAST_TILE, most=math.inf)
        whole_numbers(tile=tile, whole_up_to=whole_up_to)
        numbers(overlap=overlap, least=0, most=0.95)
        numbers(dilate=dilate, min_area=min_area, least=0, most=math.inf)
        numbers(hysteresis=hysteresis, least=0, most=0.99)
        switches(flips=flips)
        for name in outputs or ("none",):
            choices(outputs=(name, _OUTPUTS))
        limit = self._limit(sensitivity, threshold)
        rows, columns = _limits(region, *image.shape[1:])
        batch = self._batch(batch_size, min_batch_size, max_batch_size)
        with inference_autocast(self.device.type, str(precision)):
            logits = self._logits_of_photo(
                image[:, rows, columns],
                tile=tile,
                overlap=overlap,
                whole_up_to=whole_up_to,
                batch=batch,
                flips=flips,
            )
        probability, inside = torch.zeros(image.shape[1:]), torch.zeros(image.shape[1:], dtype=torch.bool)
        probability[rows, columns] = logits[0].float().cpu().sigmoid()
        inside[rows, columns] = True
        mask, certain = (probability >= limit) & inside, self._certain(limit, hysteresis)
        if min_area > 1 or certain > limit:
            mask = remove_doubtful(mask, probability, min_area=min_area, least=certain)
        results: dict[str, Any] = {"probability": probability, "mask": widen(mask, dilate) & inside}
        if "regions" in outputs:
            results["regions"] = regions(mask, probability)
        if "overlay" in outputs:
            results["overlay"] = overlay(image, results["mask"])
        return {name: results[name] for name in outputs} | {"threshold": limit}

    def _batch(self, size: int, least: int, most: int) -> AdaptiveBatch:
        """The same for all photos, so that what was found for one serves the next."""
        key = (self.device, size, least, most)
        if key not in self._batches:
            self._batches[key] = AdaptiveBatch(size=size, least=least, most=most, adapt=self.device.type == "cuda")
        return self._batches[key]

    def _limit(self, sensitivity: float | None, threshold: float | None) -> float:
        """The probability from which on a pixel is marked."""
        if threshold is not None:
            numbers(least=0, most=1, threshold=threshold)
            if sensitivity is not None:
                raise ValueError(f"sensitivity={sensitivity} and threshold={threshold}: give one of them")
            return threshold
        if sensitivity is None:
            return self.threshold
        numbers(least=0.01, most=1, sensitivity=sensitivity)
        if not self.calibration[1].any():
            raise ValueError("sensitivity needs a checkpoint that was validated on marked photos; give threshold")
        return threshold_for_recall(self.calibration.cpu(), sensitivity)

    def _certain(self, limit: float, hysteresis: float) -> float:
        """The probability that a region has to reach somewhere: that of all but a share of the marked pixels found."""
        if not hysteresis or not self.calibration[1].any():
            return limit
        found = recall_at(self.calibration.cpu(), limit)
        return threshold_for_recall(self.calibration.cpu(), max((1 - hysteresis) * found, 0.01)) if found else limit

    def _logits_of_photo(
        self,
        image: Tensor,
        *,
        tile: int = 512,
        overlap: float = 0.5,
        whole_up_to: int = _WHOLE_UP_TO,
        batch: AdaptiveBatch | None = None,
        flips: bool = False,
    ) -> Tensor:
        """Shape: (3, H, W) -> (1, H, W)"""
        look = self._flipped if flips else self._logits
        if max(image.shape[1:]) <= whole_up_to:
            return look(image[None])[0]
        return predict_in_tiles(
            look, image, tile=tile, overlap=overlap, batch=batch or AdaptiveBatch(size=1, most=1, adapt=False)
        )

    def _flipped(self, image: Tensor) -> Tensor:
        """The mean over a photo and its three mirrored forms. Shape: (B, 3, H, W) -> (B, 1, H, W)"""
        return torch.stack([self._logits(image.flip(axes)).flip(axes) for axes in ((), (2,), (3,), (2, 3))]).mean(0)


def overlay(image: Tensor, mask: Tensor) -> Tensor:
    """The photo with its marked pixels half red. Shape: uint8 or float (3, H, W), bool (H, W) -> uint8 (3, H, W)"""
    photo = image.cpu() if image.dtype == torch.uint8 else (image.cpu() * 255).round().clamp(0, 255).to(torch.uint8)
    red = torch.tensor(_OVERLAY_COLOUR, dtype=torch.uint8)[:, None, None]
    return torch.where(mask.cpu(), photo // 2 + red // 2, photo)


def _reduced(picture: Tensor, longest: int) -> Tensor:
    """Shape: uint8 (3, H, W) -> uint8 (3, h, w)"""
    share = longest / max(picture.shape[1:])
    if share >= 1:
        return picture
    size = [max(1, round(side * share)) for side in picture.shape[1:]]
    return F.interpolate(picture[None].float(), size, mode="area")[0].round().to(torch.uint8)


def _checked_image(image: Tensor) -> Tensor:
    """Raises ValueError for what is no photo."""
    if image.ndim != 3 or image.shape[0] != 3 or not (image.dtype == torch.uint8 or image.is_floating_point()):
        raise ValueError(
            f"image must be RGB of shape (3, height, width), uint8 or float, got {image.dtype} of {tuple(image.shape)}"
        )
    return image


def _limits(region: Sequence[int] | None, height: int, width: int) -> tuple[slice, slice]:
    """Rows and columns that a limit [x, y, width, height] leaves of a photo; one that reaches beyond it is cut.

    Raises ValueError for a limit that is none or that leaves no pixel.
    """
    if region is None:
        return slice(0, height), slice(0, width)
    whole = isinstance(region, Sequence) and all(isinstance(v, int) and not isinstance(v, bool) for v in region)
    if not whole or len(region) != 4 or min(region[:2]) < 0 or min(region[2:]) < 1:
        raise ValueError(f"region must be [x, y, width, height] in pixels, got {region}")
    left, top, columns, rows = region
    if left >= width or top >= height:
        raise ValueError(f"region {list(region)} lies outside the photo of {width} x {height} pixels")
    return slice(top, min(top + rows, height)), slice(left, min(left + columns, width))


def _criterion(loss: dict[str, Any]) -> tuple[SegmentationLoss, bool]:
    """The loss, and whether System weighs it by the number of pixels that it is a mean of, over all processes and
    micro-batches of a step. A ratio whose denominator depends on the weights is summed up over processes only.
    """
    try:
        criterion = SegmentationLoss(**loss)
        together = criterion.reduce == "global" and not criterion.per_image and not loss["focal_normalized"]
        counts_pixels = together and criterion.weights.keys() <= _PIXEL_TERMS
        return (SegmentationLoss(**loss | {"reduce": "local"}) if counts_pixels else criterion), counts_pixels
    except (TypeError, ValueError) as error:
        raise ValueError(f"loss.{str(error).removeprefix('SegmentationLoss.__init__() ')}") from error
