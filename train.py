"""Train a system: compose -> check -> build -> fit -> test.

python train.py model=conv_tasnet data.train_manifest=…        python train.py experiment=conv_tasnet_demo
"""

if __name__ == "__main__":  # first of all: a signal may come while the rest is imported
    from launch import stop_signals

    stop_signals.install()

import hydra
from omegaconf import DictConfig

from launch import job


@hydra.main(version_base="1.3", config_path="config", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """One job; returns the monitored metric, which a sweeper may optimise."""
    with job.one_job():
        from launch import build, report  # torch and Lightning load here, so that --help is quick

        for run in build.attempts(cfg):  # more than one where memory is too small for the batch
            run.seed()
            data = run.data()
            system = run.system()
            trainer = run.trainer(system)
            if run.config["dry_run"]:
                return report.dry_run(system, data, trainer)
            run.fit(trainer, system, data)
        tested = run.test(trainer, system, data)
        report.closing(run.directory, trainer, tested)
        return run.monitored(trainer)


if __name__ == "__main__":
    job.run(main, "train")
