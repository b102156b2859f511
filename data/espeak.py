"""Speech synthesis as a program of its own: JSON lines in on stdin, 16-bit samples out on stdout.

    python -m data.espeak      {"text": "Good morning.", "voice": "en-us+f4", "rate": 160, "pitch": 50, "range": 50}

The espeak-ng library inside the `espeakng-loader` wheel is GPL-3. It is therefore loaded by this program
alone, which talks to the rest of the repository over pipes; no other file imports `espeakng_loader`, or this one.
It uses nothing else outside the standard library, so that it starts in a few milliseconds.

Protocol: the first line out is `{"sample_rate": 22050}`. Every request line is then answered by a line
`{"num_samples": n}` and n little-endian int16 samples, or by a line `{"error": "why"}`. End of input ends the
program. The library carries random and filter state from one text to the next: the same requests in the same order
give the same samples, another order does not.
"""

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import IO

MISSING = "error: the speech synthesiser is not installed: pip install -r requirements-demo.txt"

_SYNCHRONOUS, _DONT_EXIT = 2, 0x8000  # espeak_AUDIO_OUTPUT, espeakINITIALIZE_DONT_EXIT
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4  # espeak_PARAMETER
_UTF8 = 1  # espeakCHARS_UTF8
_VOLUME_PERCENT = 40  # the default of 100 clips about a fifth of the voices inside the library

Synthesise = Callable[[dict], bytes]


def load() -> tuple[int, Synthesise]:
    """Open the library; return its sample rate in Hz and a function from a request to int16 samples.

    Raises ImportError without the wheel, RuntimeError if the library does not start. The function raises
    ValueError for an unknown voice.
    """
    import espeakng_loader

    library = ctypes.CDLL(espeakng_loader.get_library_path())
    chunks: list[bytes] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(samples, num_samples, _events):
        if samples and num_samples > 0:
            chunks.append(ctypes.string_at(samples, 2 * num_samples))
        return 0

    data_path = espeakng_loader.get_data_path().encode()
    sample_rate = library.espeak_Initialize(_SYNCHRONOUS, 0, data_path, _DONT_EXIT)
    if sample_rate <= 0:
        raise RuntimeError("espeak-ng did not start")
    library.espeak_SetParameter(_VOLUME, _VOLUME_PERCENT, 0)

    def synthesise(request: dict) -> bytes:
        chunks.clear()
        library.espeak_SetSynthCallback(collect)
        if library.espeak_SetVoiceByName(request["voice"].encode()) != 0:
            raise ValueError(f"no such voice: {request['voice']}")
        for parameter, key in ((_RATE, "rate"), (_PITCH, "pitch"), (_RANGE, "range")):
            library.espeak_SetParameter(parameter, int(request[key]), 0)
        text = request["text"].encode() + b"\0"
        library.espeak_Synth(text, len(text), 0, 1, 0, _UTF8, None, None)
        library.espeak_Synchronize()
        return b"".join(chunks)

    return sample_rate, synthesise


def serve(requests: IO[str], answers: IO[bytes], sample_rate: int, synthesise: Synthesise) -> None:
    """Answer request lines until the input ends."""
    _send(answers, {"sample_rate": sample_rate})
    for line in requests:
        try:
            samples = synthesise(json.loads(line))
        except (ValueError, KeyError) as error:
            _send(answers, {"error": f"{type(error).__name__}: {error}"})
        else:
            _send(answers, {"num_samples": len(samples) // 2}, samples)


def _send(answers: IO[bytes], line: dict, samples: bytes = b"") -> None:
    answers.write(json.dumps(line).encode() + b"\n" + samples)
    answers.flush()


def main() -> int:
    try:
        sample_rate, synthesise = load()
    except ImportError:
        print(MISSING, file=sys.stderr)
        return 2
    except (OSError, RuntimeError) as error:
        print(f"error: the speech synthesiser cannot be used: {error}", file=sys.stderr)
        return 2
    # Ctrl-C reaches this process too; the default action ends it even inside the library, where Python cannot.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # The library may print; only answers may reach the real stdout.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        serve(sys.stdin, answers, sample_rate, synthesise)
    except BrokenPipeError:
        return 1  # the other side is gone
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
