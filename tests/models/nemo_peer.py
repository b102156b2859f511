"""Run by the Python of .peers, which has NeMo: what it makes of archives of ours, and what it writes itself.

python nemo_peer.py <folder>: restores `<name>.nemo` there, encodes `<name>.pt`, and writes `<name>_seen.pt`,
`<name>_again.nemo` and `<name>.ckpt`.
"""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from nemo.collections.asr.models.ssl_models import EncDecDenoiseMaskedTokenPredModel
from nemo.collections.asr.modules.conformer_encoder import ConformerMultiLayerFeatureExtractor

for file in sorted(Path(sys.argv[1]).glob("*.nemo")):
    model = EncDecDenoiseMaskedTokenPredModel.restore_from(str(file), map_location="cpu").eval()
    given = torch.load(file.with_suffix(".pt"))
    with torch.no_grad():
        features, frames = model.preprocessor(input_signal=given["audio"], length=given["length"])
        encoded, length = model.encoder(audio_signal=features, length=frames)
        extractor = ConformerMultiLayerFeatureExtractor(
            model.encoder, layer_idx_list=[0, 1], include_final_output=False
        )
        layers, _ = extractor(audio_signal=features, length=frames)
    encoded, length = encoded.clone(), length.clone()  # without the types that NeMo attaches
    layers = [layer.clone() for layer in layers]
    seen = {"encoded": encoded, "length": length, "names": list(model.state_dict()), "state": dict(model.state_dict())}
    seen["layers"] = layers
    torch.save(seen, file.with_name(f"{file.stem}_seen.pt"))
    model.save_to(str(file.with_name(f"{file.stem}_again.nemo")))
    trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_epochs=1)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(file.with_suffix(".ckpt"))
