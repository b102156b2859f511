"""Plain network modules: torch and torchaudio only, neither Lightning nor Hydra."""
