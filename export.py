"""Export a checkpoint: python export.py ckpt_path=runs/… output=model.onnx"""

if __name__ == "__main__":  # first of all: a signal may come while the rest is imported
    from launch import stop_signals

    stop_signals.install()

import hydra
from omegaconf import DictConfig

from launch import job


@hydra.main(version_base="1.3", config_path="config", config_name="export")
def main(cfg: DictConfig) -> None:
    with job.one_job():
        from launch import export

        export.run(cfg)


if __name__ == "__main__":
    job.run(main, "export")
