"""What is reported: torchmetrics objects with our rules for silent and empty cases."""
