"""Run a checkpoint on files: python predict.py ckpt_path=runs/… input=<files> output=<folder>"""

if __name__ == "__main__":  # first of all: a signal may come while the rest is imported
    from launch import stop_signals

    stop_signals.install()

import hydra
from omegaconf import DictConfig

from launch import job


@hydra.main(version_base="1.3", config_path="config", config_name="predict")
def main(cfg: DictConfig) -> None:
    with job.one_job():
        from launch import predict

        predict.run(cfg)


if __name__ == "__main__":
    job.run(main, "predict")
