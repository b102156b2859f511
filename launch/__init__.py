"""From a command line to a running Trainer. Nothing heavy is imported here: `--help` has to be quick."""
