"""python -m pi_stepnft.rlinf --config-name cpu [runner.max_epochs=3 …]: train by a configuration of this folder."""

import hydra
from omegaconf import DictConfig

from pi_stepnft.rlinf import launch


@hydra.main(version_base="1.3", config_path=".", config_name="cpu")
def main(cfg: DictConfig) -> None:
    launch(cfg).run()


if __name__ == "__main__":
    main()
