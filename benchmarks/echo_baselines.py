"""Classical echo cancellers to measure against: WebRTC's AEC3 and the adaptive filter of speex.

Both come as wheels that nothing else needs (`pip install '.[aec_baselines]'`). They take 16-bit samples in frames of
10 ms, so signals are rounded and clipped as a sound card would do it. AEC3 looks for the delay of the echo by itself;
speex does not, and its filter has to be long enough for delay and room together.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

SAMPLE_RATE = 16000
_FRAME_SAMPLES = SAMPLE_RATE // 100
_SPEEX_FILTER_SAMPLES = 3200  # 200 ms


def webrtc_aec3(mic: Tensor, far: Tensor, *, noise_suppression: bool = False) -> Tensor:
    """Echo cancellation of WebRTC's audio processing module, without its high-pass filter and gain control.

    The far end of a frame is handed over before its microphone, as in a call.

    Shape: (T,), (T,) at 16 kHz -> (T,).

    Raises ImportError without the package livekit.
    """
    from livekit.rtc import AudioFrame
    from livekit.rtc.apm import AudioProcessingModule

    module = AudioProcessingModule(echo_cancellation=True, noise_suppression=noise_suppression)

    def frame(samples: np.ndarray) -> AudioFrame:
        return AudioFrame(samples.tobytes(), SAMPLE_RATE, 1, _FRAME_SAMPLES)

    def process(mic_frame: np.ndarray, far_frame: np.ndarray) -> np.ndarray:
        module.process_reverse_stream(frame(far_frame))
        output = frame(mic_frame)
        module.process_stream(output)  # in place
        return np.frombuffer(bytes(output.data), np.int16)

    return _frame_by_frame(process, mic, far)


def speex(mic: Tensor, far: Tensor, *, suppression: bool = False) -> Tensor:
    """The adaptive filter of speexdsp (MDF, 200 ms); with *suppression* also that of residual echo and noise.

    Shape: (T,), (T,) at 16 kHz -> (T,).

    Raises ImportError without the package pyaec.
    """
    from pyaec import Aec

    canceller = Aec(_FRAME_SAMPLES, _SPEEX_FILTER_SAMPLES, SAMPLE_RATE, suppression)

    def process(mic_frame: np.ndarray, far_frame: np.ndarray) -> np.ndarray:
        return np.array(canceller.cancel_echo(mic_frame.tolist(), far_frame.tolist()), np.int16)

    return _frame_by_frame(process, mic, far)


def _frame_by_frame(process: Callable[[np.ndarray, np.ndarray], np.ndarray], mic: Tensor, far: Tensor) -> Tensor:
    """Run *process* over frames of 16-bit samples; what the last frame lacks is silence."""
    padding = -len(mic) % _FRAME_SAMPLES
    signals = torch.nn.functional.pad(torch.stack([mic, far]), (0, padding)).double()
    samples = (signals * 2**15).round().clamp(-(2**15), 2**15 - 1).to(torch.int16).numpy()
    frames = samples.reshape(2, -1, _FRAME_SAMPLES).swapaxes(0, 1)  # (frames, 2, samples)
    output = np.concatenate([process(mic_frame, far_frame) for mic_frame, far_frame in frames])
    return torch.from_numpy(output).float()[: len(mic)] / 2**15
