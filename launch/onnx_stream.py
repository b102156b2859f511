"""A one-step ONNX graph as a live system runs it: its state carried from call to call, on one core.

Each input that is part of the state has an output of the same name with `_next` behind it; all begin with zeros. The
file's metadata says the rest, such as sample_rate.
"""

from pathlib import Path

import numpy as np

NEXT = "_next"
_DTYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


class OnnxStream:
    """Runs a file step by step.

    Attributes: `signals`, the names of the inputs that are no state; `state`, the others, before the next step;
    `facts`, the metadata.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.facts: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        inputs = {i.name: np.zeros(i.shape, _DTYPES[i.type]) for i in self._session.get_inputs()}
        self._kept = [output.name.removesuffix(NEXT) for output in self._session.get_outputs()[1:]]
        self._start = {name: inputs[name] for name in self._kept}
        self.signals = [name for name in inputs if name not in self._start]
        self.reset()

    def reset(self) -> None:
        """Back to before the first step."""
        self.state: dict[str, np.ndarray] = dict(self._start)

    def __call__(self, *signals: np.ndarray) -> np.ndarray:
        """The next step: what the graph's first output is for the inputs `signals`, in their order."""
        given = dict(zip(self.signals, signals, strict=True))
        output, *after = self._session.run(None, given | self.state)
        self.state = {name: np.asarray(value) for name, value in zip(self._kept, after, strict=True)}
        return np.asarray(output)
